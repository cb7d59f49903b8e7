"""What the processes of `perilune doctor --cluster` measured, judged and printed: by the leader alone.

The rule for stragglers is one for all that is measured: below `below` (0.7) of the median of all of a kind; of two,
below that part of the better one, as two have no usual.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from perilune.pretrain.doctor_cluster import plan_of

JSON_VERSION = 1  # of the structure that --json prints; keys are only ever added under one number
SKEW_S = 1.0  # clocks further apart than this make logs and the times of files tell stories
SLOW_SYNC_S = 0.5  # a sync of 4 KiB; a checkpoint makes one a file
WIDEST = 64  # nodes, or blocks of nodes, in a line of the heat map
SHADES = " ░▒▓█"
ADVICE = {
    "start": "look at that rank's own log; the node may be down, or the launcher could not start it there",
    "silent": "look at that node's system log and disk; leave it out (--exclude) until it answers",
    "versions": "give every node the same image or environment; train starts no run worth having on two of them",
    "folder": "name a --run on a disk that every node mounts at the same path: checkpoints are written by all",
    "disk": "check the mount and what else writes to it; checkpoints are as slow as the slowest node's disk",
    "clock": "let chrony or ntpd run on that node",
    "matmul": "look there for other processes, a power or heat limit, fewer cores or threads (OMP_NUM_THREADS)",
    "within node": "compare `nvidia-smi topo -m` and NVLink's state with another node's; on a CPU, what else runs",
    "pairs": "check cable, port and interface of that node (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); leave it out until then",
}


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong."""

    check: str
    found: str
    advice: str


@dataclass
class Cluster:
    """All that the leader was told. A measurement that failed is {"error": text}; None is no part in it."""

    world: int
    below: float
    within: float
    here: dict[int, Any]  # rank -> `facts`
    nccl: bool = False
    silent: list[int] = field(default_factory=list)  # ranks that did not come, or stopped answering
    silent_in: str = ""
    matmul: list[Any] = field(default_factory=list)  # FLOP/s by rank
    disk: list[Any] = field(default_factory=list)  # by rank
    clock: dict[int, Any] = field(default_factory=dict)  # by node, but the leader's
    within_node: list[Any] = field(default_factory=list)  # bytes/s by rank
    pairs: dict[tuple[int, int], Any] = field(default_factory=dict)  # bytes/s by pair of nodes

    def __post_init__(self) -> None:
        """Work out the nodes of those who came."""
        plan = plan_of(self.here)
        self.nodes, self.ranks = plan.nodes, plan.ranks

    def name(self, rank: int) -> str:
        """`rank 3 (node b)`"""
        return f"rank {rank} ({self.here[rank]['node']})" if rank in self.here else f"rank {rank}"

    def by_node(self, values: list[Any]) -> dict[str, Any]:
        """The values of each node's first rank."""
        return {n: values[r[0]] for n, r in zip(self.nodes, self.ranks, strict=True) if values and values[r[0]]}


def judge(cluster: Cluster) -> list[Failure]:
    """Everything that is wrong, the gravest first."""
    return [
        *_silent(cluster),
        *_versions(cluster),
        *_disks(cluster),
        *_clocks(cluster),
        *_slow("matmul", {cluster.name(r): v for r, v in enumerate(cluster.matmul)}, cluster.below, 1e9, "GFLOP/s"),
        *_bandwidths(cluster),
    ]


def usual(values: list[float]) -> float:
    """What a straggler is measured by: the median; of two the better, as two have no usual."""
    return max(values) if len(values) < 3 else statistics.median(values)


def _slow(check: str, values: dict[str, Any], below: float, unit: float, name: str) -> list[Failure]:
    """Those that failed, and those below `below` of what is usual."""
    wrong = {who: value["error"] for who, value in values.items() if isinstance(value, dict)}
    found = [Failure(check, f"{who}: {error}", ADVICE[check]) for who, error in wrong.items()]
    rates = {who: value for who, value in values.items() if who not in wrong}
    if len(rates) < 2:
        return found
    norm = usual(list(rates.values()))
    what = "the median" if len(rates) > 2 else "the better of two"
    return found + [
        Failure(
            check, f"{who}: {rate / unit:.3g} {name}, {rate / norm:.0%} of {what} ({norm / unit:.3g})", ADVICE[check]
        )
        for who, rate in rates.items()
        if rate < below * norm
    ]


def _silent(cluster: Cluster) -> list[Failure]:
    if not cluster.silent:
        return []
    who = ", ".join(cluster.name(rank) for rank in cluster.silent)
    if cluster.silent_in == "start":
        text = f"{who}: not here {cluster.within:g} s after the others; {len(cluster.here)} of {cluster.world} came"
        return [Failure("start", text, ADVICE["start"])]
    return [Failure("silent", f"{who}: no answer in `{cluster.silent_in}`; what follows it is not measured",
                    ADVICE["silent"])]  # fmt: skip


