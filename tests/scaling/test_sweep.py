"""Sweeps on this machine: killed and continued, a rank that is lost, a trial that fails for good."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from perilune.launch.job import Papers
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.order import permute
from perilune.pretrain.scaling.ladder import plan, read_ladder

PERILUNE = str(Path(sys.executable).with_name("perilune"))
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
LADDER = """
preset: tiny
set: {data.path: %s, valid.steps: 1, train.save_every: 10}
budgets: [5.0e+9]
sizes:
  long: {model.num_layers: 2, model.hidden_size: 32}
  short: {}
law: {lr: {k: 0.005, exponent: 0}, batch: {k: 128, exponent: 0}}
"""


def start(ladder: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PERILUNE, "sweep", str(ladder), "--out", str(folder), "--at-once", "2", "--retries", "2"],
        env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def wait(until: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not until():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def damage(train: Path, seed: int, position: int) -> None:
    """One bit of the row that a run with `seed` reads as its row `position`."""
    manifest = read_manifest(train)
    row = int(permute(np.array([position]), manifest["rows"], seed, 0, f"{manifest['fingerprint']}#0")[0])
    samples = [(shard["name"], sample) for shard in manifest["shards"] for sample in shard["samples"]]
    name, (_, offset, length, *_) = samples[row]
    data = bytearray((train / name).read_bytes())
    data[offset + length // 2] ^= 4
    (train / name).write_bytes(data)


@pytest.mark.timeout(400)
def test_killed_continued_retried_and_given_up(packed: Path, tmp_path: Path) -> None:
    """The longer trial reads a damaged row near its end, which the shorter never sees."""
    train = Path(shutil.copytree(packed.parent, tmp_path / "packed")) / "train"
    ladder, folder = tmp_path / "ladder.yaml", tmp_path / "sweep"
    ladder.write_text(LADDER % train)
    long, short = plan(read_ladder(ladder), 1)
    runs = {trial.size: folder / "runs" / trial.name for trial in (long, short)}
    assert short.steps + 20 < long.steps
    damage(train, 1, 2 * (long.steps - 8))

    first = start(ladder, folder)
    checkpoint = runs["short"] / "checkpoints" / "latest"
    wait(lambda: checkpoint.exists() and bool(lines(runs["long"] / "metrics.jsonl")), first)
    whole = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    assert len(whole) >= 7, "the sweep, and of each trial a launcher, an agent and a rank"
    whole[0].kill()
    _, left = psutil.wait_procs(whole, timeout=10)
    assert not left, "what trains here ends with the sweep"
    first.communicate()
    assert not (folder / "trials.csv").exists()

    again = start(ladder, folder)
    events = runs["short"] / "launch" / "events.jsonl"
    attempts = len(lines(events))

    def beat() -> dict[str, Any]:
        file = Papers(runs["short"]).beats / "rank_00000.json"
        return json.loads(file.read_text()) if len(lines(events)) > attempts and file.exists() else {}

    wait(lambda: bool(beat().get("begun")), again)  # it has done a step since
    second = subprocess.run(
        [PERILUNE, "sweep", str(ladder), "--out", str(folder)], env=ENV, capture_output=True, text=True
    )
    assert second.returncode == 2 and "another `perilune sweep` is at work" in second.stderr
    os.kill(beat()["pid"], signal.SIGKILL)
    said, _ = again.communicate(timeout=150)
    assert again.returncode == 1, said
    assert f"failed: {long.name}: " in said and "the data of that step is damaged" in said

    with (folder / "trials.csv").open(newline="") as stream:
        rows = {row["size"]: row for row in csv.DictReader(stream)}
    assert rows["short"]["state"] == "done" and rows["long"]["state"] == "failed" and rows["long"]["loss"] == "nan"
    metrics = lines(runs["short"] / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == list(range(1, short.steps + 1)), "no step twice, none left out"
    assert metrics[-1]["valid_loss"] == float(rows["short"]["loss"])
    begun = [int(n) for n in re.findall(r"step (\d+) of \d+, ", (runs["short"] / "launch" / "sweep.log").read_text())]
    assert begun[0] == 0 and begun[1] >= 10 and len(begun) == 3, (
        "each launch, and the restart, goes on from a checkpoint"
    )
    tried = [event["event"] for event in lines(runs["long"] / "launch" / "events.jsonl")]
    assert tried[-1] == "gave_up" and tried[-3:].count("attempt") == 1

    third = start(ladder, folder)  # all has ended: nothing is started
    said, _ = third.communicate(timeout=30)
    assert third.returncode == 1 and "1 of 2 trials done" in said and "--retry-failed" in said
    assert len(lines(runs["long"] / "launch" / "events.jsonl")) == len(tried)
