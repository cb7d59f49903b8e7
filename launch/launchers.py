"""The launchers, by the name that a run's papers have of them; and that one run is started by one of them at a time."""

from __future__ import annotations

import fcntl
import importlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perilune.launch.job import JobError, NoAnswer, Papers
from perilune.launch.judge import events

_MODULES = {"local": "local", "slurm": "slurm", "ray": "ray_jobs"}  # name in `Papers.where` -> module of launch/
_HELD: set[Path] = set()  # run directories that this process holds
_LOOK_S = 5.0  # for a new heartbeat of a run on another machine
_TRIES, _TRY_S = 4, 0.1  # for the lock: somebody who asks whether it is held has it for a moment
_ENDS = ("done", "preempted", "stopped", "gave_up")  # events after which nothing runs


def launcher(where: dict[str, Any]) -> Any:
    """The module of the launcher that started a run: its `state(where)` and `cancel(where, now)`. Raises JobError."""
    name = where.get("launcher", "")
    if name not in _MODULES:
        raise JobError(f"launched by {name!r}, which is none of {', '.join(_MODULES)}")
    return importlib.import_module(f"perilune.launch.{_MODULES[name]}")


def refuse_second(papers: Papers, look: bool = False) -> None:
    """Raise JobError where the run is under way, whoever started it: two launches would write over each other's files.
    Raise NoAnswer where its cluster does not say. Of one on another machine, which cannot be asked, only with a
    `look` of some seconds at its heartbeats.
    """
    try:
        _, other = papers.read()
        there = launcher(other).state(other)
    except JobError:
        return
    if (other.get("pid"), other.get("host")) == (os.getpid(), socket.gethostname()):
        return
    if there.startswith("unknown"):
        raise NoAnswer(
            f"{papers.run_dir} may be under way: {there.removeprefix('unknown: ')}. Try again when it answers; if it "
            f"is gone for good, remove {papers.where}"
        )
    if not there.startswith(("running", "pending")):
        if look and there.startswith("on "):
            _refuse_elsewhere(papers, other)
        return
    who = f"process {other['pid']}" if "pid" in other else f"{other['launcher']}'s job {_jobs(other)}"
    raise JobError(
        f"{papers.run_dir} is being trained already, by {who} ({there}): wait, end it by `perilune jobs cancel "
        f"{papers.run_dir}`, or name another --run"
    )


@contextmanager
def claimed(papers: Papers) -> Iterator[None]:
    """Hold the run for this launch, which nobody trains. Raises as `refuse_second`."""
    with held(papers):
        refuse_second(papers, look=True)
        yield


@contextmanager
def held(papers: Papers) -> Iterator[None]:
    """Hold the folder: of two launches in the same instant one gets it. Raises JobError.

    The kernel lets go of it when this process ends, however it does. A run that lives with its launcher is held to its
    end, which tells another machine that it goes on, if their file system has locks for all of its machines.
    """
    lock, who = papers.folder / "lock", f"process {os.getpid()} on {socket.gethostname()}"
    try:
        papers.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise JobError(
            f"the run directory {papers.run_dir} cannot be written: {error}; name another with --run"
        ) from error
    try:
        if not _locked(file, papers):
            refuse_second(papers)  # which says more, where the other has recorded itself
            other = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            raise JobError(
                f"{papers.run_dir} is being launched already, by {other}, which holds {lock}: wait, or name another "
                "--run"
            )
        with suppress(OSError):  # on a full disk: the lock does without
            os.ftruncate(file, 0)
            os.pwrite(file, who.encode(), 0)
        _HELD.add(papers.run_dir)
        try:
            yield
        finally:
            _HELD.discard(papers.run_dir)
    finally:
        os.close(file)


def is_held(papers: Papers) -> bool:
    """Whether another process holds the folder by `held`, as far as this machine's file system knows."""
    if papers.run_dir in _HELD:
        return False
    try:
        file = os.open(papers.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _locked(file: int, papers: Papers) -> bool:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not left:
                return False
            time.sleep(_TRY_S)
        except OSError as error:
            print(
                f"perilune: {papers.folder} takes no lock ({error.strerror}): of two launches of this run in the same "
                "instant none would be refused",
                file=sys.stderr,
                flush=True,
            )
            break
    return True


def _refuse_elsewhere(papers: Papers, where: dict[str, Any]) -> None:
    """Raise JobError where a run that lived on another machine gives signs of life; say so where it does not, but has
    left no word of its end."""
    seen = events(papers)
    if seen and seen[-1]["event"] in _ENDS:
        return
    there = (
        f"{papers.run_dir} was started on {where.get('host')} (process {where['pid']}), which cannot be asked from here"
    )
    before, until = _beats(papers), time.monotonic() + _LOOK_S
    while before and time.monotonic() < until:
        time.sleep(0.1)
        if _beats(papers) != before:
            raise JobError(
                f"{there}, and its ranks give signs of life: wait, end it there by `perilune jobs cancel "
                f"{papers.run_dir}`, or name another --run"
            )
    print(
        f"perilune: {there}; it left no word of its end, but gave no sign of life for {_LOOK_S:g} s and holds no lock "
        "that is seen here: it is taken for ended",
        file=sys.stderr,
        flush=True,
    )


def _beats(papers: Papers) -> dict[str, int]:
    """When each rank's heartbeat was written, by the file system's clock."""
    found = {}
    for file in papers.beats.glob("rank_*.json"):
        try:
            found[file.name] = file.stat().st_mtime_ns
        except OSError:  # it is being replaced
            found[file.name] = 0
    return found


def _jobs(where: dict[str, Any]) -> str:
    return ", ".join(map(str, where.get("jobs", []))) or str(where.get("job") or where.get("mark", ""))
