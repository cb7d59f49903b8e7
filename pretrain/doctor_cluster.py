"""`perilune doctor --cluster`: the nodes of an allocation, measured beside one another, by every process of it.

    rendezvous -> who is here -> matrix products -> disk -> clocks -> within each node -> each pair of nodes -> verdict

Control goes by the store alone (keys of one TCPStore), so that what is measured may fail: a measurement runs in a
thread that is given up after `MEASURE_S`, and a process that says nothing for `MEASURE_S + GRACE_S` is named, not
waited for. Groups of processes are made for one measurement each; no group of all is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from perilune.parallel import store as rendezvous
from perilune.pretrain.doctor_node import (
    device_of,
    disk_rate,
    facts,
    marker,
    matmul_rate,
    node_name,
    run_folder,
    settle,
)
from perilune.pretrain.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from perilune.pretrain.doctor_cluster_report import Cluster

OPERATION_S = 10.0  # one group of processes comes together, one collective ends
MEASURE_S = 20.0  # one measurement of one process
GRACE_S = 5.0  # its report, then
REPEATS = 5
CPU_BYTES, GPU_BYTES = 4 << 20, 256 << 20  # of one collective, a process
PINGS = 10
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Silent(Exception):
    """Processes that did not answer in time."""

    def __init__(self, stage: str, ranks: list[int]) -> None:
        super().__init__(f"{stage}: nothing from rank {', '.join(map(str, ranks))}")
        self.stage, self.ranks = stage, ranks


def main(as_json: bool, within: float = 120.0, below: float = 0.7) -> int:
    """Run in every process of an allocation; its leader, the lowest rank that came, prints. Returns the exit code.

    `within`: seconds that a process is waited for; `below`: the part of what is usual under which one is a straggler.
    The exit code is the same in all: 1 if any check failed. Raises InputError outside of an allocation.
    """
    rank, world = _place()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # a link that does not answer is reported, not aborted upon
    try:
        store = _store(rank, world, within)
    except (RuntimeError, OSError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(
            f"doctor: rank {rank} on {node_name()} found nobody at {address} in {within:g} s: rank 0 has not come, or "
            f"cannot be reached from here; look at its log, and whether that port is open between the nodes "
            f"({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    process = _Process(store, rank, world)
    try:
        code = process.examine(as_json, within, below)
    except (RuntimeError, OSError) as error:  # of the store: whoever serves it is gone
        print(f"doctor: rank {rank} on {node_name()}: the store no longer answers: {error}", file=sys.stderr)
        code = 1
    if process.given_up:  # threads that hang would be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def rounds(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `nodes` once, in rounds of disjoint pairs: `nodes` - 1 of them, or `nodes` if that is odd."""
    ring: list[int] = [*range(nodes), *([-1] if nodes % 2 else [])]  # -1: whoever meets it has a rest
    half = len(ring) // 2
    for _ in range(len(ring) - 1):
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _place() -> tuple[int, int]:
    """(rank, world) of the environment."""
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"doctor --cluster runs in every process of an allocation, and {', '.join(missing)} is not set here; start "
            "it by `perilune launch slurm --nodes 4 --gpus-per-node 8 -- doctor --cluster`, or `launch ray`, `launch "
            "local --nproc 4`, or by torchrun"
        )
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world:
            raise ValueError
        int(os.environ["MASTER_PORT"])
    except ValueError:
        said = ", ".join(f"{name}={os.environ[name]}" for name in NEEDED)
        raise InputError(f"{said}: RANK is a number below WORLD_SIZE, MASTER_PORT a number") from None
    return rank, world


def _store(rank: int, world: int, within: float) -> Store:
    """The store of whoever launched, or one of our own, served by rank 0."""
    from torch.distributed import PrefixStore, TCPStore

    rendezvous.serve(within)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=within)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves and socket.gethostbyname(host).startswith("127."):  # else the store would listen on every interface
        listening = socket.create_server((host, port), backlog=4096)
        store = TCPStore(
            host, port, world, True, timeout=limit, wait_for_workers=False, master_listen_fd=listening.detach()
        )
    else:
        store = TCPStore(host, port, world, serves, timeout=limit, wait_for_workers=False)
    return PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@dataclass(frozen=True)
class _Plan:
    """What the leader makes of those who came."""

    nodes: list[str]
    ranks: list[list[int]]  # of each node
    nccl: bool

    def node_of(self, rank: int) -> int:
        return next(i for i, ranks in enumerate(self.ranks) if rank in ranks)


