"""The processes of one attempt on this machine: started, waited for, and ended together.

    python -m perilune.launch.agent     its order, one JSON object, comes by stdin

It ends as its ranks did: exit code 0, 75, 2 or another, or by the signal that killed the first of them. It imports no
torch, which would double the time until a rank's first line. So it cannot serve the store by which the ranks find one
another: it takes a port of loopback alone, and rank 0 listens on it and serves (`parallel/store.py`). No port is free
when it is looked for and taken when it is used; until rank 0 listens the others are refused, and try again.

A rank starts by `launch/child.py`, without which it would outlive a killed agent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.launch.job import PREEMPTED

LOOPBACK = "127.0.0.1"
_LOOK_S = 0.05  # between two looks at the ranks
_END_S = 30.0  # for the others to end by themselves once one has failed, and then to be gone by SIGKILL
_AT_ONCE_S = 1.0  # a rank that is killed makes others fail within this
_KILLED = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL}  # by no failure of another rank


@dataclass(frozen=True)
class _End:
    """How a rank ended that did not end well."""

    rank: int
    code: int  # -N: signal N
    at: float  # monotonic seconds


class _Ranks:
    """The processes, from their start on."""

    def __init__(self) -> None:
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.failed: list[_End] = []  # in the order in which they ended
        self._asked = self._killed = False

    def start(self, order: dict[str, Any]) -> None:
        """All of them."""
        child = str(Path(__file__).with_name("child.py"))
        count = order["nproc"]
        with socket.socket() as taken:
            taken.bind((LOOPBACK, 0))
            port = taken.getsockname()[1]
            common = {
                **{name: value for name, value in os.environ.items() if name != "PERILUNE_STORE_FD"},
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank joins the store, and begins none by itself
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                own |= {"PERILUNE_STORE_FD": str(taken.fileno())} if rank == 0 else {}
                log = str(Path(order["logs"]) / f"rank_{rank}.log")
                self.running[rank] = subprocess.Popen(
                    [sys.executable, "-S", "-P", child, str(os.getpid()), order["stdout"], log, *order["command"]],
                    env=common | own,
                    pass_fds=(taken.fileno(),) if rank == 0 else (),
                )

    def wait(self) -> None:
        """Until all have ended, those that outlive a failed one for too long by SIGKILL."""
        while self._look():
            if self.failed:
                self._end_others()
                return
            time.sleep(_LOOK_S)

    def ask(self) -> None:
        """All that still run to end with a checkpoint, once."""
        if not self._asked:
            self._asked = True
            self._send(signal.SIGTERM)

    def first(self) -> int:
        """The rank whose end ended the others; -1 if all ended well."""

        def order(end: _End) -> tuple[bool, int, float, int]:
            # A rank that is asked to end because another has failed dies of SIGTERM, or ends as if preempted; one that
            # is killed makes others fail at once.
            surest = {PREEMPTED: 2, -signal.SIGTERM: 3}.get(end.code, 0 if end.code in _KILLED else 1)
            return end.at > self.failed[0].at + _AT_ONCE_S, surest, end.at, end.rank

        return min(self.failed, key=order).rank if self.failed else -1

    def _look(self) -> bool:
        """Whether any still runs; those that do not are taken note of."""
        now = time.monotonic()
        for rank, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[rank]
                if code and not (self._killed and code == -signal.SIGKILL):  # our own kill tells nothing
                    self.failed.append(_End(rank, code, now))
        return bool(self.running)

    def _end_others(self) -> None:
        self.ask()
        until = time.monotonic() + _END_S
        while self._look() and time.monotonic() < until + _END_S:  # one that waits for a device may never go
            if time.monotonic() > until:
                self._killed = True
                self._send(signal.SIGKILL)
            time.sleep(_LOOK_S)

    def _send(self, number: int) -> None:
        for process in list(self.running.values()):
            process.send_signal(number)


def main() -> int:
    """Returns the exit code of the ranks (-N: signal N)."""
    text = sys.stdin.readline()
    if not text:  # the launcher has ended
        return 0
    order = json.loads(text)
    _quiet(Path(order["log"]))
    os.environ.update(order["env"])
    os.chdir(order["folder"])
    ranks = _Ranks()
    # Until all are started they wait for nothing, and have done nothing: the kernel ends them with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: end(-signal.SIGTERM))
    ranks.start(order)
    signal.signal(signal.SIGTERM, lambda number, frame: ranks.ask())
    ranks.wait()
    exits = {failed.rank: failed.code for failed in ranks.failed}
    file = Path(order["exits"])
    with suppress(OSError):  # on a full disk: how they ended is told by the exit code all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"first": ranks.first(), "exits": exits}) + "\n")
    return 0 if not exits else exits[ranks.first()]


def _quiet(log: Path) -> None:
    """What the agent itself says goes to `log`; nothing is read from the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 2)
    os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def end(code: int) -> Any:
    """End as a rank did: by its exit code, or of its signal."""
    sys.stdout.flush()
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank's own core dump is the one that tells
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    end(main())
