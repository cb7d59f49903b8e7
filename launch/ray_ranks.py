"""The ranks of one attempt on a Ray cluster: an actor a node, in a placement group, that starts the node's processes.

Why not Ray Train's TorchTrainer: it calls the training function in a thread of its worker, after it has made a process
group. Both were tried (docs/launch/ray.md): signals cannot be caught there, so that a run could not end with a
checkpoint when it is asked to; the group has to be torn down before ours can be made; and a worker has no exit code of
its own, by which a bad input is told from a lost node. Actors leave `train` the program that it is everywhere else.

A rank ends with its actor (`launch/child.py`), an actor with the driver that owns it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perilune.launch.job import PREEMPTED, Job, JobError, Papers
from perilune.launch.judge import exits_file

_EVERY_S = 0.3  # between two questions to the nodes
_ANSWER_S = 30.0  # a node that does not answer for so long is lost
_GRACE_S = 15.0  # after one rank failed, the others have this long to notice and write why
_FAILED = (0, PREEMPTED)

Ends = dict[int, tuple[int, float]]  # rank -> exit code, seconds since the epoch when it was seen


def bundle(job: Job) -> dict[str, float]:
    """What one node gives: a CPU a process, and its GPU."""
    found = {"CPU": float(job.procs_per_node)}
    return found | ({"GPU": float(job.gpus_per_node)} if job.gpus_per_node else {})


def nodes_there(job: Job) -> int:
    """Living nodes that are large enough."""
    need = bundle(job)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(all(have.get(name, 0) >= much for name, much in need.items()) for have in alive)


class NodeRanks:
    """Actor: the processes of one node. Every method returns at once."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._ends: Ends = {}
        self._port: socket.socket | None = None  # the store's, on the first node

    def store(self) -> tuple[str, int]:
        """Take the port at which rank 0 serves the store (`parallel/store.py`), on this node's address alone.

        Rank 0 would open it on every interface, and one that was free a moment ago.
        """
        host = ray.util.get_node_ip_address()
        self._port = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._port.bind((host, 0))
        return host, int(self._port.getsockname()[1])

    def start(self, job_text: str, env: Mapping[str, str], first: int) -> None:
        """Start the ranks `first` and following."""
        job = Job.from_json(job_text)
        logs = Papers(job.run_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        child = str(Path(__file__).with_name("child.py"))
        threads = job.threads or max(1, (os.cpu_count() or 1) // job.procs_per_node)
        host = ray.util.get_node_ip_address()
        common = {name: value for name, value in os.environ.items() if name != "PERILUNE_STORE_FD"}
        common |= {"OMP_NUM_THREADS": str(threads), "PERILUNE_NODE_NAME": host}
        if host.startswith("127."):
            common.setdefault("GLOO_SOCKET_IFNAME", "lo")
        gpus = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
        for local in range(job.procs_per_node):
            rank = first + local
            log = str(logs / f"rank_{rank}.log")
            own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            if len(gpus) == job.procs_per_node:  # one process drives one GPU, and sees that one alone
                own |= {"CUDA_VISIBLE_DEVICES": gpus[local], "LOCAL_RANK": "0"}
            given = (self._port.fileno(),) if rank == 0 and self._port else ()
            if given:
                own |= {"PERILUNE_STORE_FD": str(given[0])}
            self._children[rank] = subprocess.Popen(
                [sys.executable, "-S", "-P", child, str(os.getpid()), log, log, *job.command],
                env={**common, **env, **own},
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=given,
            )
        if self._port:
            self._port.close()  # rank 0's alone: with it the store is gone, and nobody waits for it

    def ends(self) -> Ends:
        """The ranks that have ended."""
        for rank, child in self._children.items():
            if rank not in self._ends and child.poll() is not None:
                self._ends[rank] = (child.returncode, time.time())
        return self._ends

    def signal(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(number)


class RayAttempt:
    """One attempt; `launch/supervise.py` says what its methods are for. Raises JobError where no place is found."""

    def __init__(self, job: Job, papers: Papers, number: int, nodes: int) -> None:
        self._job, self._papers, self._number, self._nodes = job, papers, number, nodes
        self._ends: Ends = {}
        self._lost: dict[int, float] = {}  # node -> when
        self._killed = False
        self._code: int | None = None
        self._asked_at = 0.0
        self._group = placement_group([bundle(job)] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
        try:
            ray.get(self._group.ready(), timeout=job.start_s)
        except ray.exceptions.GetTimeoutError:
            remove_placement_group(self._group)
            raise JobError(
                f"the cluster gave no place for {nodes} nodes of {bundle(job)} in {job.start_s:.0f} s "
                "(--start-within): is it busy? `ray status` shows it"
            ) from None
        self._actors: list[Any] = []
        self._pending: list[Any] = [None] * nodes
        try:
            self._begin()
        except ray.exceptions.RayTaskError as error:  # the node is there, and says why: it would say so again
            self._release()
            why = " ".join(str(error.cause).split())
            raise JobError(
                f"a node cannot start its processes: {type(error.cause).__name__}: {why}; every node needs the folder "
                f"{job.folder}, the run directory and {job.program[0]} at the same paths"
            ) from None
        except ray.exceptions.RayError as error:  # a node, or its actor, was lost meanwhile: as in any attempt
            said = " ".join(str(error).split())[:300]
            print(f"perilune: attempt {number} has not begun: {type(error).__name__}: {said}", file=sys.stderr)
            self._code = -signal.SIGKILL
            self._release()

    def _begin(self) -> None:
        """Start an actor on each node, and the ranks by them."""
        job, nodes = self._job, self._nodes
        actor = ray.remote(NodeRanks)
        self._actors = [
            actor.options(
                num_cpus=job.procs_per_node,
                num_gpus=job.gpus_per_node,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
            ).remote()
            for index in range(nodes)
        ]
        host, port = ray.get(self._actors[0].store.remote(), timeout=job.start_s)
        world = nodes * job.procs_per_node
        env = {
            **job.common_env(),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(job.procs_per_node),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins the store, and begins none
            "TORCHELASTIC_RESTART_COUNT": "0",
            "PERILUNE_ATTEMPT": str(self._number),
        }
        text = job.to_json()
        ray.get(
            [a.start.remote(text, env, i * job.procs_per_node) for i, a in enumerate(self._actors)], timeout=job.start_s
        )

    def poll(self) -> int | None:
        if self._code is None:
            self._look()
            self._code = self._verdict()
            if self._code is not None:
                self._record()
                self._release()
        return self._code

    def stop(self) -> None:
        for actor in self._actors:
            actor.signal.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        if self._code is not None:
            return
        self._killed = True
        self._code = -signal.SIGKILL
        self._release()

    def _look(self) -> None:
        """Ask every node that is there, and take the answers that have come."""
        now = time.monotonic()
        if now - self._asked_at < _EVERY_S:
            return
        self._asked_at = now
        for index, actor in enumerate(self._actors):
            if index in self._lost:
                continue
            if self._pending[index] is None:
                self._pending[index] = (actor.ends.remote(), now)
            ref, since = self._pending[index]
            ready, _ = ray.wait([ref], timeout=0)
            if not ready:
                if now - since > _ANSWER_S:
                    self._lost[index] = time.time()
                continue
            self._pending[index] = None
            try:
                self._ends |= ray.get(ref)
            except ray.exceptions.RayError:  # the actor, or its node, is gone, and its ranks with it
                self._lost[index] = time.time()

    def _verdict(self) -> int | None:
        """The attempt's exit code, once it has ended."""
        per = self._job.procs_per_node
        for index, when in self._lost.items():
            for rank in range(index * per, (index + 1) * per):
                self._ends.setdefault(rank, (-signal.SIGKILL, when))
        failed = [(when, rank, code) for rank, (code, when) in self._ends.items() if code not in _FAILED]
        everybody = len(self._ends) == self._nodes * per
        if failed:
            when, _, code = min(failed)
            return code if everybody or time.time() - when > _GRACE_S else None
        if not everybody:
            return None
        return PREEMPTED if any(code for code, _ in self._ends.values()) else 0

    def _record(self) -> None:
        """For the judgement: which rank ended first, and how."""
        failed = [(when, rank) for rank, (code, when) in self._ends.items() if code not in _FAILED]
        exits = {str(rank): code for rank, (code, _) in self._ends.items() if code}
        file = exits_file(self._papers, self._number)
        with suppress(OSError):  # on a full disk: the judgement does without
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"first": min(failed)[1] if failed else None, "exits": exits}))

    def _release(self) -> None:
        """The actors' end is the end of their ranks."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self._group)
