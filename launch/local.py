"""Processes of one run on this machine: started together, watched, and ended together, with none left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

_GRACE_S = 10.0  # after one process failed, the others have this long to end by themselves
_PREEMPTED = 75


def run(command: Sequence[str], nproc: int, log_dir: Path, threads: int = 0) -> int:
    """Run `command` in `nproc` processes with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    Rank 0 writes its stdout to this terminal; everything else goes to `log_dir/rank_N.log`. SIGTERM and SIGINT are
    passed on once (the processes write a checkpoint and exit with 75); a second one kills them. Returns 0 if all
    ended well, 75 if they were preempted, else the code of the first to fail, after the last lines of its log.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    threads = threads or max(1, (os.cpu_count() or 1) // nproc)
    base = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
    if sys.platform.startswith("linux"):
        base.setdefault("GLOO_SOCKET_IFNAME", "lo")
    children: list[subprocess.Popen[bytes]] = []
    files: list[IO[bytes]] = []
    file: IO[bytes]
    asked = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        del number, frame
        asked += 1
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(nproc):
            file = (log_dir / f"rank_{rank}.log").open("ab")
            files.append(file)
            children.append(
                subprocess.Popen(
                    list(command),
                    env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else file,
                    stderr=file,
                    preexec_fn=_die_with_parent,
                )
            )
        return _watch(children, log_dir, lambda: asked > 0)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for file in files:
            file.close()
        for n, handler in before.items():
            signal.signal(n, handler)


def _watch(children: list[subprocess.Popen[bytes]], log_dir: Path, asked: Callable[[], bool]) -> int:
    def failures() -> list[tuple[int, int]]:
        # A process that is asked to stop before it listens for that dies of the signal, which is no failure.
        well = (None, 0, _PREEMPTED, -signal.SIGTERM, -signal.SIGINT) if asked() else (None, 0, _PREEMPTED)
        return [(rank, child.returncode) for rank, child in enumerate(children) if child.poll() not in well]

    first: tuple[int, int] | None = None  # (rank, exit code) of the first to fail
    deadline = float("inf")
    while any(child.poll() is None for child in children):
        if first is None and (failed := failures()):
            first, deadline = failed[0], time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    first = first or next(iter(failures()), None)
    if first is None:
        return _PREEMPTED if any(child.returncode for child in children) else 0
    rank, code = first
    _tell(rank, code, log_dir / f"rank_{rank}.log")
    return code if code > 0 else 1


def _tell(rank: int, code: int, log: Path) -> None:
    """The one line of an error of the user's, or the last lines of a failure."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code == 2 and lines:
        print(lines[-1], file=sys.stderr)
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print("\n".join(lines[-15:]), file=sys.stderr)
    print(f"perilune: rank {rank} {how}; its log: {log}", file=sys.stderr)


def _die_with_parent() -> None:
    """Linux: the kernel kills this process when its parent is gone, so that a killed launcher leaves no orphan."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
