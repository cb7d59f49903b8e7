"""What a process of tests/test_bench.py does: some steps of ours, and of the rival that shares our framework."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import floors
import megatron_local
import numpy as np
import step
import torch

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain.schema import Config

ROWS = 2


def ours(config: Config) -> tuple[np.ndarray, step.Step, models.Model]:
    meshes.start(meshes.Mesh(world=1))
    step.SEQ_LEN = config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (ROWS, config.data.seq_len))
    return tokens, *step.ours(config, tokens)


def counted(config: Config) -> dict[str, floors.Cost]:
    """What the second step costs, by operation."""
    _, mine, _ = ours(config)
    mine()
    clock = floors.Clock()
    with floors.watched_by(clock), clock.on(floors.REST):
        mine()
    return clock.take()


def first_losses(config: Config) -> dict[str, list[float]]:
    """Two steps of ours and of each way of Megatron-core's local spec, from the same weights."""
    tokens, mine, net = ours(config)
    weights = megatron_local.weights_of(net)
    found = {"ours": [mine(), mine()]}
    for way in megatron_local.ways(config.precision.compute):
        if not way.fused:  # compiling takes longer than the rest of this test
            theirs = megatron_local.build(config, weights, torch.from_numpy(tokens), way)
            found[str(way)] = [theirs(), theirs()]
    return found