def _versions(cluster: Cluster) -> list[Failure]:
    """Whatever is not as most have it, with the ranks that differ; folders too."""
    found = []
    for key in dict.fromkeys(key for facts in cluster.here.values() for key in facts["versions"]):
        values = {rank: facts["versions"].get(key) for rank, facts in cluster.here.items()}
        if text := _odd(cluster, key, values):
            found.append(Failure("versions", text, ADVICE["versions"]))
    if text := _odd(cluster, "run directory", {rank: facts["folder"] for rank, facts in cluster.here.items()}):
        found.append(Failure("folder", text, ADVICE["folder"]))
    return found


def _odd(cluster: Cluster, key: str, values: dict[int, Any]) -> str:
    (most, _), *others = Counter(values.values()).most_common()
    if not others:
        return ""
    parts = []
    for value, _ in others:
        ranks = [rank for rank, own in values.items() if own == value]
        hosts = ", ".join(dict.fromkeys(cluster.here[rank]["node"] for rank in ranks))
        listed = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        parts.append(f"{value or 'none'} on rank {listed} ({hosts})")
    return f"{key}: {'; '.join(parts)}; {most or 'none'} elsewhere"


def _disks(cluster: Cluster) -> list[Failure]:
    disks = cluster.by_node(cluster.disk)
    fine = {node: disk for node, disk in disks.items() if "error" not in disk}
    found = [
        Failure("folder", f"{node}: the run directory of {cluster.name(min(cluster.here))} is another one",
                ADVICE["folder"])
        for node, disk in fine.items() if not disk["shared"]
    ]  # fmt: skip
    rates = {node: disk if "error" in disk else disk["write"] for node, disk in disks.items()}
    found += _slow("disk", rates, cluster.below, 1e6, "MB/s")
    found += [
        Failure("disk", f"{node}: a sync of 4 KiB takes {disk['sync_s'] * 1e3:.0f} ms", ADVICE["disk"])
        for node, disk in fine.items()
        if disk["sync_s"] > SLOW_SYNC_S
    ]
    return found


def _clocks(cluster: Cluster) -> list[Failure]:
    found = []
    for node, clock in cluster.clock.items():
        if "error" in clock:
            found.append(Failure("pairs", f"{cluster.nodes[node]}, clock: {clock['error']}", ADVICE["pairs"]))
        elif abs(clock["ahead_s"]) - clock["error_s"] > SKEW_S:
            text = f"{cluster.nodes[node]}: its clock is {clock['ahead_s']:+.2f} s from that of {cluster.nodes[0]}"
            found.append(Failure("clock", text, ADVICE["clock"]))
    return found


def _bandwidths(cluster: Cluster) -> list[Failure]:
    found, inside = [], _inside(cluster)
    for kind in ("all_reduce", "all_to_all"):
        rates = {node: value if "error" in value else value[kind] for node, value in inside.items()}
        found += _slow("within node", rates, cluster.below, 1e9, f"GB/s {kind}")
        names = {
            f"{cluster.nodes[a]} - {cluster.nodes[b]}": value if "error" in value else value[kind]
            for (a, b), value in cluster.pairs.items()
        }
        found += _slow("pairs", names, cluster.below, 1e9, f"GB/s {kind}")
    return list(dict.fromkeys(found))  # an error is one of both kinds


def _inside(cluster: Cluster) -> dict[str, Any]:
    from perilune.pretrain.doctor_cluster import slowest

    found = {}
    for node, ranks in zip(cluster.nodes, cluster.ranks, strict=True):
        values = [cluster.within_node[rank] for rank in ranks] if cluster.within_node else []
        if values and all(values):
            found[node] = slowest(values)
    return found


# ---------------------------------------------------------------- printing


def show(cluster: Cluster, as_json: bool) -> bool:
    """Print it on stdout; whether anything failed."""
    failures = judge(cluster)
    if as_json:
        print(json.dumps(to_dict(cluster, failures), indent=2), flush=True)
    elif sys.stdout.isatty():
        _print_tables(cluster, failures)
    else:
        _print_plain(cluster, failures)
    return bool(failures)


def to_dict(cluster: Cluster, failures: list[Failure]) -> dict[str, Any]:
    """What --json prints. Rates in FLOP/s and bytes/s."""
    return {
        "doctor_cluster": JSON_VERSION,
        "ok": not failures,
        "world": cluster.world,
        "backend": "nccl" if cluster.nccl else "gloo",
        "nodes": dict(zip(cluster.nodes, cluster.ranks, strict=True)),
        "ranks": cluster.here,
        "silent": cluster.silent,
        "below": cluster.below,
        "matmul": cluster.matmul,
        "disk": cluster.by_node(cluster.disk),
        "clock": {cluster.nodes[node]: value for node, value in cluster.clock.items()},
        "within_node": _inside(cluster),
        "pairs": [
            {"nodes": [cluster.nodes[i] for i in pair], **value} for pair, value in sorted(cluster.pairs.items())
        ],
        "failures": [vars(failure) for failure in failures],
    }


