"""What the processes of tests/test_saver.py do; each function runs on every rank of a group."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_ranks import Trainer, config_of, trainer

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, checkpoint_files, checkpoint_shards
from perilune.pretrain.checkpoint_saver import Saver
from perilune.pretrain.run import run
from perilune.pretrain.schema import Config


def background(config: Config, keep: int = 0) -> Config:
    return replace(config, train=replace(config.train, async_save=True, keep=keep))


@contextmanager
def before_each_tensor(act: Callable[[int], None]) -> Any:
    """Call `act` with a number that counts up before a tensor is written."""
    write, count = checkpoint_shards._alone, 0

    def slow(tensor: Any) -> Any:
        nonlocal count
        count += 1
        act(count)
        return write(tensor)

    checkpoint_shards._alone = slow
    try:
        yield
    finally:
        checkpoint_shards._alone = write


def hashes(path: Path) -> dict[str, str]:
    """Of the files with tensors."""
    held = checkpoint_files.verify(path)["files"]
    return {name: said["sha256"] for name, said in held.items() if name.endswith(".distcp")}


def in_background(config: Config, folder: Path, waits: bool) -> dict[str, Any]:
    """A save while a step is taken, beside a blocking one of the same state; the writer is slower than the step.

    `waits` False: the update does not wait for the writer.
    """
    config = background(config)
    with trainer(config) as one:
        one.train(2)
        blocking = checkpoint.save(folder / "blocking", 2, one.model, one.optimizer, {"step": 2}, config=config, keep=0)
        saver = Saver(folder / "background", config)
        started = threading.Event()

        def slow(_: int) -> None:
            started.set()
            time.sleep(0.02)

        with before_each_tensor(slow):
            began = time.monotonic()
            saver.save(2, one.model, one.optimizer, {"step": 2})
            called = time.monotonic() - began
            started.wait(20)
            one.before_update = saver.before_update if waits else one.before_update
            losses = one.train(1)
            waited = time.monotonic() - began
            saver.finish()
        path = checkpoint_files.latest(folder / "background")
        assert path is not None
        saver.save(3, one.model, one.optimizer, {"step": 3})
        saver.save(4, one.model, one.optimizer, {"step": 4})  # waits for the one before
        two = sorted(entry.name for entry in (folder / "background").glob("step_*"))
        saver.close()
        found = {"blocking": hashes(blocking), "background": hashes(path), "losses": losses, "digest": one.digest()}
        dist.barrier()
        return {**found, "called": called, "waited": waited, "at the next save": two}


def straight(config: Config) -> dict[str, Any]:
    """Three steps without a save."""
    with trainer(config) as one:
        one.train(2)
        return {"losses": one.train(1), "digest": one.digest()}


def failing(config: Config, folder: Path) -> dict[str, Any]:
    """A save that fails on one rank, in the background: when it is told, what is left, and that the next one works."""
    config = background(config, keep=1)
    rank, found = dist.get_rank(), dict[str, Any]()
    with trainer(config) as one:
        one.train(1)
        saver = Saver(folder, config)
        saver.save(1, one.model, one.optimizer, {"step": 1})
        saver.finish()
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:  # the kernel refuses to let a file grow beyond 64 KiB, as a full disk would
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
        saver.save(2, one.model, one.optimizer, {"step": 2})
        saver.before_update()  # returns though the writer has failed
        deadline = time.monotonic() + 20
        while not saver.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        found["failed"] = saver.failed
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        dist.barrier()
        found["left"] = sorted(entry.name for entry in folder.iterdir())
        found["next save"] = _told(lambda: saver.save(3, one.model, one.optimizer, {"step": 3}))
        saver.save(3, one.model, one.optimizer, {"step": 3})
        found["after"] = _told(saver.finish)
        saver.close()
        dist.barrier()
        found["end"] = sorted(entry.name for entry in folder.iterdir())
    return found


def _told(action: Callable[[], Any]) -> str:
    try:
        action()
    except checkpoint.SaveError as error:
        return f"SaveError: {error}"
    return "nothing"


def run_that_cannot_write(config: Config, run_dir: Path) -> str:
    """A run whose disk is full when a checkpoint is to be finished: what it says."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write, checkpoint_files.write_manifest = checkpoint_files.write_manifest, full
    try:
        return _told(lambda: run(config, run_dir, 1))
    finally:
        checkpoint_files.write_manifest = write
        meshes.stop(leave_group=False)


def killed(folder: Path, where: str) -> None:
    """A blocking save, then one in the background in the midst of which this process kills itself while it trains."""
    config = background(config_of())
    one = Trainer(config)
    one.train(1)
    saver = Saver(folder, config)
    saver.save(1, one.model, one.optimizer, {"step": 1})
    saver.finish()
    training = threading.Event()

    def kill(*_: Any) -> None:
        training.wait(20)
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "manifest":
        checkpoint_files.write_manifest = kill
    with before_each_tensor(lambda count: kill() if where == "tensors" and count == 20 else None):
        saver.save(2, one.model, one.optimizer, {"step": 2})
        one.before_update = training.set
        one.train(5)
        saver.finish()


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    killed(Path(sys.argv[1]), sys.argv[2])
