"""Saving while training goes on: the same bits as a blocking save, failures told, a crash leaves a whole checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import pytest
import saver_ranks

from perilune.parallel.workers import Workers
from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_optimizer import boxes


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_same_bits_as_a_blocking_save(compute: str, workers: Workers, tmp_path: Path) -> None:
    config = ranks.config_of(compute, ep=2)
    expected = workers.run(2, saver_ranks.straight, config)
    for rank, found in enumerate(workers.run(2, saver_ranks.in_background, config, tmp_path, True)):
        assert found["background"] == found["blocking"] and len(found["background"]) == 4
        assert found["called"] < found["waited"] / 2  # `save` returned long before the writer was done
        assert found["losses"] == expected[rank]["losses"] and found["digest"] == expected[rank]["digest"]
        assert found["at the next save"][:2] == ["step_00000002", "step_00000003"]


def test_an_update_that_does_not_wait_would_be_seen(workers: Workers, tmp_path: Path) -> None:
    (found,) = workers.run(1, saver_ranks.in_background, ranks.config_of(), tmp_path, False)
    assert found["background"] != found["blocking"]


def test_a_failure_is_told_on_all_ranks_and_leaves_the_old(workers: Workers, tmp_path: Path) -> None:
    for found in workers.run(2, saver_ranks.failing, ranks.config_of(ep=2), tmp_path):
        assert found["failed"] and found["left"] == ["latest", "step_00000001"]
        assert "SaveError: saving step 2" in found["next save"] and "rank 1" in found["next save"]
        assert found["after"] == "nothing" and found["end"] == ["latest", "step_00000003"]
    assert files.verify(tmp_path / "step_00000003")["step"] == 3


@pytest.mark.parametrize("where", ["tensors", "manifest"])
def test_killed_while_the_writer_works(where: str, tmp_path: Path) -> None:
    shared = Path(__file__).parent / "shared"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(shared / "saver_ranks.py"), str(tmp_path), where],
        env={**os.environ, "PYTHONPATH": str(shared)},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".step_00000002.")]
    assert len(partial) == 1 and any(partial[0].glob("*.distcp"))  # it was writing
    newest = files.latest(tmp_path)
    assert newest == tmp_path / "step_00000001" and files.verify(newest)["step"] == 1


def test_a_run_whose_checkpoint_fails_ends_soon(workers: Workers, perilune: Any, tmp_path: Path) -> None:
    sources = str(Path(__file__).parents[1] / "pretrain")
    for words in (
        ["tokenizer", "train", "--out", "tok", "--vocab-size", "512", sources],
        ["pack", "--out", "packed", "--tokenizer", "tok", "--seq-len", "64", sources],
    ):
        assert perilune(*words).returncode == 0
    keys = ["train.steps=500", "train.save_every=2", "data.workers=0", f"data.path={tmp_path / 'packed'}"]
    run = tmp_path / "run"
    run.mkdir()
    (said,) = workers.run(1, saver_ranks.run_that_cannot_write, configs.resolve("tiny", keys), run)
    assert said.startswith("SaveError: saving step 2") and "No space left" in said
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 2 <= last["step"] < 100
    assert os.listdir(run / "checkpoints") == []


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5, 1)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    import torch

    whole = torch.arange(torch.Size(shape).numel())
    for start in range(len(whole) + 1):
        for end in range(start, len(whole) + 1):
            cut = list(boxes(start, end, shape))
            parts = [
                whole.view(shape)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
                for offsets, sizes in cut
            ]
            assert torch.equal(torch.cat([whole[:0], *parts]), whole[start:end])
            assert len(cut) <= 2 * len(shape) - 1
