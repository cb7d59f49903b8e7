"""What the processes of tests/hf do; each function runs on every rank of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, model, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.hf import ours
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Config, Parallel, Precision
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan


def train(config: Config, run_dir: Path) -> None:
    """Two steps on random tokens, then a checkpoint of this layout in `run_dir`."""
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = model.build(config, mesh)
    optim = optimizer.build(config, net)
    length = config.data.seq_len
    for step in range(2):
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, config.model.vocab_size, length).astype(np.uint16)
        row = Row("0", tokens, np.array([0, length], np.int32), np.ones(length, np.uint8))
        todo = StepPlan(rows=1, lr=1e-2, mtp_weight=0.3, bias_speed=1e-2)
        batch = collate([row], config.model.num_nextn_predict_layers, True)
        train_step(net, optim, [batch], next_token, todo, clip=1.0)
    state = {"step": 2, "data": {"samples": 2, "tokens": 2 * length, "counters": {}, "fingerprints": {}}}
    checkpoint.save(run_dir / "checkpoints", 2, net, optim, state, config=config, keep=0)


def logits_of(config: Config, path: Path, rows: list[list[int]], masters: bool = False) -> list[torch.Tensor]:
    """Logits, in one process and fp32, of a checkpoint that Megatron-core's own loading put into the model.

    `masters`: of a bf16 run, its fp32 masters.
    """
    config = replace(config, parallel=Parallel(zero1=masters))
    mesh = rules.mesh_of(config, 1)
    meshes.start(mesh, timeout_s=60)
    plain = replace(config, precision=Precision(compute="fp32"))
    net = model.build(plain, mesh)
    if masters:
        trained = model.build(config, mesh)
        optim = optimizer.build(config, trained)
        checkpoint.load(path, trained, optim)
        _put_masters(net, trained, optim)
    else:
        checkpoint.init_from(path, net)
    net.train(False)
    return [ours.forward(net.bare()[0], config.model, row) for row in rows]


def _put_masters(net: model.Model, trained: model.Model, optim: object) -> None:
    weights = dict(net.bare()[0].named_parameters())
    biases = dict(net.bare()[0].named_buffers())
    masters: dict[int, torch.Tensor] = {}
    for one in optim.chained_optimizers:  # type: ignore[attr-defined]
        for group, fp32 in zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True):
            masters |= {id(weight): master for weight, master in zip(group, fp32, strict=True)}
    with torch.no_grad():
        for name, weight in trained.bare()[0].named_parameters():
            weights[name].copy_(masters[id(weight)].view(weight.shape))
        for name, buffer in trained.bare()[0].named_buffers():
            biases[name].copy_(buffer)
