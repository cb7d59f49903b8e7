"""Which layers a pipeline stage holds, from the degrees or from Megatron's layout string. Pure; no process needed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Model, Parallel


@dataclass(frozen=True)
class Stage:
    """One model chunk: a whole pipeline rank, or one of its `vpp` parts."""

    layers: tuple[int, ...]  # indices of decoder layers
    embedding: bool
    mtp: int  # MTP layers
    loss: bool  # final norm, head and loss


def stages_of(model: Model, parallel: Parallel) -> tuple[Stage, ...]:
    """The pp x vpp chunks in the order that a token passes them; chunk c is on pipeline rank c % pp.

    Without a layout every chunk holds as many layers, embedding first, MTP and loss last.

    Raises InputError where the layers do not divide, or the layout does not hold exactly this model.
    """
    if parallel.layout is not None:
        return _parse(model, parallel)
    chunks = parallel.pp * parallel.vpp
    if model.num_layers % chunks:
        raise InputError(
            f"model.num_layers={model.num_layers} does not divide into parallel.pp x parallel.vpp = {parallel.pp} x "
            f"{parallel.vpp} = {chunks} chunks: choose degrees that divide it, or give parallel.layout"
        )
    each = model.num_layers // chunks
    return tuple(
        Stage(
            layers=tuple(range(c * each, (c + 1) * each)),
            embedding=c == 0,
            mtp=model.num_nextn_predict_layers if c == chunks - 1 else 0,
            loss=c == chunks - 1,
        )
        for c in range(chunks)
    )


def _parse(model: Model, parallel: Parallel) -> tuple[Stage, ...]:
    """The chunks of a layout: E embedding, t decoder layer, m MTP layer, L loss, | between chunks, x*n repeats."""
    text = (parallel.layout or "").replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):  # groups first, then single letters
        text = re.sub(pattern, lambda found: found.group(1) * int(found.group(2)), text)
    chunks = text.split("|")
    flat = "".join(chunks)
    wanted = "E" + "t" * model.num_layers + "m" * model.num_nextn_predict_layers + "L"
    if flat != wanted or len(chunks) != parallel.pp * parallel.vpp:
        raise InputError(
            f"parallel.layout={parallel.layout!r} has {len(chunks)} chunks with {flat.count('t')} layers and "
            f"{flat.count('m')} MTP layers: it must have parallel.pp x parallel.vpp = {parallel.pp * parallel.vpp} "
            f"chunks that hold E, {model.num_layers} t, {model.num_nextn_predict_layers} m and L, in this order"
        )
    if "m" in flat and "m" * model.num_nextn_predict_layers + "L" not in chunks[-1]:
        # On a stage without the loss, Megatron-core 0.19 hangs or computes wrong embedding and head gradients.
        raise InputError(f"parallel.layout={parallel.layout!r}: MTP must be in the chunk of the loss, as in '...tmL'")
    stages, first = [], 0
    for chunk in chunks:
        count = chunk.count("t")
        stages.append(Stage(tuple(range(first, first + count)), "E" in chunk, chunk.count("m"), "L" in chunk))
        first += count
    return tuple(stages)
