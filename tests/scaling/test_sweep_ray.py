"""A sweep of twelve trials on a real Ray cluster with tokens, killed half way and continued while the cluster cannot be
reached; none runs twice."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from forwarder import Forwarder
from ray_nodes import ENV, PERILUNE, TOKEN, Nodes

from perilune.pretrain.scaling.fit import fit
from perilune.pretrain.scaling.trials import budgets, read_csv

LADDER = """
preset: tiny
set: {data.path: %s, data.workers: 0, valid.steps: 1, train.save_every: 0,
      model.n_routed_experts: 4, model.n_group: 1, model.topk_group: 1,
      model.num_experts_per_tok: 2, model.num_nextn_predict_layers: 0}
budgets: [1.3e+9, 1.7e+9, 2.3e+9]
sizes:
  a: {model.num_layers: 2, model.hidden_size: 32}
  b: {model.num_layers: 2, model.hidden_size: 40}
  c: {model.num_layers: 2, model.hidden_size: 48}
  d: {model.num_layers: 2, model.hidden_size: 56}
law: {lr: {k: 0.005, exponent: 0}, batch: {k: 128, exponent: 0}}
"""


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    nodes = Nodes(1, cpus=3)  # more than there are here: a job waits half of its time
    yield nodes
    nodes.end()


def rows(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / "trials.csv"
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {row["trial"]: row for row in csv.DictReader(stream)}


def jobs(cluster: Nodes) -> list[dict[str, Any]]:
    """All that were ever submitted, as Ray's own server lists them."""
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return [job for job in json.load(answer) if job["submission_id"]]


def start(ladder: Path, folder: Path, port: int, env: dict[str, str] = ENV) -> subprocess.Popen[str]:
    words = ["sweep", str(ladder), "--out", str(folder), "--on", "ray", "--at-once", "3"]
    return subprocess.Popen(
        [PERILUNE, *words, "--", "--address", f"http://127.0.0.1:{port}"],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until(what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.1)


def reads(word: str, process: subprocess.Popen[str]) -> str:
    """What it has said up to a line with `word`."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(said)


@pytest.mark.timeout(400)
def test_twelve_trials_killed_half_way_and_continued(cluster: Nodes, packed: Path, tmp_path: Path) -> None:
    ladder, folder = tmp_path / "ladder.yaml", tmp_path / "sweep"
    ladder.write_text(LADDER % packed)
    between = Forwarder(int(cluster.address.rpartition(":")[2]))
    between.lose = b"POST /api/jobs/"  # the first job's, which is taken
    first = start(ladder, folder, between.port)
    until(lambda: len(rows(folder)) >= 5, first)
    assert between.lose == b""
    whole = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in whole:  # the jobs are the cluster's, and go on
        process.kill()
    first.communicate()
    before = rows(folder)
    assert 5 <= len(before) < 12 and {row["state"] for row in before.values()} == {"done"}

    between.close()
    second = start(ladder, folder, between.port)
    said = reads("does not answer since", second)
    second.send_signal(signal.SIGINT)
    more, _ = second.communicate(timeout=10)
    assert second.returncode == 75 and rows(folder) == before, said + more
    without = {key: value for key, value in ENV.items() if not key.startswith("RAY_AUTH")}
    real = int(cluster.address.rpartition(":")[2])
    for port, env, word in ((between.port, ENV, "does not answer"), (real, without, "RAY_AUTH_TOKEN")):
        refused = start(ladder, tmp_path / "fresh", port, env)
        said, _ = refused.communicate(timeout=60)
        assert refused.returncode == 2 and said.count("\n") == 1 and word in said, said
        assert not (tmp_path / "fresh").exists()

    again = start(ladder, folder, between.port)
    said = reads("does not answer since", again)
    between.open()
    more, _ = again.communicate(timeout=150)
    said += more
    assert again.returncode == 0 and "12 of 12 trials done" in said, said
    assert said.count("does not answer since") == said.count("answers again") == 1, said
    after = rows(folder)
    assert len(after) == 12 and all(after[name] == row for name, row in before.items())
    assert len(jobs(cluster)) == 12 and {job["status"] for job in jobs(cluster)} == {"SUCCEEDED"}
    for name, row in after.items():
        run = folder / "runs" / name
        events = [json.loads(line) for line in (run / "launch" / "events.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events].count("attempt") == 1, (name, events)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in metrics] == list(range(1, int(row["steps"]) + 1))
        assert metrics[-1]["tokens"] == int(row["tokens"]) and metrics[-1]["valid_loss"] == float(row["loss"])
        assert float(row["flops_per_token"]) * int(row["tokens"]) == pytest.approx(float(row["budget"]), rel=0.025)
    assert TOKEN not in "".join(file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file())
    read = read_csv([folder / "trials.csv"])
    assert len(read.all) == 12 and {trial.per for trial in read.all} == {"flops_per_token"} and not read.warnings
    assert [len(group) for group in budgets(read.all)] == [4, 4, 4]
    assert fit(read, draws=10).parametric
