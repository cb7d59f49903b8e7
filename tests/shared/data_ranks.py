"""What the processes of tests/data do; each function runs on every rank of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from packed_rows import random_rows

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, model, presets, rules, schema
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.dealing import cost_model
from perilune.pretrain.data.quarantine import over_all_ranks
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.stream import DataState, open_stream
from perilune.pretrain.errors import InputError
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Config
from perilune.pretrain.step import forward_backward, train_step
from perilune.pretrain.timetable import StepPlan

GLOBAL_BATCH = 16


def config_of(data: schema.Data) -> Config:
    tiny = presets.get("tiny")
    return replace(tiny, data=data, model=replace(tiny.model, num_layers=2, first_k_dense_replace=1))


def train(data: schema.Data, folder: Path, steps: int, micro_batch_size: int) -> dict[str, Any]:
    """Continue the run in `folder` for `steps` steps on all ranks: ids of each global batch, losses, the end's state.

    Which rows a rank computes is seen too: `mine`, its ids at each step.
    """
    config = config_of(data)
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = model.build(config, mesh)
    optim = optimizer.build(config, net)
    stream = open_stream(data, 1, depth=1, vocab_size=config.model.vocab_size, cost=cost_model(config.model),
                         agree=over_all_ranks)  # fmt: skip
    step, state = 0, stream.initial_state()
    if (newest := checkpoint.latest(folder)) is not None:
        saved = checkpoint.load(newest, net, optim)
        step, state = saved["step"], DataState.from_dict(saved["data"])
        stream.check_state(state)
    group = parallel_state.get_data_parallel_group()
    ids, losses, micros = [], [], []
    try:
        for _ in range(steps):
            batches, state = stream.read(state, GLOBAL_BATCH, group.rank(), mesh.dp, micro_batch_size)
            todo = StepPlan(rows=GLOBAL_BATCH, lr=1e-2, mtp_weight=0.3, bias_speed=1e-2)
            losses.append(train_step(net, optim, batches, next_token, todo, clip=1.0).loss)
            parts: list[list[str]] = [[] for _ in range(mesh.dp)]
            dist.all_gather_object(parts, [name for batch in batches for name in batch.sample_ids], group=group)
            ids.append(sorted(name for part in parts for name in part))
            micros.append(len(batches))
            step, state = step + 1, stream.advance(state, GLOBAL_BATCH)
        at = {"step": step, "data": state.to_dict()}
        checkpoint.save(folder, step, net, optim, at, config=config, keep=0)
    except InputError as error:
        return {"error": str(error)}
    finally:
        stream.close()
        meshes.stop(leave_group=False)
    return {"ids": ids, "losses": losses, "micros": micros, "state": state.to_dict()}


def packed_and_padded(lengths: list[int], rows: list[list[int]], seq_len: int) -> dict[str, Any]:
    """Losses and gradients on the same documents packed (`rows`: their numbers) and padded, one a row.

    Of each: loss, largest deviation of any gradient, tokens computed.
    """
    config = config_of(schema.Data(seq_len=seq_len))
    vocabulary = config.model.vocab_size
    meshes.start(meshes.Mesh(1))
    config = replace(config, model=replace(config.model, seq_aux_loss_alpha=0.0))
    net = model.build(config, meshes.Mesh(1))
    documents = [row.tokens for row in random_rows([[n] for n in lengths], vocabulary)]
    packed, padded = [], []
    for number, members in enumerate(rows):
        sizes = [lengths[i] for i in members]
        cu = np.cumsum([0, *sizes]).astype("<i4")
        tokens = np.concatenate([documents[i] for i in members])
        packed.append(Row(str(number), tokens, cu, np.ones(seq_len, np.uint8)))
    for number, document in enumerate(documents):
        rest = seq_len - document.size
        tokens = np.concatenate([document, np.zeros(rest, document.dtype)])
        mask = np.concatenate([np.ones(document.size, np.uint8), np.zeros(rest, np.uint8)])
        cu = np.array([0, document.size, seq_len] if rest else [0, seq_len], "<i4")
        padded.append(Row(str(number), tokens, cu, mask))
    found: dict[str, Any] = {}
    gradients = {}
    for name, made in (("packed", packed), ("padded", padded)):
        batches: list[PackedBatch] = [collate([row], config.model.num_nextn_predict_layers, True) for row in made]
        sums, load_LE, *_ = forward_backward(net, batches, next_token, 0.3, 0.0)
        gradients[name] = {n: p.main_grad.clone() for n, p in net.bare()[0].named_parameters()}
        found[name] = {
            "loss": (sums[0] / sums[1]).tolist(),
            "counted": sums[1].tolist(),
            "tokens": sum(batch.positions.numel() for batch in batches),
            "routed": float(load_LE.sum()),
        }
    largest = max(float(g.abs().max()) for g in gradients["packed"].values())
    found["gradient"] = (
        max(float((gradients["packed"][n] - gradients["padded"][n]).abs().max()) for n in gradients["packed"]) / largest
    )
    return found
