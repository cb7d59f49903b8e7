"""Errors planted in a layout's run, one at a time: each is known from some training stack, and the matrix must see it.

`train` runs in worker processes that stay alive, so an error is taken out again when its run has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from perilune.kernels.attention import Pieces, image_attention, piecewise_attention, varlen_attention
from perilune.moe import attention, backbone
from perilune.moe.attention import LatentAttention
from perilune.moe.experts import GroupedExperts
from perilune.moe.norm import RMSNorm
from perilune.moe.router import Router
from perilune.parallel import context
from perilune.pretrain import step
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim.exchange import Exchange
from perilune.pretrain.parity import fixture, probe
from perilune.vision import moonvit, vlm

Patch = pytest.MonkeyPatch
FINALIZE = sys.modules["megatron.core.distributed.finalize_model_grads"]  # its package has a function of that name


def rope_key_not_summed(patch: Patch) -> None:
    """Megatron-core 0.19 as shipped: what other ranks' heads send to the RoPE key is lost."""
    patch.setattr(LatentAttention, "_qkv_down_projection", MLASelfAttention._qkv_down_projection)


def paired_messages(patch: Patch) -> None:
    """Megatron-core 0.19 as shipped: batched messages to a rank that is both previous and next are mixed up."""
    right = backbone.transformer_config

    def wrong(config: Any) -> Any:
        made = right(config)
        made.overlap_p2p_comm, made.batch_p2p_comm = False, True
        return made

    patch.setattr(backbone, "transformer_config", wrong)


def mtp_by_micro_batch(patch: Patch) -> None:
    """Megatron-core 0.19 as shipped: MTP's loss is scaled by each micro-batch's own ratio of counts."""

    def wrong(losses: torch.Tensor, batch: PackedBatch, mtp_weight: float) -> Any:
        counts = batch.loss_mask.sum(-1)
        ratio = float(counts[0] / counts[1:].sum().clamp(min=1)) * (len(counts) - 1)
        return next_token(losses, batch, mtp_weight * ratio)

    patch.setattr(probe, "next_token", wrong)


def mean_of_means(patch: Patch) -> None:
    """Each micro-batch's mean, averaged: tokens of short ones weigh more."""

    def wrong(losses: torch.Tensor, batch: PackedBatch, mtp_weight: float, *, objective: Any, tokens: float) -> Any:
        del tokens
        total, count, metrics = objective(losses, batch, mtp_weight)
        return total / count.clamp(min=1) / (fixture.ROWS // batch.rows), count, metrics

    patch.setattr(step, "mean_over", wrong)


def bias_of_own_load(patch: Patch) -> None:
    """The router bias follows this rank's tokens only."""

    def wrong(tokens: torch.Tensor, bias: torch.Tensor, rate: float, *groups: Any, **more: Any) -> torch.Tensor:
        return bias + torch.sign(tokens.mean(-1, keepdim=True) - tokens) * rate

    patch.setattr(FINALIZE, "get_updated_expert_bias", wrong)


def balance_by_tp(patch: Patch) -> None:
    """The balance loss counts once for every tensor-parallel rank."""
    right = Router._sequence_balance
    patch.setattr(Router, "_sequence_balance", lambda self, scores: right(self, scores) * self.tp_group.size())


def balance_of_own_tokens(patch: Patch) -> None:
    """The balance loss counts experts among this rank's tokens of a row only."""
    patch.setattr("perilune.moe.router.dist.all_reduce", lambda *arguments, **more: None)


def rope_restarts_late(patch: Patch) -> None:
    """A document's first token has the position after the last one of the document before.

    (Positions that never restart would change nothing: RoPE sees only differences inside a document.)
    """
    _positions(patch, lambda packed: packed.positions_T.roll(1) + 1)


def local_positions(patch: Patch) -> None:
    """Positions count this rank's part of a document from 0."""

    def wrong(packed: Any) -> torch.Tensor:
        at = packed.positions_T
        starts = torch.nn.functional.pad((at.diff() != 1).nonzero()[:, 0] + 1, (1, 0))
        lengths = torch.diff(starts, append=torch.tensor([len(at)]))
        return torch.arange(len(at)) - starts.repeat_interleave(lengths)

    _positions(patch, wrong)


def _positions(patch: Patch, wrong: Callable[[Any], torch.Tensor]) -> None:
    right = step.packed_params

    def planted(*arguments: Any) -> Any:
        packed = right(*arguments)
        return replace(packed, positions_T=wrong(packed), longest=packed.longest + len(packed.positions_T))

    patch.setattr(step, "packed_params", planted)


def attention_leaks(patch: Patch) -> None:
    """Attention sees the documents before."""

    def wrong(q: Any, k: Any, v: Any, bounds: torch.Tensor, longest: int, *rest: Any) -> torch.Tensor:
        return varlen_attention(q, k, v, bounds[[0, -1]], int(bounds[-1]), *rest)

    patch.setattr(attention, "varlen_attention", wrong)


def attention_leaks_over_cuts(patch: Patch) -> None:
    """Context parallelism: a rank's part of a document sees the documents before."""

    def wrong(q: Any, k: Any, v: Any, pieces: Pieces, *rest: Any) -> torch.Tensor:
        return piecewise_attention(q, k, v, replace(pieces, keys=tuple((0, end) for _, end in pieces.keys)), *rest)

    patch.setattr(attention, "piecewise_attention", wrong)


def counted_when_recomputed(patch: Patch) -> None:
    """A recomputed layer counts its tokens in both of its passes."""
    right = Router.routing

    def wrong(self: Router, *arguments: Any, **more: Any) -> Any:
        probs, chosen = right(self, *arguments, **more)
        if self.training and not torch.is_grad_enabled():
            self.load_E += chosen.sum(0)
        return probs, chosen

    patch.setattr(Router, "routing", wrong)


def gate_gradient_lost(patch: Patch) -> None:
    """The experts' output does not lead back to the gate."""
    right = GroupedExperts.forward
    patch.setattr(GroupedExperts, "forward", lambda self, x, counts, probs: right(self, x, counts, probs.detach()))


def shard_not_gathered(patch: Patch) -> None:
    """After the optimizer each rank keeps its own shard's new weights, and the others' old ones."""
    for kind, name in (
        (DistributedDataParallel, "start_param_sync"),
        (DistributedOptimizer, "start_param_sync_for_bucket_group_subset"),
    ):
        patch.setattr(kind, name, lambda *arguments, **more: None)


def expert_reduced_as_dense(patch: Patch) -> None:
    """Gradients of an expert are summed over ranks that hold another expert."""
    right = GroupedExperts.__init__

    def wrong(self: GroupedExperts, *arguments: Any, **more: Any) -> None:
        right(self, *arguments, **more)
        for weight in (self.w1, self.w2):
            weight.allreduce = True  # type: ignore[attr-defined]

    patch.setattr(GroupedExperts, "__init__", wrong)


def norm_not_summed(patch: Patch) -> None:
    """A norm's gradient is that of this rank's part of the sequence."""
    right = RMSNorm.__init__

    def wrong(self: RMSNorm, *arguments: Any, **more: Any) -> None:
        right(self, *arguments, **more)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    patch.setattr(RMSNorm, "__init__", wrong)


def embeddings_apart(patch: Patch) -> None:
    """The embedding of MTP's stage and that of the first stage go their own ways."""
    patch.setattr(FINALIZE, "_allreduce_word_embedding_grads", lambda *arguments, **more: None)


def key_gradient_split(patch: Patch) -> None:
    """Context parallelism: a key's gradient from other ranks' queries is lost."""

    def wrong(x: torch.Tensor, order: torch.Tensor, group: Any) -> torch.Tensor:
        whole = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)
        return whole.index_select(0, order)

    patch.setattr(context, "gather", wrong)


