"""Run our model in a layout on given Hugging Face tensors and a global batch; give back losses, gradients and weights.

Functions of `parallel.workers.Workers`, so importable and picklable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules, step
from perilune.pretrain.hf.table import Block, blocks
from perilune.pretrain.objective import next_token
from perilune.pretrain.schema import Config

Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]  # checkpoint key, global shape, offset, values


def _parts(model: Any) -> Any:
    """(parameter or buffer, its blocks of the global tensor as (key, offset, its own slice along dim 0 or 1))."""
    for bare in model.bare():
        state = bare.state_dict(keep_vars=True)
        for name, entry in bare.sharded_state_dict().items():
            if isinstance(entry, ShardedTensorFactory):
                halves = entry.build()
                dim = entry.data.ndim - 2
                size = entry.data.shape[dim] // 2
                for half, part in enumerate(halves):
                    yield state[name], part, (dim, half * size, size)
            elif isinstance(entry, ShardedTensor):
                yield state[name], entry, None


def load(config: Config, model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put `weights` (Hugging Face names) into this rank's shards."""
    whole: dict[str, list[tuple[Block, torch.Tensor]]] = {}
    for block in blocks(config.model):
        if not block.copy:
            whole.setdefault(block.ours, []).append((block, weights[block.theirs]))
    with torch.no_grad():
        for tensor, part, cut in _parts(model):
            full = torch.full(part.global_shape, float("nan"))
            for block, value in whole[part.key]:
                full[block.index] = value
            place = tuple(slice(o, o + n) for o, n in zip(part.global_offset, part.local_shape, strict=True))
            target = tensor if cut is None else tensor.narrow(*cut)
            target.copy_(full[place].reshape(target.shape))


def named(config: Config, pieces: list[list[Piece]], part: bool = False) -> dict[str, torch.Tensor]:
    """Hugging Face names -> tensor, from every rank's pieces; those of a part of the model only if `part`.

    Raises KeyError where a tensor of the model is missing, unless `part`.
    """
    full: dict[str, torch.Tensor] = {}
    for rank in pieces:
        for key, shape, offset, values in rank:
            whole = full.setdefault(key, torch.full(shape, float("nan")))
            whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    wanted = (b for b in blocks(config.model) if not b.copy and (not part or b.ours in full))
    return {b.theirs: full[b.ours][b.index] for b in wanted}


def pieces(model: models.Model, values: Callable[[torch.Tensor], torch.Tensor | None]) -> list[Piece]:
    """`values(tensor)` of every weight and router bias of this rank (leaving out None), with its place."""
    found = []
    for tensor, part, cut in _parts(model):
        value = values(tensor)
        if value is not None:
            value = value if cut is None else value.narrow(*cut)
            value = value.detach().float().clone().reshape(part.local_shape)
            found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), value))
    return found


def _start(config: Config) -> tuple[models.Model, int]:
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    return models.build(config, mesh), mesh.dp


def initial(config: Config) -> list[Piece]:
    """This rank's weights as a new run would draw them."""
    model, _ = _start(config)
    return pieces(model, lambda tensor: tensor)


def gradients(config: Config, weights: dict[str, torch.Tensor], batch: Any, mtp_weight: float) -> dict[str, Any]:
    """One global batch (a list of micro-batches, dealt over data-parallel ranks) through this layout.

    Returns this rank's view: `sums` [2, 1+D], `load` [layers, E] and `balance` as `step.forward_backward` gives them,
    and pieces for `named`: `gradients`, and `biases` after the step. `config.parallel.zero1` must be False, so that
    every data-parallel rank holds whole gradients.
    """
    model, dp = _start(config)
    load(config, model, weights)
    mine = batch[parallel_state.get_data_parallel_rank() :: dp]
    sums, load_LE, balance = step.forward_backward(model, mine, next_token, mtp_weight, bias_speed=1e-3)
    return {
        "sums": sums,
        "load": load_LE,
        "balance": balance,
        "gradients": pieces(model, lambda t: getattr(t, "main_grad", None)),
        "biases": pieces(model, lambda t: None if isinstance(t, torch.nn.Parameter) else t),
    }
