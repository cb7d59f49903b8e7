"""Tokens a second of two processes that reduce gradients and gather weights beside computation, or after it.

    .venv/bin/python tests/bench/overlap.py [--rounds 3] [--json FILE]

Two gloo processes of one thread each, data-parallel, train `proxy_100m`'s shape in fp32 without MTP and balance loss,
512 tokens each a step. Three such runs share the processes, with the same weights and tokens: without overlap, with
`parallel.overlap_grad_reduce`, and with `parallel.overlap_param_gather` too, which needs the first. Rounds go through
them by turns, and their losses must be the same bits. A ratio is the median of the rounds': of
`overlap_grad_reduce_vs_none` beside the first run, of `overlap_param_gather_vs_none` beside it too, so that the second
is what both give together. Buckets are Megatron-core's (40 million numbers): one for the dense weights, three for the
experts. A step is timed from the time that both processes are at it until both are through.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from perilune.parallel import memory as allocator
from perilune.parallel import mesh as meshes
from perilune.parallel.workers import Workers
from perilune.pretrain import model as models
from perilune.pretrain import presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Config, Parallel, Precision
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

WORLD, SEQ_LEN = 2, 512
WARM = 1  # steps before those that count
WAYS = {
    "none": Parallel(),
    "grad_reduce": Parallel(overlap_grad_reduce=True),
    "param_gather": Parallel(overlap_grad_reduce=True, overlap_param_gather=True),
}


def shape() -> Config:
    proxy = presets.get("proxy_100m")
    model = replace(proxy.model, num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0)
    return replace(proxy, model=model, data=replace(proxy.data, seq_len=SEQ_LEN), precision=Precision(compute="fp32"))


def training(config: Config) -> Callable[[], float]:
    """A step of this rank; it returns the global loss."""
    net = models.build(config, rules.mesh_of(config, dist.get_world_size()))
    adam = optimizer.build(config, net)
    length = config.data.seq_len
    tokens = np.random.default_rng(dist.get_rank()).integers(0, config.model.vocab_size, length).astype(np.uint16)
    row = Row("0", tokens, np.array([0, length], np.int32), np.ones(length, np.uint8))
    batch = collate([row], 0, True)
    todo = StepPlan(rows=dist.get_world_size(), lr=config.optim.lr, mtp_weight=0.0, bias_speed=0.0)
    return lambda: train_step(net, adam, [batch], next_token, todo, clip=1.0).loss


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds of both ranks, loss)."""
    dist.barrier()
    began = time.perf_counter()
    loss = step()
    dist.barrier()
    return time.perf_counter() - began, loss


def race(config: Config, rounds: int, warm: int) -> dict[str, list[tuple[float, float]]]:
    """Of each way the seconds and loss of every round; what each process does. Memory is kept as in a run."""
    meshes.start(rules.mesh_of(config, dist.get_world_size()))
    steps = {name: training(replace(config, parallel=parallel)) for name, parallel in WAYS.items()}
    allocator.keep_freed()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(warm + rounds):
        for name, step in steps.items():
            taken = timed(step)
            if number >= warm:
                found[name].append(taken)
    return found


def entries(found: dict[str, list[tuple[float, float]]]) -> list[dict[str, object]]:
    """Of what `race` found on one rank. Raises ValueError where the losses differ."""
    tokens = WORLD * SEQ_LEN
    losses = {name: [loss for _, loss in taken] for name, taken in found.items()}
    seconds = {name: [taken for taken, _ in rounds] for name, rounds in found.items()}
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    made = []
    for name in list(WAYS)[1:]:
        if losses[name] != losses["none"]:
            raise ValueError(f"overlap_{name}: losses {losses[name]}, without it {losses['none']}")
        ratio = statistics.median(none / own for none, own in zip(seconds["none"], seconds[name], strict=True))
        made.append(
            {
                "name": f"overlap_{name}_vs_none",
                "ours": rates[name],
                "rival": rates["none"],
                "ratio": ratio,
                "unit": "tokens/s",
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the ratios there")
    options = parser.parse_args()
    with Workers(WORLD, timeout_s=600.0) as workers:
        found = workers.run(WORLD, race, shape(), options.rounds, WARM)[0]
    print(f"torch {torch.__version__}, megatron-core {version('megatron-core')}, {os.cpu_count()} cores, {WORLD} "
          f"processes of one thread, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    for name, taken in found.items():
        print(f"{name:<14}" + " ".join(f"{seconds:.2f}" for seconds, _ in taken) + " s a step")
    made = entries(found)
    for one in made:
        print(f"{one['name']}: {one['ours']:.0f} and {one['rival']:.0f} tokens/s, ratio {one['ratio']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
