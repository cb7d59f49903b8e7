"""Which layers a pipeline stage holds: Megatron's layout string read and checked, or the map that balances the work.

Pure: numbers and text, no process. A *chunk* is a whole pipeline rank or, interleaved, one of its vpp parts; a token
passes the chunks in order, and chunk c is on rank c % pp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import groupby
from typing import Any, NamedTuple

from perilune.parallel.mesh import LayoutError

# An empty chunk is worth it if it saves more than a hundredth: chunks of one rank become less alike, and an interleaved
# schedule pays for that.
_WORTH = 100
_LONGEST = 100_000  # letters of a layout, beyond any model: a typo such as t*6100000000 is an error, not all memory


@dataclass(frozen=True)
class Stage:
    """One chunk."""

    layers: tuple[int, ...]  # indices of decoder layers
    embedding: bool
    mtp: int  # MTP layers
    loss: bool  # head and loss
    final_norm: bool  # with the last decoder layer where there is MTP, which reads it; else with the loss


@dataclass(frozen=True)
class Work:
    """A decoder as a pipeline sees it: its layers, dense ones first, and what one of each part costs.

    Costs are forward FLOPs a token; only their ratios matter to the map.
    """

    dense_layers: int
    moe_layers: int
    mtp_layers: int
    embedding: float
    dense: float
    moe: float
    mtp: float
    head: float

    def __post_init__(self) -> None:
        layers = (self.dense_layers, self.dense), (self.moe_layers, self.moe), (self.mtp_layers, self.mtp)
        if min(self.embedding, self.head, *(n for n, _ in layers)) < 0 or any(n and cost <= 0 for n, cost in layers):
            raise LayoutError(f"{self}: a layer must cost something and nothing less than 0; check the model's sizes")

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers

    def of(self, stage: Stage) -> float:
        """Cost of a chunk."""
        dense = sum(layer < self.dense_layers for layer in stage.layers)
        layers = dense * self.dense + (len(stage.layers) - dense) * self.moe
        return stage.embedding * self.embedding + layers + stage.mtp * self.mtp + stage.loss * self.head


@dataclass(frozen=True)
class StageMap:
    """The pp x vpp chunks in the order that a token passes them, and the layout string that says so to Megatron."""

    layout: str
    stages: tuple[Stage, ...]
    pp: int

    def loads(self, work: Work) -> list[float]:
        """Cost of every pipeline rank: the sum of its chunks."""
        return [sum(work.of(stage) for stage in self.stages[rank :: self.pp]) for rank in range(self.pp)]

    def imbalance(self, work: Work) -> float:
        """Cost of the most loaded rank over the mean; 1 is perfect, and 1 - 1/imbalance the share of time lost."""
        loads = self.loads(work)
        return max(loads) * self.pp / sum(loads)

    def describe(self, work: Work) -> str:
        """The map as text, a line each pipeline rank: its chunks' parts, GFLOP a token (forward), share, bar."""
        loads = self.loads(work)
        held = [" | ".join(_parts(stage, work) for stage in self.stages[rank :: self.pp]) for rank in range(self.pp)]
        width = max(map(len, held))
        lines = [f"pipeline stages: {self.layout}", f"{'stage':>5}  {'holds':<{width}}  {'GFLOP/token':>11}  share"]
        for rank, (parts, load) in enumerate(zip(held, loads, strict=True)):
            bar = "#" * round(30 * load / max(loads))
            lines.append(f"{rank:>5}  {parts:<{width}}  {load / 1e9:>11.4g}  {load / sum(loads):>5.1%}  {bar}")
        lines.append(f"most loaded: stage {loads.index(max(loads))}, {self.imbalance(work):.3f} of the mean")
        return "\n".join(lines)


def _parts(stage: Stage, work: Work) -> str:
    """The parts of a chunk in a token's order, such as `E, dense 0-2, MoE 3`."""
    parts = ["E"] if stage.embedding else []
    for is_dense, group in groupby(stage.layers, key=lambda layer: layer < work.dense_layers):
        first, *rest = group
        parts.append(f"{'dense' if is_dense else 'MoE'} {first}" + (f"-{rest[-1]}" if rest else ""))
    if stage.mtp:
        parts.append("MTP" if stage.mtp == 1 else f"MTP x{stage.mtp}")
    return ", ".join([*parts, "head"] if stage.loss else parts) or "nothing"


