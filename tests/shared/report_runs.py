"""Run directories for the report's tests, written line by line as a run would."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain import config as configs
from perilune.pretrain.report.environment import NAME as ENVIRONMENT

LAYERS, EXPERTS = 4, 8  # of the demo preset: three expert layers and MTP's


def entry(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl with every key of the contract."""
    loss = 2.0 + 6.0 * math.exp(-step / 100) + 0.05 * math.sin(step)
    return {
        "step": step,
        "tokens": 4096 * step,
        "loss": loss,
        "mtp_loss": loss + 0.2,
        "aux_loss": 1.05,
        "grad_norm": 1.0 + 0.5 * math.cos(step),
        "lr": 1e-5 * step,
        "tokens_per_s": 2900.0 + step % 7,
        "mfu": 0.2,
        "data_wait_s": 2e-4,
        "max_vio_mean": 0.5,
        "max_vio_max": 1.5,
        "memory": 1 << 30,
        **changes,
    }


def write_run(
    path: Path,
    steps: int,
    *overrides: str,
    changes: dict[int, dict[str, Any]] | None = None,
    starts: list[dict[str, Any]] | None = None,
    planned: int | None = None,
    seed: int = 0,
) -> Path:
    """A run of the demo preset with `steps` steps, `changes` made to the lines of some, validated every tenth."""
    path.mkdir(parents=True)
    config = configs.resolve("demo", [f"train.steps={planned or steps}", *overrides])
    configs.save(config, path / "config.yaml")
    rng = np.random.default_rng(seed)
    with (path / "metrics.jsonl").open("w") as metrics, (path / "expert_load.jsonl").open("w") as loads:
        for step in range(1, steps + 1):
            valid = {"valid_loss": 2.5, "valid_bpb": 1.1 - step * 1e-4} if step % 10 == 0 else {}
            metrics.write(json.dumps(entry(step, **valid, **(changes or {}).get(step, {}))) + "\n")
            load = rng.multinomial(8192, np.full(EXPERTS, 1 / EXPERTS), size=LAYERS)
            loads.write(json.dumps({"step": step, "load": load.tolist()}) + "\n")
    if starts:
        (path / ENVIRONMENT).write_text(json.dumps({"starts": starts}))
    return path
