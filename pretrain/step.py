"""One optimizer step: Megatron-core's pipeline schedule runs the objective, then all ranks agree on what follows.

L expert layers of the whole model (MTP's included), E routed experts, D the MTP depth.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from perilune.moe.backbone import packed_params
from perilune.parallel import context
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.model import Model
from perilune.pretrain.objective import Objective, captions_and_pairs, mean_over
from perilune.pretrain.optim.optimizer import update, update_rms
from perilune.pretrain.timetable import StepPlan


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on every rank."""

    loss: float  # next-token, mean over the global batch's counted tokens, nats
    mtp_loss: float | None  # mean over D of each depth's own mean; None without MTP
    aux_loss: float | None  # sum_i f_i P_i, mean over rows and expert layers (1 in perfect balance), without alpha
    grad_norm: float  # before clipping
    skipped: bool  # a loss or gradient was not finite: no weight, bias, moment or average changed
    load_LE: torch.Tensor | None  # routed tokens of each expert of each expert layer, global
    memory: int  # bytes: the largest rank's peak (allocated on GPU, resident on CPU)
    stop: bool  # some rank was asked to stop
    update_rms: float | None = None  # mean over Muon's matrices, before the learning rate; None without, or if skipped
    contrastive_loss: float | None = None  # mean over the global batch's pairs, nats; None without pairs
    pairs: int | None = None  # of the global batch; None where images are compared with nothing
    contrastive_scale: float | None = None  # what cosines are multiplied by
    contrastive_bias: float | None = None  # what is added to that; SigLIP's alone


class Reduced(NamedTuple):
    """What `forward_backward` returns, equal on every rank."""

    sums: torch.Tensor  # [2, 1+D] float64: sums and counts of the losses
    load_LE: torch.Tensor  # routed tokens of every layer of the model; zero where it has no experts
    balance: float  # the sum over expert layers of the mean over rows of sum_i f_i P_i
    pairs: torch.Tensor  # [2] float64: the contrastive loss's sum and the count of pairs
    scale: tuple[float, ...] = ()  # that the loss was computed with: scale, and SigLIP's bias


class Validation(NamedTuple):
    """Of a set, over all ranks."""

    loss: float  # next-token, nats a token
    bits_per_byte: float  # of UTF-8 text
    contrastive_loss: float | None = None  # mean over pairs, each beside a global batch's; None without pairs


def _forward(iterator: Iterator[PackedBatch], model: Any, objective: Objective, mtp_weight: float) -> tuple[Any, Any]:
    batch, device = next(iterator), meshes.device()
    given = models.images_for(model, batch)
    batch, cut = replace(batch, patches=batch.patches[:0]), None
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        rank = parallel_state.get_context_parallel_rank()
        cut = context.cut(batch.rows, batch.seq_len, batch.cu_seqlens, rank, size)
        batch, cut = batch.take(cut.index_Q), cut.to(device)
    batch = batch.to(device)
    outputs = model(
        input_ids=batch.inputs,
        position_ids=batch.positions[None],
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=packed_params(batch.cu_seqlens, batch.max_seqlen, cut),
        **given,
    )
    return outputs, partial(objective, batch=batch, mtp_weight=mtp_weight)


