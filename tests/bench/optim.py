"""What Muon costs beside AdamW in a training step of one process, and Newton-Schulz in the types that a CPU offers.

    .venv/bin/python tests/bench/optim.py [--presets tiny demo] [--rounds 5] [--threads 2] [--json FILE]

Steps of the two alternate, on the same rows; the update is timed inside of the step; numbers are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from perilune.kernels.newton_schulz import orthogonalized, reference
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Config, Parallel
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def step_of(config: Config) -> Callable[[], tuple[float, float]]:
    """A function that takes a step, and returns its seconds and those of the update in it."""
    net = models.build(config, rules.mesh_of(config, 1))
    built = optimizer.build(config, net)
    length, vocabulary = config.data.seq_len, config.model.vocab_size
    bounds, mask, rng = np.array([0, length], np.int32), np.ones(length, np.uint8), np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (config.train.global_batch_size, length)).astype(np.uint16)
    rows = [Row(str(i), row, bounds, mask) for i, row in enumerate(tokens)]
    batch = collate(rows, config.model.num_nextn_predict_layers, True)
    todo = StepPlan(rows=len(rows), lr=1e-4, mtp_weight=0.3, bias_speed=1e-3)
    update, taken = built.step_with_ready_grads, [0.0]

    def timed() -> None:
        taken[0] = seconds(update)

    built.step_with_ready_grads = timed
    return lambda: (seconds(lambda: train_step(net, built, [batch], next_token, todo, clip=1.0)), taken[0])


def steps(preset: str, rounds: int) -> dict[str, object]:
    """The entry of a step with Muon beside one with AdamW."""
    base = replace(presets.get(preset), parallel=Parallel())
    both = {}
    for name in ("adamw", "muon"):
        both[name] = step_of(replace(base, optim=replace(base.optim, name=name)))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    for number in range(rounds + 1):
        for name, step in both.items():
            taken = step()
            if number:  # the first is slow
                found[name].append(taken)
    medians = {}
    for name, taken in found.items():
        whole, update = (statistics.median(times) for times in zip(*taken, strict=True))
        print(
            f"{preset:<12}{name:<8}step {whole * 1e3:8.1f} ms   update {update * 1e3:7.1f} ms   {update / whole:6.1%}"
        )
        medians[name] = whole
    ratio = statistics.median(m[0] / a[0] for m, a in zip(found["muon"], found["adamw"], strict=True))
    name = f"muon_step_vs_adamw_{preset}"
    return {"name": name, "ours": medians["muon"], "rival": medians["adamw"], "ratio": ratio, "unit": "s"}


def iteration(matrices: int, rows: int, columns: int) -> None:
    x = torch.randn(matrices, rows, columns)
    ways: dict[str, Callable[[], object]] = {
        "fp32": lambda: orthogonalized(x, torch.float32),
        "fp32 rounded to bf16": lambda: orthogonalized(x, torch.bfloat16),
        "bf16 multiplied": lambda: [reference(one) for one in x.bfloat16()],
    }
    for name, way in ways.items():
        way()
        best = min(seconds(way) for _ in range(3))
        print(f"Newton-Schulz of {matrices} x [{rows}, {columns}], {name:<22}{best * 1e3:9.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "demo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the ratios of steps there")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    os.environ.update(RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes.start(rules.mesh_of(replace(presets.get("tiny"), parallel=Parallel()), 1))
    entries = [steps(preset, asked.rounds) for preset in asked.presets]
    for sizes in ((8, 128, 192), (4, 512, 512)):
        iteration(*sizes)
    if asked.json:
        asked.json.write_text(json.dumps(entries, indent=2))


if __name__ == "__main__":
    main()
