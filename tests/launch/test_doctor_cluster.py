"""`perilune doctor --cluster` in four processes by gloo. Two nodes are simulated, by PERILUNE_NODE_NAME alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perilune.pretrain import doctor_cluster, doctor_cluster_report
from perilune.pretrain.doctor_cluster_report import Cluster

WORLD = 4
SECONDS = 100  # generous: the cores may be shared
Processes = dict[int, subprocess.Popen[str]]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    """Filled by `start`; whatever is left of it is ended, the stopped ones too."""
    processes: Processes = {}
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def start(processes: Processes, folder: Path, *words: str, ranks: range = range(WORLD), **variables: str) -> None:
    """Rank 3 alone gets `variables`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for rank in ranks:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        place |= {"PERILUNE_NODE_NAME": "left" if rank < 2 else "right"}
        processes[rank] = subprocess.Popen(
            [str(Path(sys.executable).with_name("perilune")), "doctor", "--cluster", *words],
            cwd=folder,
            env={**os.environ, **place, **(variables if rank == 3 else {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def finish(processes: Processes) -> dict[int, tuple[int, str, str]]:
    """(code, stdout, stderr) by rank."""
    done = {}
    for rank, process in processes.items():
        out, err = process.communicate(timeout=SECONDS)
        done[rank] = (process.returncode, out, err)
    return done


def test_a_sound_cluster_is_measured_in_full(started: Processes, tmp_path: Path) -> None:
    start(started, tmp_path, "--json", "--below", "0.2")  # the cores are shared by more than these four
    done = finish(started)
    assert [code for code, _, _ in done.values()] == [0] * WORLD, done
    found = json.loads(done[0][1])
    assert all(out == "" for rank, (_, out, _) in done.items() if rank), "rank 0 alone prints"
    assert found["ok"] and found["failures"] == [] and found["backend"] == "gloo"
    assert found["nodes"] == {"left": [0, 1], "right": [2, 3]}
    assert all(rate > 1e8 for rate in found["matmul"])
    for disk in found["disk"].values():
        assert disk["write"] > 1e5 and disk["sync_s"] > 0 and disk["shared"] is True
    assert set(found["clock"]) == {"right"}, "beside the first node's"
    clock = found["clock"]["right"]
    assert abs(clock["ahead_s"]) <= clock["error_s"] + 0.05, "one machine has one clock"
    rates = [*found["within_node"].values(), *found["pairs"]]
    assert [pair["nodes"] for pair in found["pairs"]] == [["left", "right"]] and len(rates) == 3
    assert all(rate[kind] > 1e6 for rate in rates for kind in ("all_reduce", "all_to_all"))
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"


def test_a_slow_rank_and_another_version_are_named(started: Processes, tmp_path: Path) -> None:
    """Rank 3 is stopped most of the time while products are measured, and finds another Megatron-core first."""
    other = tmp_path / "other" / "megatron_core-0.19.77.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.19.77\n")
    start(started, tmp_path, "--below", "0.5", PYTHONPATH=str(other.parent))
    stderr = started[0].stderr
    assert stderr is not None
    over = threading.Event()

    def stutter() -> None:
        while not over.is_set():
            started[3].send_signal(signal.SIGSTOP)
            time.sleep(0.3)  # on a busy machine the other ranks go slowly too, and a sleep takes longer than asked
            started[3].send_signal(signal.SIGCONT)
            time.sleep(0.01)

    thread = threading.Thread(target=stutter)
    for line in stderr:
        if line == "doctor: matmul\n":
            thread.start()
        if line == "doctor: disk\n":
            break
    over.set()
    thread.join()
    done = finish(started)
    assert [code for code, _, _ in done.values()] == [1] * WORLD, done
    failed = [line for line in done[0][1].splitlines() if line.startswith("failed ")]
    advice = [line for line in done[0][1].splitlines() if line.strip().startswith("advice:")]
    assert len(advice) == len(failed), "one line each"
    (versions,) = [line for line in failed if "versions:" in line]
    assert "megatron-core: 0.19.77 on rank 3 (right); 0.19." in versions
    (slow,) = [line for line in failed if "matmul:" in line]
    assert "rank 3 (right)" in slow and "of the median" in slow


def test_a_rank_that_never_comes_is_named_within_seconds(started: Processes, tmp_path: Path) -> None:
    start(started, tmp_path, "--within", "8", ranks=range(WORLD - 1))
    done = finish(started)
    assert [code for code, _, _ in done.values()] == [1] * (WORLD - 1), done
    assert "failed   start: rank 3: not here 8 s after the others; 3 of 4 came" in done[0][1]
    assert "advice:" in done[0][1]


def test_without_an_allocation_it_says_how_to_start_it(perilune: Any) -> None:
    done = perilune("doctor", "--cluster", RANK="", WORLD_SIZE="")
    assert done.returncode == 2
    assert "perilune launch slurm" in done.stderr and "RANK" in done.stderr


@pytest.mark.parametrize("nodes", [2, 3, 8, 9, 256])
def test_each_pair_meets_once_in_rounds_of_disjoint_pairs(nodes: int) -> None:
    found = list(doctor_cluster.rounds(nodes))
    assert len(found) == (nodes if nodes % 2 else nodes - 1)
    for pairs in found:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    met = [pair for pairs in found for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]


def cluster_of(nodes: int, slow: int) -> Cluster:
    """`nodes` nodes of a process, every pair of which has 10 GB/s but those of node `slow`."""
    fact = {"versions": {"torch": "2"}, "folder": "/runs", "has_gpu": True}
    cluster = Cluster(nodes, 0.7, 120.0, {rank: {**fact, "node": f"n{rank:03}"} for rank in range(nodes)})
    for pairs in doctor_cluster.rounds(nodes):
        for pair in pairs:
            rate = 5e9 if slow in pair else 10e9
            cluster.pairs[pair] = {"all_reduce": rate, "all_to_all": rate}
    return cluster


def test_the_pairs_of_a_slow_link_are_named_and_seen() -> None:
    cluster = cluster_of(5, slow=3)
    found = {failure.found.partition(":")[0] for failure in doctor_cluster_report.judge(cluster)}
    assert found == {"n000 - n003", "n001 - n003", "n002 - n003", "n003 - n004"}
    lines = doctor_cluster_report.heat_map(cluster, "all_reduce")
    assert [line.split()[1] for line in lines[1:6]] == ["·██▒█", "█·█▒█", "██·▒█", "▒▒▒·▒", "███▒·"]


def test_of_two_the_better_one_is_the_measure() -> None:
    cluster = cluster_of(2, slow=9)
    cluster.matmul = [2e9, 1e9]
    (failure,) = doctor_cluster_report.judge(cluster)
    assert failure.found == "rank 1 (n001): 1 GFLOP/s, 50% of the better of two (2)"


def test_256_nodes_fit_a_terminal() -> None:
    lines = doctor_cluster_report.heat_map(cluster_of(256, slow=200), "all_to_all")
    assert "a cell is 4 nodes" in lines[0] and len(lines) == 66
    assert max(map(len, lines[1:])) < 100
    assert lines[51].split()[1] == "▒" * 64


def test_launched_it_finds_its_place_and_a_failure_is_not_tried_again(perilune: Any, tmp_path: Path) -> None:
    words = ["launch", "local", "--nproc", "2", "--", "doctor", "--cluster", "--json", "--below", "1"]
    done = perilune(*words, timeout=SECONDS)
    assert done.returncode == 1, done.stderr  # of two that were measured one is the slower
    found = json.loads(done.stdout)
    assert found["world"] == 2 and [len(ranks) for ranks in found["nodes"].values()] == [2]
    assert all(facts["folder"] == str(tmp_path / "runs" / "doctor") for facts in found["ranks"].values())
    events = (tmp_path / "runs" / "doctor" / "launch" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events].count("attempt") == 1
