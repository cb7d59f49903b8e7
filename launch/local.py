"""A run on this machine: an agent with its ranks (`launch/agent.py`), started and, if it fails, started again.

    this process (light: it imports no torch)  ->  the agent  ->  the ranks

Each has the kernel kill it when the one before it is gone. The agent and its ranks are in a process group of their own,
so that Ctrl-C reaches this process alone, which asks the ranks once.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perilune.launch.job import BAD_INPUT, Job, JobError, Papers
from perilune.launch.judge import cause, exits_file
from perilune.launch.launchers import claimed, is_held
from perilune.launch.supervise import supervise

_GONE_S = 10.0  # killed processes are waited for this long
_TAIL = 15  # lines of a failed rank's log that are shown


def run(
    job: Job,
    to_stderr: bool = False,
    prepare_run: Callable[[], None] = lambda: None,
) -> int:
    """Run `job` on this machine, to its end; returns its exit code, as `supervise` says.

    `prepare_run` is called before it starts, once no other launch can have its folder.

    Rank 0 writes its stdout to this process's, or `to_stderr`; everything else goes to RUN/logs/rank_N.log. SIGTERM,
    SIGINT and SIGHUP are passed on once, and the ranks end with a checkpoint and 75; a second one ends them. A rank's
    failure is told by the last lines of its log; a user's error by its one line. Raises JobError where the run is under
    way already.
    """
    papers = Papers(job.run_dir)
    attempts: list[_Attempt] = []

    def start(number: int, nodes: int) -> _Attempt:
        del nodes
        attempts.append(_Attempt(job, papers, number, to_stderr))
        return attempts[-1]

    def say(text: str) -> None:
        # Nobody asked for restarts: the failed rank's own lines have said it all, but for a hang, which has none. Nor
        # is there more to say of what the user must change.
        last = attempts[-1] if attempts else None
        if last and (last.killed or (job.restarts and not last.refused())):
            print(f"perilune: {text}", file=sys.stderr, flush=True)

    with signals_that_ask() as asked:
        try:
            with claimed(papers):
                prepare_run()
                papers.write(job, where(job))
                return supervise(job, papers, start, available=lambda: 1, asked=lambda: len(asked), say=say)
        finally:
            for attempt in attempts:
                attempt.kill()


def describe(job: Job) -> str:
    """Exactly what `run` starts."""
    env = {**job.common_env(), **_placement(job)}
    last = job.nodes * job.procs_per_node - 1
    given = f"RANK and LOCAL_RANK 0{f' to {last}' if last else ''}, MASTER_PORT a free port, PERILUNE_ATTEMPT from 0"
    return "\n".join(
        [
            f"# {job.procs_per_node} processes on this machine, restarts: {job.restarts}",
            f"# in {job.folder}",
            *(f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())),
            f"# for each process: {given}",
            shlex.join(job.command),
            f"# logs: {papers_logs(job)}/rank_N.log",
        ]
    )


def papers_logs(job: Job) -> Path:
    """Where the ranks' logs go."""
    return Papers(job.run_dir).logs


