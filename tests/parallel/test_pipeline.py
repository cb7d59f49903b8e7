"""Stage maps: what Megatron-core reads from a layout string, and that no map is better balanced than ours."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from perilune.parallel.mesh import LayoutError
from perilune.parallel.pipeline import StageMap, Work, balance, parse, read
from perilune.pretrain import presets
from perilune.pretrain.plan.stages import work_of
from perilune.pretrain.schema import Parallel

LETTER = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
V3 = presets.get("deepseek_v3")
MOONLIGHT = presets.get("moonlight_16b_a3b")
UNIT = Work(dense_layers=0, moe_layers=8, mtp_layers=0, embedding=0, dense=0, moe=1, mtp=0, head=0)


def sizes(found: StageMap) -> list[int]:
    return [len(stage.layers) for stage in found.stages]


# --- strings --------------------------------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    """Something like a layout: pieces of its language, sometimes with what does not belong there."""
    pieces = ["E", "t", "tt", "m", "L", "|", ",", "t*3", "|*2", "m*0", "t*12", "(t|)*2", "(tt|t|)*3", "(Et,|)*1", "tmL"]
    stray = ["(", ")", "*", "2", "(t*2|)*2", "((t|)*2)*2", "()*2", "x", " ", "e", "t*", "*3", "t*2*2", "(t)*2*2", "\n"]
    chosen = [rng.choice(pieces) for _ in range(rng.randint(0, 7))]
    for _ in range(rng.choice([0, 0, 1, 2])):
        chosen.insert(rng.randint(0, len(chosen)), rng.choice(stray))
    return "".join(chosen)


def test_random_strings_are_read_as_megatron_reads_them() -> None:
    rng = random.Random(0)
    read_well = 0
    for _ in range(5000):
        text = random_text(rng)
        try:
            theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
        except AssertionError:
            with pytest.raises(LayoutError):
                parse(text)
        else:
            assert parse(text) == tuple("".join(LETTER[part] for part in chunk) for chunk in theirs), text
            read_well += 1
    assert 1000 < read_well < 4000


def megatron_takes(layout: str, layers: int, mtp: int, pp: int, vpp: int) -> bool:
    try:
        theirs = PipelineParallelLayerLayout(layout, pp)
        theirs.validate_layer_layout(layers, mtp or None)  # type: ignore[arg-type]
    except AssertionError:
        return False
    return bool(theirs.virtual_pipeline_model_parallel_size == vpp)


def test_random_maps_are_taken_where_megatron_takes_them_and_mtp_is_with_the_loss() -> None:
    rng = random.Random(1)
    taken = 0
    for _ in range(4000):
        pp, vpp, layers, mtp = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 9), rng.randint(0, 2)
        flat = list("E" + "t" * layers + "m" * mtp + "L")
        bars = pp * vpp - 1
        for place in sorted(rng.choices(range(1, len(flat)), k=bars), reverse=True):
            flat.insert(place, "|")
        for _ in range(rng.choice([0, 0, 0, 1, 2])):  # damage
            if rng.random() < 0.5:
                flat.insert(rng.randint(0, len(flat)), rng.choice("EtmL|"))
            else:
                flat.pop(rng.randrange(len(flat)))
        layout = "".join(flat)
        stricter = "m" in layout.rpartition("|")[0] or layout.startswith("|") or layout.endswith("|")
        try:
            found = read(layout, layers=layers, mtp=mtp, pp=pp, vpp=vpp)
        except LayoutError:
            assert stricter or not megatron_takes(layout, layers, mtp, pp, vpp), (layout, layers, mtp, pp, vpp)
            continue
        taken += 1
        assert megatron_takes(layout, layers, mtp, pp, vpp) and not stricter
        theirs = PipelineParallelLayerLayout(layout, pp)
        for c, stage in enumerate(found.stages):
            assert [LETTER[part] for part in theirs.layout[c % pp][c // pp]] == list(
                "E" * stage.embedding + "t" * len(stage.layers) + "m" * stage.mtp + "L" * stage.loss
            )
        assert [layer for stage in found.stages for layer in stage.layers] == list(range(layers))
    assert taken > 500


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("Ett|(t|)*2tmL", ["has 4 chunks", "2 x 1 = 2", "set parallel.vpp=2"]),
        ("Ett|t|tmL", ["has 3 chunks", "2 x 1 = 2", "add or take away a |"]),
        ("Ett|tmL", ["1 E, 3 t, 1 m, 1 L", "model.num_layers=4 t"]),
        ("Ett|ttL", ["0 m", "model.num_nextn_predict_layers=1 m"]),
        ("ttE|ttmL", ["in this order"]),
        ("Ettttm|L", ["MTP (m) apart from the loss (L)", "mL in one chunk"]),
        ("Ett|((t)*2)*1mL", ["'('", "do not nest"]),
        ("Ett|t*99999999999mL", ["beyond"]),
        ("E(t*9999)*9999|mL", ["beyond"]),
        ("|EttttmL", ["E in its first chunk"]),
        ("EttttmL|", ["L in its last one"]),
        ("", ["has 1 chunks"]),
    ],
)
def test_refusals_say_values_rule_and_remedy(layout: str, words: list[str]) -> None:
    with pytest.raises(LayoutError) as refused:
        read(layout, layers=4, mtp=1, pp=2)
    for word in [f"parallel.layout={layout!r}", *words]:
        assert word in str(refused.value)


# --- balance --------------------------------------------------------------------------------------------------------


def maps(work: Work, chunks: int) -> Iterator[list[int]]:
    """The layers of each chunk, in every way whose chunks without one are at the ends."""
    layers = work.layers
    for cuts in combinations(range(layers + chunks - 1), chunks - 1):
        found = [b - a - 1 for a, b in zip((-1, *cuts), (*cuts, layers + chunks - 1), strict=True)]
        if 0 not in found[1:-1]:
            yield found


def loads(work: Work, counts: list[int], pp: int) -> list[float]:
    """Cost of each rank, added up layer by layer."""
    costs = [work.dense] * work.dense_layers + [work.moe] * work.moe_layers
    chunks = [sum(costs[sum(counts[:c]) : sum(counts[: c + 1])]) for c in range(len(counts))]
    chunks[0] += work.embedding
    chunks[-1] += work.mtp_layers * work.mtp + work.head
    return [sum(chunks[rank::pp]) for rank in range(pp)]


def random_work(rng: random.Random) -> Work:
    dense = rng.randint(0, 4)
    return Work(
        dense_layers=dense,
        moe_layers=rng.randint(dense == 0, 6),
        mtp_layers=rng.randint(0, 2),
        embedding=rng.choice([0, 0, 0.25, 4]),  # eighths: sums are exact
        dense=rng.choice([1, 1.25, 2, 0.125]),
        moe=rng.choice([1, 1.125, 3]),
        mtp=rng.choice([1.5, 0.5]),
        head=rng.choice([0, 0.75, 4]),
    )


def test_no_map_is_better_balanced() -> None:
    """Every map of small decoders, interleaved or not, is tried."""
    rng = random.Random(2)
    uneven = short = 0
    spared: set[tuple[bool, bool]] = set()  # whether the first and the last chunk are empty though layers suffice
    for _ in range(250):
        work, pp, vpp = random_work(rng), rng.randint(1, 4), rng.randint(1, 3)
        every = list(maps(work, pp * vpp))
        if not every:
            with pytest.raises(LayoutError, match=f"model.num_layers={work.layers} cannot fill"):
                balance(work, pp, vpp)
            continue
        found = sizes(balance(work, pp, vpp))
        assert found in every
        by_empty: dict[int, float] = {}
        for one in every:
            by_empty[one.count(0)] = min(by_empty.get(one.count(0), math.inf), max(loads(work, one, pp)))
        least, empty = min((load, n) for n, load in by_empty.items() if n == min(by_empty))
        for n in sorted(by_empty):
            if by_empty[n] * 100 < least * 99:
                least, empty = by_empty[n], n
        assert (max(loads(work, found, pp)), found.count(0)) == (least, empty), (work, pp, vpp, found)
        equal = [work.layers // (pp * vpp)] * (pp * vpp)
        if equal in every and max(loads(work, equal, pp)) == least:
            assert found == equal
        uneven += max(found) - min(found) > 1
        if work.layers < pp * vpp:
            short += 1
        else:
            spared.add((found[0] == 0, found[-1] == 0))
    assert uneven > 30 and short > 10 and len(spared) == 4


def test_ties_are_as_even_as_can_be_with_the_lighter_ranks_first() -> None:
    """A head so heavy that the other ranks do not matter to the most loaded one: there are many best maps."""
    heavy = replace(UNIT, moe_layers=9, head=9)
    assert sizes(balance(heavy, 4)) == [3, 3, 3, 0]
    assert sizes(balance(replace(heavy, moe_layers=10), 4)) == [3, 3, 4, 0]
    assert sizes(balance(heavy, 2, 2)) == [4, 1, 4, 0]
    assert sizes(balance(replace(UNIT, moe_layers=7), 3)) == [2, 2, 3]
    almost = Work(dense_layers=1, moe_layers=6, mtp_layers=0, embedding=0, dense=0.999, moe=1, mtp=0, head=0)
    assert sizes(balance(almost, 3)) == [3, 2, 2]  # a thousandth less is less
    assert sizes(balance(replace(almost, head=3, moe_layers=11), 4)) == [3, 4, 4, 1]  # but no reason to fill rank 0


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)])
def test_equal_layers_are_shared_out_equally(pp: int, vpp: int) -> None:
    assert sizes(balance(UNIT, pp, vpp)) == [8 // (pp * vpp)] * (pp * vpp)


def test_an_end_is_empty_where_that_costs_less() -> None:
    two = replace(UNIT, moe_layers=2)
    assert balance(replace(two, head=1), 2).layout == "Et|tL"  # 2 either way
    assert balance(replace(two, head=1.015625), 2).layout == "Et|tL"  # less by half of a hundredth of 2
    assert balance(replace(two, head=1.03125), 2).layout == "Ett|L"
    assert balance(replace(two, embedding=1.03125), 2).layout == "E|ttL"
    both = replace(two, moe_layers=6, embedding=3, head=3)
    assert balance(both, 4).layout == "E|ttt|ttt|L"
    assert balance(replace(both, embedding=2), 4).layout == "Et|tt|ttt|L"  # as costly as with both empty
    work = work_of(V3.model)
    spared = balance(work, 16, 2)
    assert spared.layout == "Ett|(tt|)*14t|(tt|)*15mL"
    assert spared.imbalance(work) == pytest.approx(1.213, abs=5e-4)


def test_layers_short_of_chunks_leave_the_ends_empty() -> None:
    tiny = replace(UNIT, moe_layers=3, mtp_layers=1, mtp=1, head=1)
    assert balance(tiny, 4).layout == "Et|t|t|mL"
    assert balance(replace(tiny, embedding=5), 4).layout == "E|t|t|tmL"
    assert balance(tiny, 5).layout == "E|(t|)*3mL"
    with pytest.raises(LayoutError, match=r"model.num_layers=3 cannot fill .* 3 x 2 = 6 chunks.* 5 chunks at most"):
        balance(tiny, 3, 2)


@pytest.mark.parametrize(("name", "pp", "vpp"), [("deepseek_v3", 16, 1), ("deepseek_v3", 8, 2), ("deepseek_v3", 5, 3)])
def test_a_balanced_map_is_what_its_layout_says(name: str, pp: int, vpp: int) -> None:
    model = presets.get(name).model
    found = balance(work_of(model), pp, vpp)
    assert read(found.layout, layers=model.num_layers, mtp=1, pp=pp, vpp=vpp) == found


def test_deepseek_v3_and_moonlight() -> None:
    """61 layers over 16 ranks: the preset's map, from NVIDIA's recipe, is the best there is by FLOPs."""
    model, parallel = V3.model, V3.parallel
    assert parallel == Parallel(pp=16, ep=64, layout="Et*4|(tttt|)*14tmL")
    work = work_of(model)
    theirs = read(str(parallel.layout), layers=61, mtp=1, pp=16)
    ours = balance(work, 16)
    assert ours.stages == theirs.stages
    assert theirs.imbalance(work) == ours.imbalance(work) == pytest.approx(1.213, abs=5e-4)
    light = balance(work_of(MOONLIGHT.model), 4)
    assert sizes(light) == [7, 8, 8, 4]
    assert light.imbalance(work_of(MOONLIGHT.model)) == pytest.approx(1.059, abs=5e-4)


def test_the_picture_has_a_line_for_each_rank() -> None:
    work = Work(dense_layers=1, moe_layers=5, mtp_layers=1, embedding=0, dense=1.5e9, moe=1e9, mtp=2e9, head=0.5e9)
    found = read("Ett|t|t|ttmL", layers=6, mtp=1, pp=2, vpp=2)
    assert found.describe(work).splitlines() == [
        "pipeline stages: Ett|t|t|ttmL",
        "stage  holds                       GFLOP/token  share",
        "    0  E, dense 0, MoE 1 | MoE 3           3.5  38.9%  ###################",
        "    1  MoE 2 | MoE 4-5, MTP, head          5.5  61.1%  ##############################",
        "most loaded: stage 1, 1.222 of the mean",
    ]


def test_costs_that_cannot_be_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"moe=0, .*: a layer must cost something"):
        replace(UNIT, moe=0)