def parse(layout: str) -> tuple[str, ...]:
    """The chunks of Megatron's layout string in full: `E,t*2|(t|)*2tmL` -> `("Ett", "t", "t", "tmL")`.

    E embedding, t decoder layer, m MTP layer, L head and loss, | between chunks, x*n and (...)*n repeats, commas for
    the eye. Reads what Megatron-core's `PipelineParallelLayerLayout.parse_str_to_list` reads, up to a length.

    Raises LayoutError where other characters remain, or far too many.
    """
    text = layout.replace(",", "")
    for repeat in (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)")):  # groups, which do not nest; letters
        counts = [(len(found[1]), found[2]) for found in repeat.finditer(text)]
        if any(len(count) > 9 for _, count in counts) or sum(n * int(count) for n, count in counts) > _LONGEST:
            raise LayoutError(f"parallel.layout={layout!r} repeats beyond {_LONGEST} letters: use smaller factors")
        text = repeat.sub(lambda found: found[1] * int(found[2]), text)
    unknown = sorted(set(text) - set("EtmL|"))
    if unknown:
        raise LayoutError(
            f"parallel.layout={layout!r} has {' '.join(map(repr, unknown))} beside E, t, m, L, |, x*n and (...)*n "
            "(groups do not nest): write it as in 'Et*4|(tttt|)*14tmL'"
        )
    return tuple(text.split("|"))


def read(layout: str, *, layers: int, mtp: int, pp: int, vpp: int = 1) -> StageMap:
    """The map that `layout` spells for a decoder of `layers` and `mtp` layers on pp x vpp chunks.

    Takes what Megatron-core's `validate_layer_layout` takes, chunks without a layer too, but for two things. MTP away
    from the loss: Megatron-core 0.19 then computes wrong gradients of embedding and head, or hangs. And an empty chunk
    before E or after L: it builds the embedding in the first chunk and the loss in the last, whatever is written.

    Raises LayoutError for these, for another decoder or order, and for another number of chunks.
    """
    chunks = parse(layout)
    said = f"parallel.layout={layout!r}"
    if len(chunks) != pp * vpp:
        fits = f"set parallel.vpp={len(chunks) // pp}" if len(chunks) % pp == 0 else "add or take away a |"
        raise LayoutError(
            f"{said} has {len(chunks)} chunks, but parallel.pp x parallel.vpp = {pp} x {vpp} = {pp * vpp}: {fits}"
        )
    flat = "".join(chunks)
    if flat != "E" + "t" * layers + "m" * mtp + "L":
        raise LayoutError(
            f"{said} has {', '.join(f'{flat.count(letter)} {letter}' for letter in 'EtmL')}: it must have one E, then "
            f"model.num_layers={layers} t, model.num_nextn_predict_layers={mtp} m and one L, in this order"
        )
    if not chunks[0] or not chunks[-1]:
        raise LayoutError(f"{said} must have E in its first chunk and L in its last one: move the | away from the ends")
    if "m" in "".join(chunks[:-1]):
        raise LayoutError(
            f"{said} has MTP (m) apart from the loss (L), where Megatron-core computes wrong gradients or hangs: "
            f"end it with {'m' * mtp}L in one chunk"
        )
    return StageMap(layout, _stages([chunk.count("t") for chunk in chunks], mtp), pp)


def _stages(sizes: list[int], mtp: int) -> tuple[Stage, ...]:
    """The chunks of a decoder that hold `sizes` layers each."""
    last = len(sizes) - 1
    norm_at = max((c for c, size in enumerate(sizes) if size), default=last) if mtp else last
    return tuple(
        Stage(
            layers=tuple(range(sum(sizes[:c]), sum(sizes[: c + 1]))),
            embedding=c == 0,
            mtp=mtp if c == last else 0,
            loss=c == last,
            final_norm=c == norm_at,
        )
        for c in range(len(sizes))
    )


def _spell(sizes: list[int], mtp: int) -> str:
    """The layout string of chunks of `sizes` layers, short: repeats of a letter from 5 on, of a chunk from 3 on."""
    chunks = ["t" * size if size < 5 else f"t*{size}" for size in sizes]
    chunks[0] = "E" + chunks[0]
    text = ""
    for chunk, group in groupby(chunks[:-1]):
        count = len(list(group))
        text += f"({chunk}|)*{count}" if count > 2 else f"{chunk}|" * count
    return f"{text}{chunks[-1]}{'m' * mtp}L"


