"""Run our model in a layout on given Hugging Face tensors and a global batch; give back losses, gradients and weights.

Functions of `parallel.workers.Workers`, so importable and picklable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from perilune.moe.router import Router
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules, step
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.hf.table import Block, blocks
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.parity import fixture
from perilune.pretrain.plan import vision_counts
from perilune.pretrain.schema import Config
from perilune.pretrain.timetable import StepPlan

_SEEING = tuple(f"{name}." for name in models.SEEING)  # whose tensors go by their checkpoint's names here
# Checkpoint key, global shape, offset, values: of numpy, which travels between processes without a file descriptor.
Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


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


def _sizes(part: ShardedTensor) -> tuple[int, ...]:
    """The shard's size along every dim of the global tensor (Transformer Engine's experts lack the dim of experts)."""
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


def load(config: Config, model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put `weights` (Hugging Face names) into this rank's shards."""
    whole: dict[str, list[tuple[Block, torch.Tensor]]] = {}
    for block in blocks(config.model):
        if not block.copy:
            whole.setdefault(block.ours, []).append((block, weights[block.theirs]))
    with torch.no_grad():
        for tensor, part, cut in _parts(model):
            full = torch.full(part.global_shape, float("nan"))
            if part.key.startswith(_SEEING):
                full.copy_(weights[part.key])
            else:
                for block, value in whole[part.key]:
                    full[block.index] = value
            place = tuple(slice(o, o + n) for o, n in zip(part.global_offset, _sizes(part), strict=True))
            target = tensor if cut is None else tensor.narrow(*cut)
            target.copy_(full[place].reshape(target.shape))


def named(config: Config, pieces: list[list[Piece]], part: bool = False) -> dict[str, torch.Tensor]:
    """Hugging Face names -> tensor, from every rank's pieces; those of a part of the model only if `part`.

    Tensors of all but the decoder go by their names in a checkpoint.

    Raises KeyError where a tensor of the model is missing, unless `part`.
    """
    full: dict[str, torch.Tensor] = {}
    for rank in pieces:
        for key, shape, offset, values in rank:
            whole = full.setdefault(key, torch.full(shape, float("nan")))
            whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = torch.from_numpy(values)
    wanted = (b for b in blocks(config.model) if not b.copy and (not part or b.ours in full))
    seeing = {key: tensor for key, tensor in full.items() if key.startswith(_SEEING)}
    if not part and (found := sum(t.numel() for t in seeing.values())) != (
        expected := vision_counts.parameters(config.vision, config.model.hidden_size).total
        + vision_counts.contrastive_parameters(config.contrastive, config.vision, config.model.vocab_size).total
    ):
        raise KeyError(f"all but the decoder have {found} elements here, by their sizes {expected}")
    return {b.theirs: full[b.ours][b.index] for b in wanted} | seeing


def pieces(model: models.Model, values: Callable[[torch.Tensor], torch.Tensor | None]) -> list[Piece]:
    """`values(tensor)` of every weight and router bias of this rank (leaving out None), with its place."""
    found = []
    for tensor, part, cut in _parts(model):
        value = values(tensor)
        if value is not None:
            own = (value if cut is None else value.narrow(*cut)).detach().float().cpu().numpy()
            piece = own.reshape(_sizes(part)).copy()
            found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), piece))
    return found


def _start(config: Config) -> tuple[models.Model, int]:
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    return models.build(config, mesh), mesh.dp


def initial(config: Config) -> list[Piece]:
    """This rank's weights as a new run would draw them."""
    model, _ = _start(config)
    return pieces(model, lambda tensor: tensor)


