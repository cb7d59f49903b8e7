"""The processes of one attempt on this machine, under torchrun's elastic agent used as a library.

    python -m perilune.launch.agent     its order, one JSON object, comes by stdin once torch is imported

It ends as its ranks did: exit code 0, 75, 2 or another, or by the signal that killed the first of them. What is not as
under `torchrun`, and why:

- Its store listens on loopback alone: the agent's own rendezvous listens on every interface. The ranks use this store,
  so that no port is free when it is looked for and taken when it is used.
- SIGTERM is passed on, and the agent goes on waiting: its own handler ends every rank by SIGKILL after 30 s, be it in
  the middle of writing a checkpoint.
- A rank starts by `launch/child.py`, without which it outlives a killed agent; and its log is appended to, where the
  agent would begin it anew at each attempt.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from perilune.launch.job import PREEMPTED

LOOPBACK = "127.0.0.1"


class _OneNode(RendezvousHandler):
    """A rendezvous of one: no other node is waited for, and none can come."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._listening = socket.create_server((LOOPBACK, 0), backlog=4096)
        port = self._listening.getsockname()[1]
        self._store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=600),
            master_listen_fd=self._listening.fileno(),
        )
        self._listening.detach()  # the store's now
        self._at = RendezvousStoreInfo(LOOPBACK, port)

    def get_backend(self) -> str:
        return "perilune-one-node"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, self._at)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class _LogsElsewhere(LogsSpecs):
    """`launch/child.py` opens the logs, to append to them."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = {rank: "" for rank in envs}
        return LogsDest(dict(nowhere), dict(nowhere), {}, {}, dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


def main() -> int:
    """Returns the exit code of the ranks (-N: signal N)."""
    text = sys.stdin.readline()
    if not text:  # the launcher found the run wanting
        return 0
    order = json.loads(text)
    _quiet(Path(order["log"]))
    os.environ.update(order["env"])
    os.chdir(order["folder"])
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGUSR2"  # not SIGTERM, see above; none at all cannot be said
    child = str(Path(__file__).with_name("child.py"))
    # One argument list for all ranks, in which the agent replaces ${local_rank}, and $$ by $.
    logs = Path(order["logs"])
    words = [str(os.getpid()), order["stdout"], str(logs / "rank_@.log"), *order["command"]]
    words = [word.replace("$", "$$") for word in words]
    words[2] = words[2].replace("rank_@.log", "rank_${local_rank}.log")
    spec = WorkerSpec(
        role="perilune",
        local_world_size=order["nproc"],
        entrypoint=sys.executable,
        args=("-S", "-P", child, *words),
        rdzv_handler=_OneNode(order["name"]),
        max_restarts=0,  # launch/supervise.py restarts: it knows why an attempt ended
        monitor_interval=0.1,
        local_addr=LOOPBACK,
    )
    agent = LocalElasticAgent(spec, _LogsElsewhere())
    signal.signal(signal.SIGTERM, lambda number, frame: _pass_on(agent))
    result = agent.run()
    exits = {rank: failure.exitcode for rank, failure in result.failures.items()}
    file = Path(order["exits"])
    with suppress(OSError):  # on a full disk: how they ended is told by the exit code all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"first": _first(result), "exits": exits}) + "\n")
    return 0 if not exits else exits[_first(result)]


def _first(result: RunResult) -> int:
    """The rank whose end ended the others; -1 if all ended well."""

    def order(rank: int) -> tuple[int, int, int]:
        failure = result.failures[rank]
        code = failure.exitcode
        # A rank that is asked to end because another has failed dies of SIGTERM, or ends as if preempted; one that is
        # killed makes others fail within the second.
        surest = 0 if code < 0 and code != -signal.SIGTERM else 2 if code == PREEMPTED else 3 if code < 0 else 1
        return failure.timestamp, surest, rank

    return min(result.failures, key=order, default=-1)


def _pass_on(agent: LocalElasticAgent) -> None:
    """Ask every rank that still runs to end with a checkpoint."""
    if all(worker.id is None for worker in agent.get_worker_group().workers):
        end(-signal.SIGTERM)  # they are just being started, and have done nothing: the kernel ends them
    for worker in agent.get_worker_group().workers:
        pid = worker.id
        if isinstance(pid, int) and _is_child(pid):
            os.kill(pid, signal.SIGTERM)


def _is_child(pid: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    except (OSError, IndexError, ValueError):
        return not sys.platform.startswith("linux")


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
    os._exit(code)  # not through the store's and the agent's destructors, which have nothing left to do


if __name__ == "__main__":
    end(main())