def _placement(job: Job) -> dict[str, str]:
    """What a rank's environment has besides `common_env`, its rank and the port."""
    threads = job.threads or max(1, (os.cpu_count() or 1) // job.procs_per_node)
    found = {"OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(job.procs_per_node)}
    found["LOCAL_WORLD_SIZE"] = found["WORLD_SIZE"]
    found["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS", "ignore")
    if sys.platform.startswith("linux"):
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return {**found, **job.env}


def _agent(to_stderr: bool) -> subprocess.Popen[bytes]:
    """An agent that waits for its order on stdin. It ends by itself when this process does."""
    child = str(Path(__file__).with_name("child.py"))
    agent = [sys.executable, "-P", "-m", "perilune.launch.agent"]
    return subprocess.Popen(
        [sys.executable, "-S", "-P", child, str(os.getpid()), "-", "-", *agent],
        stdin=subprocess.PIPE,
        stdout=2 if to_stderr else None,
        start_new_session=True,
    )


class _Attempt:
    """An agent with its order, and its ranks. `launch/supervise.py` says what the methods are for."""

    def __init__(self, job: Job, papers: Papers, number: int, to_stderr: bool) -> None:
        self.code: int | None = None
        self.killed = False
        self._papers, self._agent, self._number = papers, _agent(to_stderr), number
        self._exits = exits_file(papers, number)
        self._ranks: dict[int, str] = {}  # process id -> when it started
        papers.logs.mkdir(parents=True, exist_ok=True)
        order = {
            "nproc": job.procs_per_node,
            "command": job.command,
            "env": {**job.common_env(), **_placement(job), "PERILUNE_ATTEMPT": str(number)},
            "stdout": "@",
            "logs": str(papers.logs),
            "log": str(papers.folder / "agent.log"),
            "exits": str(self._exits),
            "folder": str(job.folder),
        }
        stdin = self._agent.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.close()
        except OSError:  # it has ended: `poll` says how
            pass

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        for pid in _children(self._agent.pid):
            self._ranks.setdefault(pid, _started(pid))
        code = self._agent.poll()
        if code is not None:
            self._wait_for_ranks()
            self.code = code
            if code not in (0, 75) and not self.killed:
                self._tell(code)
        return self.code

    def stop(self) -> None:
        print("perilune: stopping after a checkpoint; asked again, it ends at once", file=sys.stderr, flush=True)
        if self._agent.poll() is None:
            self._agent.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.code is not None:
            return
        self.killed = True
        for pid in _children(self._agent.pid):
            self._ranks.setdefault(pid, _started(pid))
        self._agent.kill()  # its ranks follow it, the stopped ones too
        self._agent.wait()
        self.poll()

    def refused(self) -> bool:
        """Whether it ended for an error of the user's, which its one line has told."""
        found = cause(self._papers, self._number) if self.code == BAD_INPUT else None
        return self.code == BAD_INPUT and (found is None or found.kind == "bad_input")

    def _wait_for_ranks(self) -> None:
        """Until the kernel has ended those that the agent left, who may have been killed itself."""
        until = time.monotonic() + _GONE_S
        while time.monotonic() < until:
            left = [pid for pid, started in self._ranks.items() if started and _started(pid) == started]
            if not left:
                return
            time.sleep(0.02)

    def _tell(self, code: int) -> None:
        """The one line of an error of the user's, or the last lines of a failed rank's log."""
        try:
            first = int(json.loads(self._exits.read_text())["first"])
        except (OSError, ValueError, KeyError):
            log = self._papers.folder / "agent.log"
            print(f"perilune: the ranks' agent {ended(code)}; its log: {log}", file=sys.stderr, flush=True)
            return
        log = self._papers.logs / f"rank_{first}.log"
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        if code == 2 and lines:
            print(lines[-1], file=sys.stderr, flush=True)
            return
        print("\n".join(lines[-_TAIL:]), file=sys.stderr)
        print(f"perilune: rank {first} {ended(code)}; its log: {log}", file=sys.stderr, flush=True)


def ended(code: int) -> str:
    """`was killed by SIGKILL`, `ended with exit code 1`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


@contextmanager
def signals_that_ask() -> Iterator[list[int]]:
    """The signals that asked this process to stop, in the body."""
    found: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- a run of another process: `perilune jobs` --------------------------------------------------------------------


def where(job: Job) -> dict[str, Any]:
    """What is kept of this process, which runs `job`, to find it again."""
    pid = os.getpid()
    here = {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}
    return {"launcher": "local", **here, "run_dir": str(job.run_dir)}


def state(where: dict[str, Any]) -> str:
    """`running`, `ended`, or that it is on another machine, and runs there if it still holds its folder."""
    if where.get("host") != socket.gethostname():
        if is_held(Papers(Path(where.get("run_dir", "")))):
            return f"running on {where.get('host')}"
        return f"on {where.get('host')}, which cannot be asked from here"
    return "running" if _is_there(where) else "ended"


def cancel(where: dict[str, Any], now: bool) -> None:
    """Ask the launcher to end the run: with a checkpoint, or `now`. Raises JobError where it does not run here."""
    if state(where) != "running":
        raise JobError(f"the run does not run here: {state(where)}; there is nothing to cancel here")
    os.kill(where["pid"], signal.SIGTERM)
    if now:
        os.kill(where["pid"], signal.SIGINT)  # two of one kind could become one


def _is_there(where: dict[str, Any]) -> bool:
    """Whether that very process runs: a process id is used again, one with the time of its start in one boot is not."""
    return bool(where["started"]) and where.get("boot") == _boot() and _started(int(where["pid"])) == where["started"]


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; empty if there is none, or only what its parent has not read."""
    try:
        fields: Sequence[str] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