def rows(cluster: Cluster) -> list[list[str]]:
    """A line a node: name, ranks, matrix products of its slowest rank, disk, clock, bandwidths within."""
    disks, inside, table = cluster.by_node(cluster.disk), _inside(cluster), []
    for i, (node, ranks) in enumerate(zip(cluster.nodes, cluster.ranks, strict=True)):
        rates = [rate for rank in ranks if cluster.matmul and isinstance(rate := cluster.matmul[rank], float)]
        disk, clock, own = disks.get(node, {}), cluster.clock.get(i, {}), inside.get(node, {})
        table.append(
            [
                node,
                f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
                f"{min(rates) / 1e9:.3g}" if rates else "-",
                f"{disk['write'] / 1e6:.0f}" if "write" in disk else "-",
                f"{disk['sync_s'] * 1e3:.2g}" if "write" in disk else "-",
                f"{clock['ahead_s'] * 1e3:+.2f}±{clock['error_s'] * 1e3:.2f}" if "ahead_s" in clock else "-",
                *(f"{own[kind] / 1e9:.3g}" if kind in own else "-" for kind in ("all_reduce", "all_to_all")),
            ]
        )
    return table


HEADINGS = (
    "node",
    "ranks",
    "GFLOP/s, slowest",
    "write MB/s",
    "sync ms",
    "clock ms",
    "all-reduce GB/s",
    "all-to-all GB/s",
)


def heat_map(cluster: Cluster, kind: str) -> list[str]:
    """Bandwidth of each pair of nodes beside the best pair's, as a picture; a cell of several nodes shows the worst."""
    rates = {pair: 0.0 if "error" in value else value[kind] for pair, value in cluster.pairs.items()}
    if not rates:
        return []
    block = -(-len(cluster.nodes) // WIDEST)
    best, cells = max(rates.values()), -(-len(cluster.nodes) // block)
    worst: dict[tuple[int, int], float] = {}
    for (a, b), rate in rates.items():
        for cell in ((a // block, b // block), (b // block, a // block)):
            worst[cell] = min(worst.get(cell, rate), rate)
    lines = [f"{kind.replace('_', '-')} of each pair of nodes, GB/s a process (best {best / 1e9:.3g}); " + (
        f"a cell is {block} nodes, its worst pair" if block > 1 else "in the order of the table")]  # fmt: skip
    for row in range(cells):
        marks = ""
        for column in range(cells):
            rate = worst.get((row, column))
            part = -1.0 if rate is None else rate / best if best else 0.0
            marks += "·" if part < 0 else "x" if part == 0 else SHADES[min(4, int(part * 5))]
        known = [worst[row, column] for column in range(cells) if (row, column) in worst]
        lines.append(f"{row * block:>5} {marks}  {min(known) / 1e9:.3g} to {max(known) / 1e9:.3g}")
    return [*lines, "      x failed, blank below 20% of the best, then ░ ▒ ▓ and █ from 80%"]


def remarks(cluster: Cluster) -> list[str]:
    """The rule, and where there is nothing to compare with."""
    lines = [f"A straggler is below {cluster.below:.0%} of the median; of two, of the better one."]
    if len(cluster.nodes) == 1:
        lines.append("One node: there is none to compare with it, and no pair.")
    elif len(cluster.nodes) == 2:
        lines.append("Two nodes: of two the better one is the measure, and their pair has none beside it.")
    return lines


def _verdict(cluster: Cluster, failures: list[Failure]) -> str:
    if not failures:
        nodes = f"{len(cluster.nodes)} node{'s' if len(cluster.nodes) > 1 else ''}"
        return f"All {cluster.world} processes on {nodes} are as they should be."
    return f"{len(failures)} thing{'s are' if len(failures) > 1 else ' is'} wrong."


def _print_plain(cluster: Cluster, failures: list[Failure]) -> None:
    table = [list(HEADINGS), *rows(cluster)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    for kind in ("all_reduce", "all_to_all"):
        lines += ["", *heat_map(cluster, kind)] if cluster.pairs else []
    lines += ["", *remarks(cluster)]
    for failure in failures:
        lines += [f"failed   {failure.check}: {failure.found}", f"         advice: {failure.advice}"]
    print("\n".join([*lines, _verdict(cluster, failures)]), flush=True)


def _print_tables(cluster: Cluster, failures: list[Failure]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    nodes = Table(title="Nodes", title_justify="left")
    for heading in HEADINGS:
        nodes.add_column(heading, justify="left" if heading in ("node", "ranks") else "right")
    for row in rows(cluster):
        nodes.add_row(*map(escape, row))
    console.print(nodes)
    for kind in ("all_reduce", "all_to_all"):
        console.print("\n".join(heat_map(cluster, kind)), markup=False, highlight=False)
    console.print("\n".join(remarks(cluster)), highlight=False)
    if failures:
        table = Table(title="What is wrong", title_justify="left")
        for heading in ("check", "found", "what to do"):
            table.add_column(heading, overflow="fold")
        for failure in failures:
            table.add_row(*map(escape, (failure.check, failure.found, failure.advice)))
        console.print(table)
    console.print(f"[{'bold red' if failures else 'bold green'}]{escape(_verdict(cluster, failures))}[/]")