class _Process:
    """One of the processes that examine their cluster together."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.leader = 0
        self.given_up = False  # a measurement is still on its way
        self._said = ""
        self._groups: list[Any] = []  # kept until all have done with them: a closed one disturbs the slower

    # ------------------------------------------------------------ control

    def examine(self, as_json: bool, within: float, below: float) -> int:
        """Every stage, and the verdict; returns the exit code."""
        from perilune.pretrain.doctor_cluster_report import Cluster, show

        missing = self._roll(within)
        present = [rank for rank in range(self.world) if rank not in missing]
        if self.rank in missing:
            print(f"doctor: rank {self.rank} came after {within:g} s, when the others had gone", file=sys.stderr)
            return 1
        self.leader = present[0]
        found = self._read("here", present)
        cluster = Cluster(self.world, below, within, dict(zip(present, found, strict=True)))
        if missing:
            cluster.silent, cluster.silent_in = missing, "start"
        else:
            try:
                self._measure(cluster)
            except Silent as silent:
                cluster.silent, cluster.silent_in = silent.ranks, silent.stage
        if self.rank != self.leader:
            return self._await_verdict()
        failed = show(cluster, as_json)
        self.store.set("verdict", "1" if failed else "0")
        self._serve_until_read(len(set(present) - set(cluster.silent)) - 1)
        return 1 if failed else 0

    def _roll(self, within: float) -> list[int]:
        """Ranks that have not come `within` seconds, as whoever decides it first says: all go by that."""
        keys = [f"here/{rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], json.dumps(facts()))
        with contextlib.suppress(RuntimeError):  # in time, or not
            self.store.wait(keys, timedelta(seconds=within))
        missing = self._absent(keys)
        decided: list[int] = json.loads(self.store.compare_set("roll", "", json.dumps(missing)))
        return decided

    def _absent(self, keys: list[str], first: int = 0) -> list[int]:
        """Numbers of the keys that are not there, from `first` on; by halves, as thousands of keys are mostly there."""
        if self.store.check(keys):
            return []
        if len(keys) == 1:
            return [first]
        half = len(keys) // 2
        return [*self._absent(keys[:half], first), *self._absent(keys[half:], first + half)]

    def _read(self, stage: str, ranks: list[int]) -> list[Any]:
        return [json.loads(text) for text in self.store.multi_get([f"{stage}/{rank}" for rank in ranks])]

    def stage[T](self, stage: str, measure: Callable[[], T] | None) -> list[Any]:
        """What every rank measured, on the leader, None for those without a part in it; raises Silent on all.

        A measurement that fails or hangs is {"error": text}.
        """
        if self.rank == self.leader and (name := stage.partition("/")[0]) != self._said:
            print(f"doctor: {name}", file=sys.stderr, flush=True)
            self._said = name
        value: Any = None if measure is None else self._within(measure)
        limit = MEASURE_S + GRACE_S
        self.store.set(f"{stage}/{self.rank}", json.dumps(value))
        values: list[Any] = []
        if self.rank == self.leader:
            keys = [f"{stage}/{rank}" for rank in range(self.world)]
            with contextlib.suppress(RuntimeError):
                self.store.wait(keys, timedelta(seconds=limit))
            silent = self._absent(keys)
            self.store.set(f"{stage}/done", json.dumps(silent))
            values = [] if silent else self._read(stage, list(range(self.world)))
        else:
            try:
                self.store.wait([f"{stage}/done"], timedelta(seconds=limit + GRACE_S))
            except RuntimeError:
                raise Silent(stage, [self.leader]) from None
            silent = json.loads(self.store.get(f"{stage}/done"))
        self._groups.clear()
        if silent:
            raise Silent(stage.partition("/")[0], silent)
        return values

    def _within(self, measure: Callable[[], Any]) -> Any:
        box: list[Any] = []

        def call() -> None:
            try:
                box.append(measure())
            except Exception as error:  # whatever it is, it is a finding
                box.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(MEASURE_S)
        if not box:
            self.given_up = True
            return {"error": f"no end in {MEASURE_S:g} s"}
        return box[0]

    def _await_verdict(self) -> int:
        try:
            self.store.wait(["verdict"], timedelta(seconds=MEASURE_S + GRACE_S))
            code = int(self.store.get("verdict"))
            self.store.add("read", 1)
            return code
        except RuntimeError:
            print(f"doctor: rank {self.leader}, which judges, does not answer", file=sys.stderr)
            return 1

    def _serve_until_read(self, others: int) -> None:
        """The store may end with this process."""
        until = time.monotonic() + GRACE_S
        while self.store.add("read", 0) < others and time.monotonic() < until:
            time.sleep(0.02)

    # ------------------------------------------------------------ stages

    def _measure(self, cluster: Cluster) -> None:
        plan = plan_of(cluster.here)
        mine = plan.node_of(self.rank)
        first = self.rank == plan.ranks[mine][0]
        device = device_of(plan.nccl)
        cluster.nccl = plan.nccl
        token = self._token()
        if self.rank == self.leader:
            ranks = f"{self.world} processes on {len(plan.nodes)} node{'s' if len(plan.nodes) > 1 else ''}"
            print(f"doctor: {ranks}, {'NCCL' if plan.nccl else 'gloo on the CPU'}", file=sys.stderr, flush=True)
        self.stage("begin", None)  # all start the next one together
        cluster.matmul = self.stage("matmul", partial(matmul_rate, device))
        cluster.disk = self.stage("disk", partial(disk_rate, self.rank, token) if first else None)
        if self.rank == self.leader:
            marker(token).unlink(missing_ok=True)
        for node in range(len(plan.nodes)):
            if node != plan.node_of(self.leader):
                other = plan.ranks[node][0]
                part = self.rank in (self.leader, other)
                values = self.stage(f"clock/{node}", partial(self._clock, other) if part else None)
                if values:
                    cluster.clock[node] = values[self.leader]
        inside = partial(self._bandwidth, "node", plan.ranks[mine], device)
        cluster.within_node = self.stage("node", inside if len(plan.ranks[mine]) > 1 else None)
        for number, pairs in enumerate(rounds(len(plan.nodes)) if len(plan.nodes) > 1 else []):
            pair = next((pair for pair in pairs if mine in pair), None)
            members = [] if pair is None else [*plan.ranks[pair[0]], *plan.ranks[pair[1]]]
            beside = partial(self._bandwidth, f"pairs/{number}", members, device)
            values = self.stage(f"pairs/{number}", beside if members else None)
            if values:
                for a, b in pairs:
                    cluster.pairs[a, b] = slowest([values[rank] for rank in [*plan.ranks[a], *plan.ranks[b]]])

    def _token(self) -> str:
        """A name of a file that the leader has put into the run directory: is it there for all?"""
        if self.rank == self.leader:
            token = os.urandom(8).hex()
            with contextlib.suppress(OSError):  # its own measurement of the disk will say so
                run_folder().mkdir(parents=True, exist_ok=True)
                marker(token).touch()
            self.store.set("token", token)
        self.store.wait(["token"], timedelta(seconds=MEASURE_S))
        return self.store.get("token").decode()

    def _group(self, name: str, members: list[int], device: torch.device) -> Any:
        """A group of `members` over the store, in the order given."""
        import torch.distributed as dist

        store = dist.PrefixStore(f"group/{name}", self.store)
        place, limit = members.index(self.rank), timedelta(seconds=OPERATION_S)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group: Any = dist.ProcessGroupNCCL(store, place, len(members), options)
        else:
            group = dist.ProcessGroupGloo(store, place, len(members), limit)
        self._groups.append(group)
        return group

    def _bandwidth(self, name: str, members: list[int], device: torch.device) -> dict[str, float]:
        """Bytes a second, a process, as NCCL's tests count (bus bandwidth): the best of `REPEATS`."""
        import torch
        from torch.distributed import AllreduceOptions, AllToAllOptions

        group, many = self._group(f"{name}/{members[0]}", members, device), len(members)
        size = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4 // many * many
        sent, received = torch.ones(size, device=device), torch.empty(size, device=device)

        def all_reduce() -> None:
            group.allreduce([received], AllreduceOptions()).wait()

        def all_to_all() -> None:
            group.alltoall_base(received, sent, [], [], AllToAllOptions()).wait()

        found = {}
        for label, act, share in (("all_reduce", all_reduce, 2), ("all_to_all", all_to_all, 1)):
            times = []
            for _ in range(1 + REPEATS):  # the first one connects
                received.fill_(1)
                settle(device)
                start = time.perf_counter()
                act()
                settle(device)
                times.append(time.perf_counter() - start)
            found[label] = share * (many - 1) / many * size * 4 / min(times[1:])
        return found

    def _clock(self, other: int) -> dict[str, float]:
        """Seconds by which `other`'s clock is ahead of the leader's, and by how much that may be wrong."""
        import torch

        cpu = torch.device("cpu")
        group = self._group(f"clock/{other}", [self.leader, other], cpu)
        best = (float("inf"), 0.0)
        clock = torch.zeros(1, dtype=torch.float64)
        for ping in range(PINGS):
            if self.rank == other:
                group.recv([clock], 0, ping).wait()
                clock[0] = time.time()
                group.send([clock], 0, ping).wait()
            else:
                start, mono = time.time(), time.monotonic()
                group.send([clock], 1, ping).wait()
                group.recv([clock], 1, ping).wait()
                taken = time.monotonic() - mono
                best = min(best, (taken, clock.item() - (start + taken / 2)))
        return {"ahead_s": best[1], "error_s": best[0] / 2}


def plan_of(here: dict[int, Any]) -> _Plan:
    """Nodes in the order of their lowest ranks. NCCL where every process has a GPU of its own."""
    nodes: dict[str, list[int]] = {}
    for rank in sorted(here):
        nodes.setdefault(here[rank]["node"], []).append(rank)
    return _Plan(list(nodes), list(nodes.values()), all(found["has_gpu"] for found in here.values()))


def slowest(values: list[Any]) -> dict[str, Any]:
    """Of one group's processes: the bandwidth of the slowest, or the first error."""
    wrong = [value["error"] for value in values if "error" in value]
    return {"error": wrong[0]} if wrong else {name: min(value[name] for value in values) for name in values[0]}
