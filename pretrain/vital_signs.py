"""Signs of life of a rank that a launcher watches: its progress, its stacks when there is none, why it failed.

All of it lies under PERILUNE_LAUNCH_DIR (`Papers` of `launch/job.py` says what); without that variable every function
here does nothing. Nothing depends on a signal or on the launcher's host, so that it is the same under Slurm and Ray.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from perilune.pretrain.errors import InputError, Preempted

_EVERY_S = 1.0  # between two beats of one phase; a file on a shared disk need not be written at every fast step
_NAMED = 2000  # characters of an error that are kept
# What gloo, NCCL and torch's store say when another process is gone, in torch 2.11 to 2.13.
_PEER = (
    "closed by peer",
    "reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "timed out waiting",
    "socket timeout",
    "socket has timed out",
    "failed to recv",
    "nccl communicator was aborted",
)


class _Signs:
    """Of this process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.attempt = int(os.environ.get("PERILUNE_ATTEMPT", "0"))
        self.hang_s = float(os.environ.get("PERILUNE_HANG_S", "600"))
        self.start_s = _start_s(folder)
        self.phase, self.step, self.total, self.first = "", 0, 0, -1
        self.recorded = False
        self._written = 0.0
        self._stacks: IO[str] | None = None

    def beat(self, phase: str, step: int | None, total: int | None) -> None:
        """Write the heartbeat, unless one of this phase was written just now."""
        self.step = self.step if step is None else step
        self.total = self.total if total is None else total
        if phase == "step" and self.first < 0:
            self.first = self.step
        now = time.monotonic()
        if phase == self.phase and now - self._written < min(_EVERY_S, self.hang_s / 4):
            return
        self.phase, self._written = phase, now
        body = {
            "step": self.step,
            "of": self.total,
            "phase": phase,
            "begun": 0 <= self.first < self.step,  # a step has been done in this process
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": self.attempt,
            "time": time.time(),
        }
        with suppress(OSError):  # a full disk must not end the training: the launcher sees that signs are missing
            _replace(self.folder / "beats" / f"rank_{self.rank:05d}.json", body)
        self._arm()

    def _arm(self) -> None:
        """Unless it is called again in time, a thread without the interpreter's lock writes the stacks."""
        if self._stacks is None:
            with suppress(OSError):
                file = self.folder / "stacks" / f"rank_{self.rank:05d}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                self._stacks = file.open("w")
        if self._stacks is not None:
            if self._stacks.tell() or os.fstat(self._stacks.fileno()).st_size:
                os.ftruncate(self._stacks.fileno(), 0)  # it got on after all
                os.lseek(self._stacks.fileno(), 0, os.SEEK_SET)
            # Not before the launcher would end the process: to read the stacks of threads that run can crash it.
            begun = 0 <= self.first < self.step
            faulthandler.dump_traceback_later(self.hang_s if begun else self.start_s, file=self._stacks)

    def failed(self, error: BaseException) -> None:
        """Record why this process ends; the first error alone."""
        if self.recorded:
            return
        self.recorded = True
        faulthandler.cancel_dump_traceback_later()
        training = self.phase not in ("", "starting", "loading", "done")
        kind, more = classify(error, training)
        body = {
            "kind": kind,
            "step": self.step + 1 if training else self.step,  # the one under way
            "phase": self.phase,
            "error": f"{type(error).__name__}: {error}"[:_NAMED],
            "where": _where(error),
            "time": time.time(),
            "monotonic": time.monotonic(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **more,
        }
        if kind == "non_finite":
            body["step"] = self.step + 1
        with suppress(OSError):
            _replace(self.folder / "failures" / f"attempt_{self.attempt:03d}_rank_{self.rank:05d}.json", body)

    def done(self) -> None:
        """The process has come to its end."""
        self.beat("done", None, None)
        faulthandler.cancel_dump_traceback_later()


_signs: _Signs | None = None


def _of_this_process() -> _Signs | None:
    global _signs
    folder, rank = os.environ.get("PERILUNE_LAUNCH_DIR"), os.environ.get("RANK", "")
    if _signs is None and folder and rank.isdigit():
        _signs = _Signs(Path(folder), int(rank))
    return _signs


def beat(phase: str, step: int | None = None, total: int | None = None) -> None:
    """This process gets on: it is in `phase`, after `step` steps of `total`. Cheap enough for every step."""
    if (signs := _of_this_process()) is not None:
        signs.beat(phase, step, total)


@contextmanager
def watched() -> Iterator[None]:
    """Record the error that ends the body, before anything that is closed by it; nested, the innermost does it."""
    signs = _of_this_process()
    if signs is None:
        yield
        return
    outermost = not signs.phase
    if outermost:
        signs.beat("starting", 0, None)
    try:
        yield
    except Preempted:
        signs.done()
        raise
    except Exception as error:
        signs.failed(error)
        raise
    if outermost:
        signs.done()


def classify(error: BaseException, training: bool) -> tuple[str, dict[str, Any]]:
    """(kind as in `launch/judge.py`, what else its record has) of an error of a process, in `training` or before it."""
    from perilune.pretrain.checkpoint_files import DamagedCheckpoint

    seen: BaseException | None = error
    while seen is not None:  # the agreement of ranks raises its own error from the one of this rank
        if isinstance(seen, DamagedCheckpoint):
            return "bad_checkpoint", {"folder": str(seen.folder)}
        seen = seen.__cause__
    text = str(error).lower()
    if isinstance(error, FloatingPointError):
        return "non_finite", {}
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory", {}
    if isinstance(error, InputError):
        return ("bad_data" if training else "bad_input"), {}
    if type(error).__name__ in ("DistNetworkError", "DistStoreError") or any(words in text for words in _PEER):
        return "lost_peer", {}
    return "error", {}


def _start_s(folder: Path) -> float:
    """How long the launched job may take to its first step, in seconds."""
    try:
        return float(json.loads((folder / "job.json").read_text())["start_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1800.0


def _where(error: BaseException) -> str:
    """FILE:LINE of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _replace(file: Path, body: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(body) + "\n", encoding="utf-8")
    os.replace(new, file)
