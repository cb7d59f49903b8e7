"""A sweep on a real Slurm whose answers get lost and whose controller goes away: every trial is submitted once."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from ray_nodes import PERILUNE

LADDER = """
preset: tiny
set: {data.path: %s, data.workers: 0, valid.steps: 1, train.save_every: 0,
      model.n_routed_experts: 4, model.n_group: 1, model.topk_group: 1,
      model.num_experts_per_tok: 2, model.num_nextn_predict_layers: 0, model.num_layers: 2}
budgets: [1.3e+9]
sizes:
  a: {model.hidden_size: 32}
  b: {model.hidden_size: 40}
  c: {model.hidden_size: 48}
law: {lr: {k: 0.005, exponent: 0}, batch: {k: 128, exponent: 0}}
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


class Sweep:
    """`perilune sweep` in a folder with a ladder.yaml and a site.yaml."""

    def __init__(self, slurm: slurm_cluster.Cluster, folder: Path, out: str = "sweep", path: str = "") -> None:
        self._said = folder / f"said_{time.monotonic_ns()}"
        words = ["sweep", "ladder.yaml", "--out", out, "--on", "slurm", "--", "--threads", "1", "--site", "site.yaml"]
        env = slurm.env | ({"PATH": path} if path else {})
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [PERILUNE, *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    def said(self) -> str:
        return self._said.read_text()

    def until(self, what: Callable[[], Any], timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.said())
            time.sleep(0.1)

    def ends(self, timeout: float = 150) -> int:
        return self.process.wait(timeout)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / "sweep" / "trials.csv"
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {row["trial"]: row for row in csv.DictReader(stream)}


def submitted(slurm: slurm_cluster.Cluster, folder: Path) -> list[str]:
    """The script of every job there ever was of `folder`, as Slurm has it."""
    commands = slurm("squeue", "--noheader", "--states=all", "--format=%o").splitlines()
    return sorted(command.split()[0] for command in commands if command.startswith(str(folder)))


@pytest.mark.timeout(400)
def test_answers_lost_killed_and_continued_while_the_controller_is_away(
    slurm: slurm_cluster.Cluster, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "ladder.yaml").write_text(LADDER % packed)
    (tmp_path / "site.yaml").write_text("env: {GLOO_SOCKET_IFNAME: lo}\n")
    runs = tmp_path / "sweep" / "runs"
    first = Sweep(slurm, tmp_path, path=slurm_cluster.losing(tmp_path / "bin", "kill -9 $$"))
    first.until(lambda: rows(tmp_path))
    assert "Slurm does not answer since" in first.said() and "Slurm answers again" in first.said(), first.said()
    first.until(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 2)
    first.process.kill()
    first.ends()

    slurm.stop("slurmctld")
    fresh, second = Sweep(slurm, tmp_path, out="fresh"), Sweep(slurm, tmp_path)
    second.until(lambda: "Slurm does not answer since" in second.said())
    assert fresh.ends() == 2 and fresh.said().count("\n") == 1 and "nable to contact" in fresh.said(), fresh.said()
    assert not (tmp_path / "fresh").exists()
    slurm.start("slurmctld", "slurmctld", "-D", "-f", str(slurm.conf))
    assert second.ends() == 0, second.said()
    assert second.said().count("does not answer") == second.said().count("answers again") == 1, second.said()

    assert len(rows(tmp_path)) == 3 and {row["state"] for row in rows(tmp_path).values()} == {"done"}
    assert submitted(slurm, tmp_path) == sorted(str(runs / name / "launch" / "job.sh") for name in rows(tmp_path))
    for name in rows(tmp_path):
        events = [json.loads(line) for line in (runs / name / "launch" / "events.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events] == ["attempt", "finished"], (name, events)
