"""A model's stage map: from `parallel.layout`, or balanced by the model's FLOPs. Pure; no process needed."""

from __future__ import annotations

from functools import lru_cache

from perilune.parallel import pipeline
from perilune.parallel.mesh import LayoutError
from perilune.parallel.pipeline import Stage, StageMap, Work
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.vision_counts import image_flops
from perilune.pretrain.schema import Model, Parallel, Vision

NO_VISION = Vision()


def stages_of(model: Model, parallel: Parallel, vision: Vision = NO_VISION) -> tuple[Stage, ...]:
    """The pp x vpp chunks in the order that a token passes them; chunk c is on pipeline rank c % pp.

    Raises InputError where the layers are too few for them, or the layout does not hold exactly this model.
    """
    return stage_map(model, parallel, vision).stages


def layout_of(model: Model, parallel: Parallel, vision: Vision = NO_VISION) -> str | None:
    """The layout string that Megatron-core builds `stages_of` from; None without a pipeline. Raises as `stages_of`."""
    return stage_map(model, parallel, vision).layout if parallel.pp > 1 else None


def picture(model: Model, parallel: Parallel, vision: Vision = NO_VISION) -> str:
    """The stage map as text, a line each pipeline rank, and of what the costs are. Raises as `stages_of`."""
    drawn = stage_map(model, parallel, vision).describe(work_of(model, vision))
    return f"{drawn} (forward, rows of {model.max_position_embeddings})"


def stage_map(model: Model, parallel: Parallel, vision: Vision = NO_VISION) -> StageMap:
    """The map that `parallel.layout` gives, or the balanced one. Raises as `stages_of`."""
    layers, mtp, layout = model.num_layers, model.num_nextn_predict_layers, parallel.layout
    if layout is None and parallel.pp * parallel.vpp == 1:
        layout = "E" + "t" * layers + "m" * mtp + "L"  # nothing to balance
    try:
        if layout is None:
            return pipeline.balance(work_of(model, vision), parallel.pp, parallel.vpp)
        return pipeline.read(layout, layers=layers, mtp=mtp, pp=parallel.pp, vpp=parallel.vpp)
    except LayoutError as error:
        raise InputError(str(error)) from error


@lru_cache(maxsize=64)
def work_of(model: Model, vision: Vision = NO_VISION) -> Work:
    """What each part costs in forward FLOPs a token of a row as long as the model takes; the look-up of embeddings, 0.

    With the embedding stand tower and projector, which a row costs by `vision.token_share` and not by its own images.
    Not of `data.seq_len`, so that whoever knows the model and the degrees knows the map. Raises InputError for sizes
    of which no cost follows.
    """
    flops = flops_per_token(model, model.max_position_embeddings)
    dense = sum(i < model.first_k_dense_replace or not model.n_routed_experts for i in range(model.num_layers))
    moe, mtp = max(0, model.num_layers) - dense, model.num_nextn_predict_layers
    attention = (flops.attention_projections + flops.attention_scores) / max(1, model.num_layers)
    experts = flops.router + flops.routed_experts + flops.shared_experts
    images = image_flops(vision, model.hidden_size).patch * vision.merge_size**2 * vision.token_share
    try:
        return Work(
            dense_layers=dense,
            moe_layers=moe,
            mtp_layers=mtp,
            embedding=images,
            dense=attention + flops.dense_ffn / dense if dense else 0.0,
            moe=attention + experts / moe if moe else 0.0,
            mtp=flops.mtp / mtp if mtp else 0.0,
            head=flops.head,
        )
    except LayoutError as error:
        raise InputError(str(error)) from error