def _run_schedule(
    model: Model, batches: list[PackedBatch], objective: Objective, mtp_weight: float, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    first = batches[0]
    iterators = [iter(batches) for _ in model.chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward, objective=objective, mtp_weight=mtp_weight),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(batches),
        seq_length=first.rows * first.seq_len,  # a pack is one sequence to the pipeline's messages
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _loss_sums(outputs: list[dict[str, torch.Tensor]], depths: int) -> torch.Tensor:
    """[2, depths] float64: sums and counts of this rank's micro-batches, once for all tensor-parallel ranks."""
    total = torch.zeros(2, depths, dtype=torch.float64, device=meshes.device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for out in outputs:
            total += torch.stack((out["sums"], out["counts"])).double()
    return total


def _pair_sums(outputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """[2] float64: the contrastive loss's sum and the count of pairs, as `_loss_sums`."""
    total = torch.zeros(2, dtype=torch.float64, device=meshes.device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for out in outputs:
            total += out.get("pairs", 0)
    return total


def train_step(
    model: Model,
    optimizer: Any,
    batches: list[PackedBatch],
    objective: Objective,
    todo: StepPlan,
    *,
    clip: float,
    stop: bool = False,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches of a global batch, then the update.

    Weights, moments and router biases change only if the loss and every gradient are finite on every rank; weights,
    masters and moments only after `before_update` returns.
    """
    for group in optimizer.param_groups:
        group["lr"] = todo.lr
    optimizer.zero_grad()
    routers = model.routers()
    biases = [router.expert_bias.clone() for _, router in routers]
    found = forward_backward(model, batches, objective, todo.mtp_weight, todo.bias_speed)
    sums, load_LE = found.sums, found.load_LE
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    memory, bad, stop = _agree(not (math.isfinite(norm) and _finite(sums, found.pairs)), stop)
    if bad:
        for (_, router), bias in zip(routers, biases, strict=True):
            router.expert_bias.copy_(bias)
        rms = None
    else:
        before_update()
        _update(optimizer, norm, clip)
        rms = update_rms(optimizer)
    means = (sums[0] / sums[1].clamp(min=1)).tolist()
    used = load_LE.sum(-1) > 0
    balanced = bool(used.any()) and model.scales()[0].alpha > 0
    return StepResult(
        loss=means[0],
        mtp_loss=sum(means[1:]) / len(means[1:]) if len(means) > 1 else None,
        aux_loss=found.balance / int(used.sum()) if balanced else None,
        grad_norm=norm,
        skipped=bad,
        load_LE=load_LE[used] if bool(used.any()) else None,
        memory=memory,
        stop=stop,
        update_rms=rms,
        contrastive_loss=_mean(found.pairs),
        pairs=int(found.pairs[1]) if model.contrastive else None,
        contrastive_scale=found.scale[0] if found.scale else None,
        contrastive_bias=found.scale[1] if len(found.scale) > 1 else None,
    )


def _finite(*numbers: torch.Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in numbers)


def _mean(sum_and_count: torch.Tensor) -> float | None:
    total, count = sum_and_count.tolist()
    return total / count if count else None


def forward_backward(
    model: Model, batches: list[PackedBatch], objective: Objective, mtp_weight: float, bias_speed: float
) -> Reduced:
    """Gradients of a global batch into the chunks' buffers, divided by its main-loss tokens; router biases move.

    Where images are compared with texts, `objective` is the captions'.
    """
    config = model.megatron_config
    config.finalize_model_grads_func = _finalize
    config.moe_router_bias_update_rate = bias_speed
    tokens, rows, pairs = _counts(model, batches)
    for scale in model.scales():
        scale.tokens_per_row = batches[0].seq_len // parallel_state.get_context_parallel_world_size()
        scale.rows = rows
    if model.contrastive is not None:
        objective = _beside_pairs(objective, model.contrastive.caption_weight, tokens / max(pairs, 1.0))
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    mean = partial(mean_over, objective=objective, tokens=max(tokens, 1.0))
    outputs = _run_schedule(model, batches, mean, mtp_weight, forward_only=False)
    found = _reduce(model, outputs)
    return found._replace(balance=found.balance / rows)


def _finalize(chunks: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron-core's, but for its division by the tokens: the loss is divided, which spares a pass over gradients."""
    del num_tokens
    finalize_model_grads(chunks, None, **kwargs)


def _beside_pairs(captions: Objective, caption_weight: float, tokens_per_pair: float) -> Any:
    return partial(
        captions_and_pairs, captions=captions, caption_weight=caption_weight, tokens_per_pair=tokens_per_pair
    )


def _counts(model: Model, batches: list[PackedBatch]) -> list[float]:
    """The global batch's counted tokens, rows and pairs."""
    count = torch.tensor(
        [
            sum(float(b.loss_mask[0].sum()) for b in batches),
            sum(b.rows for b in batches),
            sum(len(pairs_of(b)) for b in batches) if model.contrastive is not None else 0,
        ],
        dtype=torch.float64,
        device=meshes.device(),
    )
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count.tolist()


def _reduce(model: Model, outputs: list[dict[str, torch.Tensor]]) -> Reduced:
    """All sums over all processes, in one message; that of the balance is not yet divided by rows."""
    config = model.megatron_config
    depths = 1 + (config.mtp_num_layers or 0)
    layers, experts = config.num_layers + (config.mtp_num_layers or 0), config.num_moe_experts or 0
    device = meshes.device()
    load = torch.zeros(layers, experts, dtype=torch.float64, device=device)
    balance = torch.zeros(1, dtype=torch.float64, device=device)
    for layer, router in model.routers():
        load[layer] += router.load_E
        balance += router.balance_sum
        router.load_E.zero_()
        router.balance_sum.zero_()
    parts = (_loss_sums(outputs, depths).flatten(), load.flatten(), balance, _pair_sums(outputs))
    message = torch.cat(parts)
    dist.all_reduce(message)
    sums, load, balance, pairs = message.cpu().split([len(part) for part in parts])
    scale = tuple(outputs[0]["scale"].tolist()) if outputs and "scale" in outputs[0] else ()
    return Reduced(sums.view(2, depths), load.view(layers, experts), float(balance), pairs, scale)


def _agree(bad: bool, stop: bool) -> tuple[int, bool, bool]:
    """(largest peak memory in bytes, whether any rank is bad, whether any asks to stop)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    message = torch.tensor([peak, bad, stop], dtype=torch.float64, device=meshes.device())
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    memory, any_bad, any_stop = message.tolist()
    return int(memory), bool(any_bad), bool(any_stop)


def _update(optimizer: Any, norm: float, clip: float) -> None:
    """Clip by the global norm and step, from Megatron-core's parts: its own `step` would not look at the norm."""
    if clip > 0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    update(optimizer)


@torch.no_grad()
def evaluate(model: Model, batches: Iterator[tuple[PackedBatch, int]], objective: Objective) -> Validation:
    """The losses over all ranks' batches with their bytes of text, of which each rank gives as many as the others."""
    depths = 1 + (model.megatron_config.mtp_num_layers or 0)
    if model.contrastive is not None:
        objective = _beside_pairs(objective, 1.0, 1.0)
    pairs = torch.zeros(2, dtype=torch.float64, device=meshes.device())
    total = torch.zeros(2, depths, dtype=torch.float64, device=meshes.device())
    bytes_counted = torch.zeros(1, dtype=torch.float64, device=meshes.device())
    model.train(False)
    # Interleaved stages pass micro-batches on in groups of pp; a short group is filled with what counts nothing.
    at_once = parallel_state.get_pipeline_model_parallel_world_size() if len(model.chunks) > 1 else 1
    for group in batched(batches, at_once):
        micro, size = [batch for batch, _ in group], sum(size for _, size in group)
        for scale in model.scales():
            scale.tokens_per_row = micro[0].seq_len // parallel_state.get_context_parallel_world_size()
        blank = replace(micro[0], loss_mask=torch.zeros_like(micro[0].loss_mask))
        micro += [blank] * (at_once - len(micro))
        outputs = _run_schedule(model, micro, objective, 0.0, forward_only=True)
        total += _loss_sums(outputs, depths)
        pairs += _pair_sums(outputs)
        ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
        if ranks == (0, 0) and parallel_state.is_pipeline_last_stage():
            bytes_counted += size
    model.train(True)
    message = torch.cat((total[:, 0], bytes_counted, pairs))
    dist.all_reduce(message)
    nats, count, size = message[:3].tolist()
    return Validation(nats / max(count, 1.0), nats / math.log(2) / max(size, 1.0), _mean(message[3:]))