# --- balance --------------------------------------------------------------------------------------------------------
#
# Layers are of two kinds, dense before MoE, so a rank's cost follows from how many of each it holds, in whichever of
# its chunks. Hence: fix which chunks hold which kind (few ways, as dense layers are few); for each chunk list the
# (dense, MoE) that it may hold; join chunks to ranks and ranks to the whole, keeping the best of each (dense, MoE).

_Options = dict[tuple[int, int], Any]  # (dense layers, MoE layers) that may be held -> the best way to, by `<`


class _Plan(NamedTuple):
    """What some chunks hold, compared field by field."""

    squares: int  # sum over the chunks
    hundredths: tuple[int, ...]  # cost of each chunk in hundredths of the mean chunk's
    cost: float  # of all, a whole number
    sizes: tuple[int, ...]  # decoder layers of each chunk

    def beside(self, other: _Plan) -> _Plan:
        return _Plan(
            self.squares + other.squares,
            self.hundredths + other.hundredths,
            self.cost + other.cost,
            self.sizes + other.sizes,
        )


@lru_cache(maxsize=64)
def balance(work: Work, pp: int, vpp: int = 1) -> StageMap:
    """The map on pp x vpp chunks whose most loaded rank costs least: exactly, but for what an empty chunk must save.

    The embedding is in the first chunk, MTP and loss in the last. Every chunk holds a decoder layer, but the last or
    the first, or both, hold none where layers are missing, or where the most loaded rank then costs less (by more
    than a hundredth), as beside a heavy head. Among maps that cost the same, fewer empty chunks win; then equal numbers
    of layers; then the least sum of the chunks' squared costs; then the lightest first rank, and so on (where a
    hundredth of the mean chunk's cost is no difference).

    Raises LayoutError where more than two layers are missing.
    """
    chunks = pp * vpp
    missing = max(0, chunks - work.layers)
    if missing > 2 or not work.layers:
        raise LayoutError(
            f"model.num_layers={work.layers} cannot fill parallel.pp x parallel.vpp = {pp} x {vpp} = {chunks} chunks, "
            "of which only the first (embedding) and the last (MTP, loss) may be without a layer: lower parallel.pp or "
            f"parallel.vpp, to {work.layers + 2} chunks at most, or say in parallel.layout which are empty"
        )
    exact = _integers(work)
    sizes = _even(work.layers, chunks, missing)
    bound = least = _most_loaded(exact, sizes, pp)
    best: list[list[_Options]] = []
    for empty in range(missing, 3):
        limit = least if empty == missing else least - least // _WORTH - 1
        found, load = _cheapest(exact, pp, _kinds(exact, chunks, empty), limit)
        if found:
            best, least = found, load
    if least < bound or len(set(sizes)) > 1:
        plans = []
        for ranks in best:
            light = [{held: plan for held, plan in options.items() if plan.cost <= least} for options in ranks]
            whole = (work.dense_layers, work.moe_layers)
            plans.append(_joined(whole, light, _Plan.beside)[whole])
        by_rank = min(plans).sizes
        sizes = [by_rank[rank * vpp + part] for part in range(vpp) for rank in range(pp)]
    return StageMap(_spell(sizes, work.mtp_layers), _stages(sizes, work.mtp_layers), pp)


def _integers(work: Work) -> Work:
    """The same ratios of costs in whole numbers: sums are then exact, and equal costs compare as equal."""
    names = ("embedding", "dense", "moe", "mtp", "head")
    exact = {name: Fraction(getattr(work, name)) for name in names}
    unit = math.lcm(*(cost.denominator for cost in exact.values()))
    return replace(work, **{name: int(cost * unit) for name, cost in exact.items()})