def draw(config: Config, whole: PackedBatch) -> list[Piece]:
    """Weights of one rank for a fixture: norms and biases off their neutral values, gates that decide by a margin."""
    model, _ = _start(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for chunk in model.bare() for p in chunk.parameters() if p.ndim == 1):
            # Below 1, so that fp32 resolves an update: its last digit at 1 is a tenth of a step of the optimizer.
            parameter.copy_(0.35 * (1 + 0.1 * torch.randn(parameter.shape, generator=generator)))

    def choose(router: Router, arguments: tuple[torch.Tensor, ...]) -> None:
        x_TH = arguments[0].flatten(0, -2)
        gate_EH, bias_E = fixture.draw_gate(x_TH, config.model, f"{router.layer_number}{router.is_mtp_layer}")
        router.weight.data.copy_(gate_EH)
        router.expert_bias.copy_(bias_E)

    for _, router in model.routers():
        router.register_forward_pre_hook(choose)
    step.evaluate(model, iter([(whole, 1)]), next_token)
    return pieces(model, lambda tensor: tensor)


@dataclass(frozen=True)
class Trained:
    """One rank's view of some steps."""

    steps: list[step.StepResult]
    gradients: list[Piece]  # of the first step, after clipping
    biases: list[Piece]  # of the routers, at the end
    weights: list[Piece]  # at the end
    margin: float  # by which this rank's routers decided, at the closest


def train(config: Config, weights: str, batch: list[PackedBatch], steps: int) -> Trained:
    """`steps` training steps of this layout on the same global batch, from the weights in the file `weights`."""
    model, dp = _start(config)
    load(config, model, torch.load(weights, mmap=True, weights_only=True))
    adam = optimizer.build(config, model)
    mine = batch[parallel_state.get_data_parallel_rank() :: dp]
    plan = StepPlan(
        rows=config.train.global_batch_size,
        lr=config.optim.lr,
        mtp_weight=fixture.MTP_WEIGHT,
        bias_speed=fixture.BIAS_SPEED,
    )
    margins = [float("inf")]

    def decided(router: Router, arguments: tuple[torch.Tensor, ...], result: Any) -> None:
        raw_TE = torch.sigmoid(arguments[0].flatten(0, -2).float() @ router.weight.float().T)
        margins.append(fixture.margin(raw_TE, router.expert_bias, config.model))

    for _, router in model.routers():
        router.register_forward_hook(decided)
    results: list[step.StepResult] = []
    gradients: list[Piece] = []
    for _ in range(steps):
        results.append(step.train_step(model, adam, mine, next_token, plan, clip=config.optim.clip))
        if not gradients:
            _gather_gradients(model)
            gradients = pieces(model, lambda t: getattr(t, "main_grad", None))
    model.settle()
    return Trained(
        results,
        gradients,
        pieces(model, lambda t: None if isinstance(t, torch.nn.Parameter) else t),
        pieces(model, lambda t: t if isinstance(t, torch.nn.Parameter) else None),
        min(margins),
    )


def _gather_gradients(model: models.Model) -> None:
    """With ZeRO-1 a rank has reduced its own shard of the gradients only: fetch the others' into the buffers."""
    for chunk in model.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            if not chunk.ddp_config.use_distributed_optimizer or group.size() == 1:
                continue
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gradients(config: Config, weights: dict[str, torch.Tensor], batch: Any, mtp_weight: float) -> dict[str, Any]:
    """One global batch (a list of micro-batches, dealt over data-parallel ranks) through this layout.

    Returns this rank's view: `sums` [2, 1+D], `load` [layers, E], `balance` and `pairs` [2] as `step.forward_backward`
    gives them, and pieces for `named`: `gradients`, and `biases` after the step. `config.parallel.zero1` must be False,
    so that every data-parallel rank holds whole gradients.
    """
    model, dp = _start(config)
    load(config, model, weights)
    mine = batch[parallel_state.get_data_parallel_rank() :: dp]
    found = step.forward_backward(model, mine, next_token, mtp_weight, bias_speed=1e-3)
    return {
        "sums": found.sums,
        "load": found.load_LE,
        "balance": found.balance,
        "pairs": found.pairs,
        "gradients": pieces(model, lambda t: getattr(t, "main_grad", None)),
        "biases": pieces(model, lambda t: None if isinstance(t, torch.nn.Parameter) else t),
    }
