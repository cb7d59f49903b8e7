"""What a process of tests/test_bench.py does: some steps of ours and of the rival that shares our framework."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import megatron_local
import numpy as np
import step
import torch

from perilune.parallel import mesh as meshes
from perilune.pretrain.schema import Config


def first_losses(config: Config) -> dict[str, list[float]]:
    """Two steps of ours and of each way of Megatron-core's local spec, from the same weights."""
    meshes.start(meshes.Mesh(world=1))
    step.SEQ_LEN = config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, config.data.seq_len))
    mine, net = step.ours(config, tokens)
    weights = megatron_local.weights_of(net)
    found = {"ours": [mine(), mine()]}
    for way in megatron_local.ways(config.precision.compute):
        if not way.fused:  # compiling takes longer than the rest of this test
            theirs = megatron_local.build(config, weights, torch.from_numpy(tokens), way)
            found[str(way)] = [theirs(), theirs()]
    return found