def _even(layers: int, chunks: int, missing: int) -> list[int]:
    """Numbers of layers as equal as they can be, with `missing` chunks of none at the ends."""
    filled = chunks - missing
    sizes = [layers * (c + 1) // filled - layers * c // filled for c in range(filled)]
    return [0] * (missing > 1) + sizes + [0] * (missing > 0)


def _most_loaded(work: Work, sizes: list[int], pp: int) -> int:
    """Cost of the most loaded rank, where costs are whole numbers."""
    return int(max(StageMap("", _stages(sizes, work.mtp_layers), pp).loads(work)))


def _kinds(work: Work, chunks: int, empty: int) -> Iterator[list[str]]:
    """Every way to say for each chunk which kinds of layer it holds: "d" dense, "m" MoE, "dm" both, "" none.

    None is held by `empty` chunks: by the last or the first, or by both.
    """
    filled = chunks - empty
    for with_dense in range(min(work.dense_layers, filled) + 1):
        for both in (0, 1):
            with_moe = filled - with_dense + both
            fits = both <= min(with_dense, with_moe) and with_moe <= work.moe_layers
            if fits and (with_dense > 0, with_moe > 0) == (work.dense_layers > 0, work.moe_layers > 0):
                kinds = ["d"] * (with_dense - both) + ["dm"] * both + ["m"] * (with_moe - both)
                for first in {0: [0], 1: [0, 1], 2: [1]}[empty]:
                    yield [""] * first + kinds + [""] * (empty - first)


def _cheapest(work: Work, pp: int, ways: Iterator[list[str]], limit: int) -> tuple[list[list[_Options]], int]:
    """The `ways` to fill the chunks whose most loaded rank costs least, as what each rank may hold; and this cost.

    Costs are whole numbers. Ways that cost more than `limit` are left out: if that is all, `limit` is given back.
    """
    whole = (work.dense_layers, work.moe_layers)
    best: list[list[_Options]] = []
    for kinds in ways:
        ranks = [_rank_options(work, kinds, rank, pp, limit) for rank in range(pp)]
        costs = [{held: plan.cost for held, plan in options.items()} for options in ranks]
        load = _joined(whole, costs, max).get(whole)
        if load is not None:
            best = [*(best if load == limit else []), ranks]
            limit = load
    return best, limit


def _rank_options(work: Work, kinds: list[str], rank: int, pp: int, bound: int) -> _Options:
    """What `rank` may hold in its chunks at a cost of at most `bound`: (dense, MoE) -> the best plan."""
    head, last = work.mtp_layers * work.mtp + work.head, len(kinds) - 1
    total = work.embedding + head + work.dense_layers * work.dense + work.moe_layers * work.moe
    own = range(rank, len(kinds), pp)
    fixed = work.embedding * (0 in own) + head * (last in own)
    with_dense, with_moe = (sum(kind in kinds[c] for c in own) for kind in "dm")
    spare = int(bound - fixed - with_dense * work.dense - with_moe * work.moe)  # beyond one layer of each kind a chunk
    if spare < 0:
        return {}
    more_dense = min(work.dense_layers - with_dense, spare // int(work.dense)) if with_dense else 0
    more_moe = min(work.moe_layers - with_moe, spare // int(work.moe)) if with_moe else 0
    chunks = []
    for c in own:
        options: _Options = {}
        for dense in range(1, more_dense + 2) if "d" in kinds[c] else [0]:
            for moe in range(1, more_moe + 2) if "m" in kinds[c] else [0]:
                cost = work.embedding * (c == 0) + head * (c == last) + dense * work.dense + moe * work.moe
                hundredths = round(100 * len(kinds) * cost / total)
                options[dense, moe] = _Plan(hundredths**2, (hundredths,), cost, (dense + moe,))
        chunks.append(options)
    held = _joined((with_dense + more_dense, with_moe + more_moe), chunks, _Plan.beside)
    return {layers: plan for layers, plan in held.items() if plan.cost <= bound}


def _joined(most: tuple[int, int], options: list[_Options], add: Callable[[Any, Any], Any]) -> _Options:
    """What all of `options` hold together, from one choice of each: (dense, MoE) -> the best `add` of the choices.

    Up to the `most` (dense, MoE).
    """

    def join(left: _Options, right: _Options) -> _Options:
        found: _Options = {}
        for (dense, moe), one in left.items():
            for (more_dense, more_moe), other in right.items():
                held = (dense + more_dense, moe + more_moe)
                if held[0] <= most[0] and held[1] <= most[1]:
                    value = add(one, other)
                    if held not in found or value < found[held]:
                        found[held] = value
        return found

    return reduce(join, options)
