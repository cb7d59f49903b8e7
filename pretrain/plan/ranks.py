"""Elements and bytes on a rank of a layout, by formula: what `counts.py` counts, shared out by `stages.py`'s map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from perilune.parallel.pipeline import Stage
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan import vision_counts
from perilune.pretrain.plan.counts import layer_weights
from perilune.pretrain.plan.stages import NO_VISION, stages_of
from perilune.pretrain.plan.vision_counts import NO_CONTRASTIVE
from perilune.pretrain.schema import Config, Contrastive, Model, Parallel, Vision


@dataclass(frozen=True)
class RankCount:
    """Elements on one rank. Router biases are buffers: neither trained nor in the sums of weights."""

    dense: int  # trained weights whose gradients are summed over all data-parallel (and context-parallel) ranks
    experts: int  # routed experts, summed over the ranks that hold the same ones
    embedding: int  # of `dense`: the word embedding, with MTP's copy where the stage is not the first
    head: int  # of `dense`: the output matrix, with a tied embedding's copy
    router_bias: int
    vectors: int  # of `dense`: what AdamW updates beside Muon: embedding, head, vectors, what reads pixels

    @property
    def total(self) -> int:
        """Trained weights."""
        return self.dense + self.experts


def parameters_per_rank(
    model: Model,
    parallel: Parallel,
    pp_rank: int,
    vision: Vision = NO_VISION,
    contrastive: Contrastive = NO_CONTRASTIVE,
    frozen: Sequence[str] = (),
) -> RankCount:
    """Elements on every rank of pipeline rank `pp_rank`; equal over tp, ep and data-parallel ranks.

    Without the parts that are `frozen` (`train.freeze`), their router biases too: what has gradients and moments.
    Raises InputError where a size does not divide by its degree, or `pp_rank` is not one of `parallel.pp`.
    """
    _check_divides(model, parallel)
    if not 0 <= pp_rank < parallel.pp:
        raise InputError(f"pp_rank={pp_rank} must be at least 0 and less than parallel.pp={parallel.pp}")
    stages = stages_of(model, parallel, vision)[pp_rank :: parallel.pp]
    chunks = [RankCount(0, 0, 0, 0, 0, 0)]
    for stage in stages:
        if "language_model" not in frozen:
            chunks.append(_stage_count(model, parallel, stage))
        if stage.embedding:
            chunks.append(_seeing(model, parallel.tp, vision, contrastive, frozen))
    return RankCount(**{name: sum(getattr(c, name) for c in chunks) for name in RankCount.__dataclass_fields__})


def _seeing(model: Model, tp: int, vision: Vision, contrastive: Contrastive, frozen: Sequence[str]) -> RankCount:
    """What goes with the embedding of the first stage: tower, projector, and what images are compared with."""
    dense = vision_counts.per_rank(vision, model.hidden_size, tp).without(frozen)
    vectors = vision_counts.vectors_per_rank(vision, model.hidden_size, tp).without(frozen)
    if "contrastive" not in frozen:
        dense += vision_counts.contrastive_per_rank(contrastive, vision, model.vocab_size, tp)
        vectors += vision_counts.contrastive_vectors_per_rank(contrastive, vision, model.vocab_size, tp)
    return RankCount(dense=dense, experts=0, embedding=0, head=0, router_bias=0, vectors=vectors)


def _stage_count(model: Model, parallel: Parallel, stage: Stage) -> RankCount:
    """One chunk of the language model: its layers, and what goes with embedding, MTP and loss."""
    layers = list(stage.layers) + [model.num_layers + k for k in range(stage.mtp)]
    weights = [w for layer in layers for w in layer_weights(model, layer) if w.part != "router_bias"]
    vocabulary = model.vocab_size * model.hidden_size // parallel.tp
    embedding = vocabulary if stage.embedding or stage.mtp else 0  # MTP embeds its tokens itself
    has_it_already = model.tie_word_embeddings and embedding > 0
    head = vocabulary if stage.loss and not has_it_already else 0
    dense = sum(w.numel // (parallel.tp if w.over == "tp" else 1) for w in weights if w.over != "experts")
    vectors = embedding + head + sum(w.numel for w in weights if len(w.shape) == 1)
    if stage.final_norm:
        dense += model.hidden_size
        vectors += model.hidden_size
    return RankCount(
        dense=dense + embedding + head,
        experts=sum(w.numel // (parallel.ep * parallel.etp) for w in weights if w.over == "experts"),
        embedding=embedding,
        head=head,
        router_bias=sum(w.numel for layer in layers for w in layer_weights(model, layer) if w.part == "router_bias"),
        vectors=vectors,
    )


def _check_divides(model: Model, parallel: Parallel) -> None:
    """Every split dim must divide by its degree: nothing is padded."""
    checks = [
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tp", parallel.tp),
        ("model.vocab_size", model.vocab_size, "parallel.tp", parallel.tp),
    ]
    kinds = {0, model.num_layers - 1, model.num_layers}  # a first layer, a last one, an MTP layer
    for weight in (w for layer in sorted(kinds) for w in layer_weights(model, layer)):
        size = weight.shape[weight.split_dim]
        if weight.over == "tp":
            checks.append((f"dim {weight.split_dim} of {weight.name}", size, "parallel.tp", parallel.tp))
        elif weight.over == "experts":
            checks.append(("model.n_routed_experts", weight.copies, "parallel.ep", parallel.ep))
            checks.append((f"dim {weight.split_dim} of {weight.name}", size, "parallel.etp", parallel.etp))
    for what, size, name, degree in checks:
        if size % degree:
            raise InputError(f"{what} = {size} must divide by {name}={degree}: choose another degree or another size")


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank that last through a run; activations and buffers of the moment come on top."""

    weights: float
    gradients: float
    optimizer: float  # masters, two moments of AdamW's weights or one of Muon's, and the average of the weights

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def bytes_per_rank(
    model: Model,
    parallel: Parallel,
    pp_rank: int,
    world_size: int,
    compute: Literal["fp32", "bf16"],
    vision: Vision = NO_VISION,
    contrastive: Contrastive = NO_CONTRASTIVE,
    optimizer: Literal["adamw", "muon"] = "adamw",
    average: bool = False,
    frozen: Sequence[str] = (),
) -> RankBytes:
    """Weights, FP32 gradients and the state of Megatron-core's distributed optimizer (ZeRO-1), in bytes.

    An element costs 4 for its weight in fp32 or 2 in bf16, 4 for its gradient, and 8 for AdamW's moments or 4 for
    Muon's, with 4 for the FP32 master that bf16 needs and 4 for the `average` of the weights, where there is one. With
    `zero1` the optimizer's part is divided over the data-parallel ranks: for dense weights world / (tp pp),
    context-parallel ranks included, for experts world / (pp ep etp). Beside Muon, AdamW's part is counted as if it were
    spread evenly. What is `frozen` (`train.freeze`) has its weights alone.

    Raises InputError as `parameters_per_rank`, and where `world_size` does not divide by the degrees.
    """
    whole = parameters_per_rank(model, parallel, pp_rank, vision, contrastive)
    count = parameters_per_rank(model, parallel, pp_rank, vision, contrastive, frozen)
    dense_product = parallel.tp * parallel.pp * parallel.cp
    expert_product = parallel.pp * parallel.ep * parallel.etp
    if world_size % dense_product or world_size % expert_product:
        raise InputError(
            f"{world_size} processes must divide by tp x pp x cp = {parallel.tp} x {parallel.pp} x {parallel.cp} = "
            f"{dense_product} and by pp x ep x etp = {parallel.pp} x {parallel.ep} x {parallel.etp} = {expert_product}"
        )
    weight = {"fp32": 4, "bf16": 2}[compute]
    master = {"fp32": 0, "bf16": 4}[compute]
    besides = master + (4 if average else 0)
    matrix = besides + {"adamw": 8, "muon": 4}[optimizer]
    dense = matrix * (count.dense - count.vectors) + (besides + 8) * count.vectors
    dense_share = world_size // (parallel.tp * parallel.pp) if parallel.zero1 else 1
    expert_share = world_size // expert_product if parallel.zero1 else 1
    return RankBytes(
        weights=weight * whole.total,
        gradients=4 * count.total,
        optimizer=dense / dense_share + matrix * count.experts / expert_share,
    )


def rank_table(config: Config, world_size: int) -> str:
    """Elements and bytes of the distinct kinds of pipeline rank, a line each. Raises as `bytes_per_rank`."""
    model, parallel, seen = config.model, config.parallel, (config.vision, config.contrastive)
    compute: Literal["fp32", "bf16"] = "fp32" if config.precision.compute == "fp32" else "bf16"
    heads = f"{'weights GiB':>13}{'grads GiB':>13}{'optimizer GiB':>15}"
    lines = [f"{'pipeline ranks':<16}{'dense':>18}{'experts':>18}{heads}"]
    for count, group in groupby(range(parallel.pp), key=lambda r: parameters_per_rank(model, parallel, r, *seen)):
        ranks = list(group)
        optim = config.optim.name, config.optim.ema_decay > 0
        frozen = config.train.freeze
        held = bytes_per_rank(model, parallel, ranks[0], world_size, compute, *seen, *optim, frozen)
        name = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        lines.append(
            f"{name:<16}{count.dense:>18,}{count.experts:>18,}"
            + f"{held.weights / 2**30:>13.3f}{held.gradients / 2**30:>13.3f}{held.optimizer / 2**30:>15.3f}"
        )
    return "\n".join(lines)
