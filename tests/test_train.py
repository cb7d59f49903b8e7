"""`perilune train` as a user runs it: real processes, killed, stopped and resumed, bitwise."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TIMED = {"tokens_per_s", "mfu", "data_wait_s", "memory"}  # the only figures that may differ between equal runs
STEPS = 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 tokens of this repository's own sources, with a held-out part."""
    folder = tmp_path_factory.mktemp("data")
    command = str(Path(sys.executable).with_name("perilune"))
    sources = str(Path(__file__).parents[1] / "pretrain")
    for words in (
        ["tokenizer", "train", "--out", "tok", "--vocab-size", "512", sources],
        ["pack", "--out", "packed", "--tokenizer", "tok", "--seq-len", "64", "--valid-fraction", "0.1", sources],
    ):
        subprocess.run([command, *words], cwd=folder, check=True, timeout=60, stdout=subprocess.DEVNULL)
    return folder / "packed" / "train"


def start(packed: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    words = ["train", "tiny", f"data.path={packed}", "--run", str(run), "--nproc", "2", "parallel.ep=2"]
    keys = ["train.save_every=4", "valid.every=8", "valid.steps=2", *more]
    keys += [] if any(key.startswith("train.steps=") for key in more) else [f"train.steps={STEPS}"]
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("perilune")), *words, *keys],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def once_at(run: Path, step: int, act: Callable[[], None]) -> None:
    """Call `act` as soon as `step` is recorded."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return act()
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMED} for entry in metrics(run)]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(pid: int) -> list[int]:
    """Of a launcher: the children of its agent."""
    return [rank for agent in children(pid) for rank in children(agent)]


def weights(run: Path) -> dict[str, Any]:
    """Weights, masters and moments of the last checkpoint, read by torch's own tool."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = run / "whole.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step_{STEPS:08d}", file)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def test_killed_stopped_and_resumed_equals_uninterrupted_bitwise(packed: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = finish(start(packed, whole))
    assert "our modules in Megatron-core's local spec" in said and "tensorboard" in said

    killed = start(packed, parts)
    once_at(parts, 5, lambda: os.kill(ranks(killed.pid)[1], signal.SIGKILL))
    assert "rank 1 was killed by SIGKILL" in finish(killed, 1)

    stopped = start(packed, parts)
    once_at(parts, 9, stopped.terminate)
    assert "the same command continues from" in finish(stopped, 75)
    at = metrics(parts)[-1]["step"]
    assert (parts / "checkpoints" / "latest").read_text().strip() == f"step_{at:08d}"

    finish(start(packed, parts))
    assert untimed(parts) == untimed(whole)
    assert [entry["step"] for entry in metrics(whole)] == list(range(1, STEPS + 1))
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    _check_record(whole)


def _check_record(run: Path) -> None:
    entries = metrics(run)
    keys = (
        "step tokens loss mtp_loss aux_loss grad_norm lr tokens_per_s mfu data_wait_s max_vio_mean max_vio_max memory"
    )
    assert all(set(keys.split()) <= entry.keys() for entry in entries)
    assert entries[-1]["tokens"] == STEPS * 8 * 64
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.3
    assert [entry["step"] for entry in entries if "valid_bpb" in entry] == [8, 16]
    assert 1.0 < entries[-1]["valid_bpb"] < 8.0
    loads = [json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()]
    assert all(sum(layer) == 8 * 64 * 4 for layer in loads[-1]["load"]) and len(loads[-1]["load"]) == 3
    assert (run / "config.yaml").is_file() and list((run / "tensorboard").iterdir())
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


def test_a_resumed_run_refuses_changed_keys_but_not_its_length(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(start(packed, run, "train.steps=2"))
    assert "optim.lr (0.003 -> 0.1)" in finish(start(packed, run, "train.steps=2", "optim.lr=0.1"), 2)
    planned = finish(start(packed, run, "data.seq_len=32", "--dry-run"), 2)
    assert "packed in rows of 64 tokens, but data.seq_len is 32" in planned
    assert "is at step 2 already: ask for more" in finish(start(packed, run, "train.steps=1"), 2)
    finish(start(packed, run, "train.steps=3"))
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3]


def test_a_run_goes_on_where_its_data_has_moved_and_says_how_far_it_is(packed: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    valid = f"valid.path={packed.parent / 'valid'}"
    finish(start(packed, run, "train.steps=2", valid))
    shutil.copytree(packed, moved)
    assert "validation set was replaced" in finish(start(moved, run, "train.steps=4", f"valid.path={moved}"))
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3, 4]
    assert metrics(run)[1]["valid_data"] != metrics(run)[3]["valid_data"]
    other = finish(start(packed.parent / "valid", run, "train.steps=6", valid), 2)
    assert "resume with the same data" in other and str(moved) in other

    finish(start(moved, run, "train.steps=4", valid))  # nothing is left to do
    beats = [json.loads(file.read_text()) for file in (run / "launch" / "beats").iterdir()]
    assert [(beat["step"], beat["of"], beat["phase"]) for beat in beats] == [(4, 4, "done")] * 2


def test_a_poisoned_step_changes_nothing_and_enough_of_them_stop_the_run(packed: Path, tmp_path: Path) -> None:
    """An infinite learning signal: a weight of the loss so large that the gradients overflow on every rank."""
    said = finish(start(packed, tmp_path / "run", "schedule.mtp_weight=1e39", "train.nonfinite_limit=3"), 1)
    assert "3 steps in a row up to step 3 were not finite" in said
    entries = metrics(tmp_path / "run")
    assert len(entries) == 3 and all(entry["skipped"] and entry["grad_norm"] is None for entry in entries)
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "FloatingPointError" in log


def test_profile_and_weights_of_another_run(packed: Path, tmp_path: Path, perilune: Any) -> None:
    words = ["train", "tiny", f"data.path={packed}", "optim.lr=0.01", "schedule.lr=constant"]
    said = perilune(*words, "train.steps=8", "--run", "first")
    assert said.returncode == 0, said.stdout + said.stderr

    few = ["train.global_batch_size=2", "train.steps=4", "--profile"]  # a trace of many operations is long in writing
    said = perilune(*words, *few, "--run", "second", "--init-from", "first/checkpoints/step_00000008")
    assert said.returncode == 0, said.stdout + said.stderr
    with gzip.open(tmp_path / "second" / "profile" / "rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any("_Routed" in event.get("name", "") for event in events)  # the experts' operation
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert second[0]["loss"] < first[0]["loss"] - 0.5  # two of the same rows, seen by trained weights
