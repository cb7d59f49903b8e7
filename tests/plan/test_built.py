"""Analytic counts against what Megatron-core builds on the meta device, on every class of rank of a layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perilune.pretrain import presets
from perilune.pretrain.plan.built import count_rank
from perilune.pretrain.plan.counts import parameters
from perilune.pretrain.plan.ranks import bytes_per_rank, parameters_per_rank, rank_table
from perilune.pretrain.plan.stages import stages_of
from perilune.pretrain.plan.vision_counts import parameters as vision_parameters
from perilune.pretrain.schema import Config, Contrastive, Parallel, Precision
from perilune.pretrain.train_command import describe


def plain(name: str, **parallel: object) -> Config:
    config = presets.get(name)
    degrees = replace(config.parallel, **parallel) if parallel else config.parallel  # type: ignore[arg-type]
    return replace(config, parallel=degrees, precision=Precision(compute="bf16"))


LAYOUTS = {
    "deepseek_v3 as published": (plain("deepseek_v3"), 1024),
    "deepseek_v3 tp, ep, etp": (plain("deepseek_v3", pp=1, layout=None, tp=8, ep=32, etp=2), 64),
    "deepseek_v3 uneven with vpp": (
        plain("deepseek_v3", pp=4, vpp=2, ep=8, layout="E" + "t" * 7 + ("|" + "t" * 8) * 6 + "|" + "t" * 6 + "mL"),
        32,
    ),
    "moonlight": (plain("moonlight_16b_a3b", tp=2, pp=1, ep=8), 8),
    "Kimi-VL, its tower split over 2": (plain("kimi_vl_a3b", tp=2, pp=1, ep=8), 8),
    "Kimi-VL with a text encoder": (
        replace(plain("kimi_vl_a3b", tp=2, pp=1, ep=8), contrastive=Contrastive(loss="siglip", hidden_size=768)),
        8,
    ),
    "Kimi-VL, its tower in the first of 4 stages": (plain("kimi_vl_a3b", tp=1, pp=4, ep=2), 8),
    "deepseek_v3 balanced over 16 x 2, last chunk empty": (plain("deepseek_v3", vpp=2, ep=1, layout=None), 16),
    "moonlight, 27 layers balanced over 4 x 2": (plain("moonlight_16b_a3b", tp=1, pp=4, vpp=2, ep=1), 4),
    "moonlight balanced over 8, no MTP, last chunk empty": (plain("moonlight_16b_a3b", tp=1, pp=8, ep=1), 8),
    "proxy_100m": (plain("proxy_100m", pp=4, tp=2, ep=2), 8),
    "proxy_100m, embedding and head alone": (plain("proxy_100m", pp=4, layout="E|tttt||ttttmL"), 4),
    "proxy_100m, final norm away from the loss": (plain("proxy_100m", pp=2, vpp=2, layout="E|tttt|tttt|mL"), 2),
}


def test_the_balanced_ones_have_such_chunks() -> None:
    """Without this the cases could come to test another map unseen."""
    for layout, (config, _) in LAYOUTS.items():
        if "chunk empty" in layout:
            stages = stages_of(config.model, config.parallel)
            assert [not stages[0].layers, not stages[-1].layers] == ["first" in layout, "last" in layout], layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_equal_the_built_model_on_every_stage(layout: str) -> None:
    config, world = LAYOUTS[layout]
    for stage in range(config.parallel.pp):
        assert count_rank(config, world, stage) == parameters_per_rank(
            config.model, config.parallel, stage, config.vision, config.contrastive
        ), stage


@pytest.mark.parametrize(
    "frozen",
    [("language_model",), ("vision_tower",), ("multi_modal_projector", "language_model"), ("contrastive",),
     ("vision_tower", "multi_modal_projector", "contrastive")],
)  # fmt: skip
@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 1, "ep": 8}, {"tp": 1, "pp": 2, "ep": 2}])
def test_what_trains_beside_frozen_parts_is_what_the_built_model_lets_train(
    frozen: tuple[str, ...], parallel: dict[str, int]
) -> None:
    config = replace(plain("kimi_vl_a3b", **parallel), contrastive=Contrastive(loss="siglip", hidden_size=768))
    config = replace(config, train=replace(config.train, freeze=frozen))
    for stage in range(config.parallel.pp):
        assert count_rank(config, 8, stage, trained=True) == parameters_per_rank(
            config.model, config.parallel, stage, config.vision, config.contrastive, frozen
        ), stage


def test_frozen_parts_have_neither_gradients_nor_moments_in_a_dry_run() -> None:
    """Kimi-VL's `align`, whose language model is frozen."""
    config, parallel = plain("kimi_vl_a3b"), Parallel()
    seen = config.model, parallel, 0, 1, "bf16", config.vision
    all_train, align = bytes_per_rank(*seen), bytes_per_rank(*seen, frozen=("language_model",))
    trained = vision_parameters(config.vision, config.model.hidden_size).total
    assert align.weights == all_train.weights and align.gradients == 4 * trained and align.optimizer == 12 * trained
    config = replace(config, parallel=parallel, train=replace(config.train, freeze=("language_model",)))
    assert f"{align.gradients / 2**30:.3f}" in rank_table(config, 1).splitlines()[1].split()
    assert "FLOPs a token, training, parts frozen" in describe(config, 1, Path("run"))


@pytest.mark.parametrize(
    ("name", "total"), [("deepseek_v3", 671_026_419_200), ("moonlight_16b_a3b", 15_289_021_568 + 2 * 163840 * 2048)]
)
def test_one_rank_that_holds_all_has_the_published_number(name: str, total: int) -> None:
    config = plain(name, pp=1, ep=1, tp=1, layout=None)
    config = replace(config, model=replace(config.model, num_nextn_predict_layers=0))
    built = count_rank(config, 1, 0)
    assert built.total + built.router_bias == total
    assert parameters(config.model).total == built.total + built.router_bias