def keys_out_of_order(patch: Patch) -> None:
    """Context parallelism: gathered keys stay in the order of the ranks."""
    patch.setattr(context, "gather", lambda x, order, group: gather_from_sequence_parallel_region(x, group=group))


def mtp_inside_the_cut(patch: Patch) -> None:
    """Context parallelism: MTP's tokens are shifted within this rank's part, past the cut."""
    right = PackedBatch.take

    def wrong(self: PackedBatch, index: torch.Tensor) -> PackedBatch:
        taken = right(self, index)
        shifted = taken.inputs[:1].roll(-1, dims=-1)
        return replace(taken, inputs=torch.cat((taken.inputs[:1], shifted, taken.inputs[2:])))

    patch.setattr(PackedBatch, "take", wrong)


def image_gradient_split(patch: Patch) -> None:
    """Sequence parallelism: what other ranks' tokens say of an image is lost."""
    patch.setattr(vlm, "copy_to_tensor_model_parallel_region", lambda x, group: x)


def images_see_each_other(patch: Patch) -> None:
    """Attention in the tower does not end with the image."""

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *rest: Any) -> torch.Tensor:
        return image_attention(q, k, v, bounds[[0, -1]], *rest)

    patch.setattr(moonvit, "image_attention", wrong)


def images_by_the_cut(patch: Patch) -> None:
    """Context parallelism: features go where their tokens stood in the whole pack."""
    right = vlm.images_of

    def wrong(patches: Any, grids: Any, index: torch.Tensor, tokens: int, held: Any, split: Any) -> Any:
        found = right(patches, grids, index, tokens, None, split)
        inside = found.places_F < held.numel()
        return replace(found, features_F=found.features_F[inside], places_F=found.places_F[inside])

    patch.setattr(vlm, "images_of", wrong)


def pieces_lost(patch: Patch) -> None:
    """Muon: what other ranks hold of a matrix does not arrive, so that each part is made orthogonal by itself."""
    right = Exchange.together

    def wrong(self: Exchange, one: Any, *rest: Any) -> Any:
        return right(self, replace(one, travels=False), *rest)

    patch.setattr(Exchange, "together", wrong)


def train(mutation: Callable[[Patch], None], *arguments: Any) -> probe.Trained:
    """`probe.train` with an error planted."""
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        return probe.train(*arguments)
