"""One short run for every launcher: its words, and what two runs of it must have in common, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = 12
TIMED = {"tokens_per_s", "mfu", "data_wait_s", "memory"}  # the only figures that may differ between equal runs


def train(packed: Path, *more: str, steps: int = STEPS, save_every: int = 3) -> list[str]:
    """Words for `perilune`; two data-parallel ranks or one. More `steps` begin with the very same ones."""
    return ["train", "tiny", f"data.path={packed}", f"train.steps={steps}", f"train.save_every={save_every}",
            "parallel.ep=1", "valid.every=0", "schedule.lr=constant", "schedule.bias_freeze_ratio=1",
            "schedule.mtp_switch_ratio=1", *more]  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    """Each whole line of the run's metrics, without what the time of day decides."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
