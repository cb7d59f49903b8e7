"""A run's checkpoints, saved while training goes on: it waits only where it would change what is not copied yet.

Between the end of a step and the next update of the weights lie a whole forward and backward pass, in which weights,
masters and moments do not change. A thread writes them from where they are, with no copy; `before_update` waits, should
it not have read the last one by then. Hashing, syncing and the commit go on after that.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from perilune.pretrain import checkpoint
from perilune.pretrain.model import Model
from perilune.pretrain.schema import Config

log = logging.getLogger(__name__)


class Saver:
    """Saves into `folder` as `config` says, one checkpoint at a time. Collective: made, called and closed on all ranks.

    Without `train.async_save`, `save` returns when the checkpoint is committed. With it, `save` returns at once, and
    the checkpoint is committed, or its failure raised on every rank, by `finish` or the next `save`.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._config = folder, config
        self._thread: ThreadPoolExecutor | None = None
        self._group: Any = None
        if config.train.async_save:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._group = dist.new_group(backend="gloo")  # the thread's messages must not mix with the training's
        self._saving: Future[Path] | None = None
        self._copied = threading.Event()

    def save(self, step: int, model: Model, optimizer: Any, run_state: dict[str, Any]) -> None:
        """Begin (or, blocking, do) what `checkpoint.save` does. Raises as it does, and as `finish` does."""
        self.finish()
        taken = checkpoint.snapshot(step, model, optimizer, run_state, self._config)
        if self._thread is None:
            checkpoint.write(taken, self._folder, self._config.train.keep)
            return
        self._copied = threading.Event()
        self._saving = self._thread.submit(self._write, taken, self._copied)

    def before_update(self) -> None:
        """Wait until weights, masters and moments may change."""
        if self._saving is not None:
            self._copied.wait()

    @property
    def failed(self) -> bool:
        """Whether a save has failed of which `finish` has not told yet: known on the ranks at different times."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finish(self) -> None:
        """Wait until the save under way is committed. Raises SaveError on every rank if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Let the save under way come to its end, whatever that is: for a run that ends by another error."""
        try:
            self.finish()
        except Exception as error:
            log.error("%s", error)
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, taken: checkpoint.Snapshot, copied: threading.Event) -> Path:
        try:
            return checkpoint.write(taken, self._folder, self._config.train.keep, group=self._group, copied=copied.set)
        finally:
            copied.set()
