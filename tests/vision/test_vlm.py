"""The tower against transformers' Kimi-K2.5 (of one frame, which is Kimi-VL's), counts against what is built and
measured, and which images a rank needs, token by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from kimi_tower import theirs
from transformers.models.kimi_k25.modeling_kimi_k25 import (
    Kimi_K25MultimodalProjection,
    Kimi_K25VisionConfig,
    Kimi_K25VisionModel,
)
from vision_ranks import GRIDS, TEXT, VISION, Made, frozen, make, steps, without_images

from perilune.parallel import context
from perilune.parallel.workers import Workers
from perilune.pretrain import presets
from perilune.pretrain.plan import built, vision_counts
from perilune.pretrain.schema import Parallel, Vision
from perilune.vision.vlm import images_of


@pytest.fixture(scope="module")
def made(workers: Workers) -> Made:
    """Tower and projector with drawn weights on images of different sizes, by one process."""
    return workers.run(1, make)[0]


def tower_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tower's part of a model's weights (or gradients), by transformers' names."""
    prefix = "vision_tower."
    return theirs({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, VISION)


def test_features_and_gradients_are_transformers(made: Made) -> None:
    config = Kimi_K25VisionConfig(
        hidden_size=VISION.hidden_size, num_attention_heads=VISION.num_attention_heads,
        num_hidden_layers=VISION.num_layers, intermediate_size=VISION.intermediate_size,
        pos_emb_height=VISION.pos_emb_height, pos_emb_width=VISION.pos_emb_width,
    )  # fmt: skip
    tower = Kimi_K25VisionModel(config)
    tower.load_state_dict(tower_of(made.weights))  # strict: each of theirs is there, and no other
    pixels = (made.patches.float() / 255 - 0.5) / 0.5
    grids = torch.tensor([[1, *grid] for grid in GRIDS])
    cells = tower(pixel_values=pixels, grid_thw=grids).pooler_output
    torch.testing.assert_close(made.cells, cells, atol=1e-5, rtol=0)
    (cells * made.grad_cells).sum().backward()
    mine = tower_of(made.gradients)
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None
        away = (mine[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert float(away) < (1e-4 if "k_proj.bias" not in name else 1), name  # softmax forgets a key's bias
    assert mine.keys() == {name for name, _ in tower.named_parameters()}


def test_projected_features_are_transformers(made: Made) -> None:
    from types import SimpleNamespace

    like = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=VISION.hidden_size, merge_kernel_size=(2, 2)),
        projection_hidden_size=VISION.hidden_size,
        projection_layer_norm_eps=1e-5,
        text_config=SimpleNamespace(hidden_size=TEXT),
    )
    projector = Kimi_K25MultimodalProjection(like)
    names = {"pre_norm": "pre_norm", "in_proj": "linear_1", "out_proj": "linear_2"}
    projector.load_state_dict(
        {f"{a}.{kind}": made.weights[f"multi_modal_projector.{b}.{kind}"]
         for (a, b), kind in product(names.items(), ("weight", "bias"))}
    )  # fmt: skip
    torch.testing.assert_close(made.features, projector(made.cells).view(-1, TEXT), atol=1e-5, rtol=0)


def test_an_image_is_the_same_whatever_stands_beside_it(made: Made) -> None:
    for alone, packed in zip(made.alone, made.features.split([d * a // 4 for d, a in GRIDS]), strict=True):
        torch.testing.assert_close(alone, packed, atol=1e-5, rtol=1e-5)


def test_flops_are_those_that_torch_counts(made: Made) -> None:
    expected = sum(vision_counts.image_flops(VISION, TEXT).forward(grid) for grid in GRIDS)
    H, table = VISION.hidden_size, (VISION.pos_emb_height, VISION.pos_emb_width)
    # Interpolation is left out of the count: rows, then columns.
    interpolated = sum(2 * H * (d * table[0] * table[1] + d * a * table[1]) for d, a in GRIDS if (d, a) != table)
    assert made.flops == pytest.approx(expected + interpolated, rel=1e-6)


def test_kimi_vl_has_the_published_sizes() -> None:
    published = vision_counts.parameters(Vision(num_layers=27), 2048)
    assert published.total == 447_545_840  # the sum of the published checkpoint's 335 tensors
    kimi = presets.get("kimi_vl_a3b")
    small = replace(kimi, model=replace(kimi.model, num_layers=1, n_routed_experts=0, first_k_dense_replace=1))
    without = replace(small, vision=Vision())
    plain = replace(small.parallel, ep=1)
    counts = [built.count_rank(replace(config, parallel=plain), 1, 0).dense for config in (small, without)]
    assert counts[0] - counts[1] == published.total


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_every_placeholder_is_given_its_feature_by_the_rank_that_embeds_it(cp: int, tp: int) -> None:
    rows, seq_len = 2, 32
    tokens = rows * seq_len
    grids = torch.tensor([[2, 4], [6, 4], [2, 2], [4, 8]])
    starts = [1, 12, 31, 50]  # one over the end of a chunk, one at the end of a row
    sizes = (grids.prod(-1) // 4).tolist()
    index_M = torch.cat([torch.arange(at, at + n) for at, n in zip(starts, sizes, strict=True)])
    patches = torch.arange(int(grids.prod(-1).sum())).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)  # each knows its place
    given = {}
    for rank in range(cp):
        bounds = torch.tensor([0, seq_len, tokens], dtype=torch.int32)
        held = context.cut(rows, seq_len, bounds, rank, cp).index_Q if cp > 1 else None
        seen = []
        for number in range(tp):
            images = images_of(patches, grids, index_M, tokens, held, (number, tp))
            seen.append(images.patches)
            cells = images.patches[:, 0, 0, 0].view(-1, 4)[:, 0] // 4  # in this test cell m has patches 4m to 4m + 3
            mine = held if held is not None else torch.arange(tokens)
            part = mine.chunk(tp)[number]
            for feature, place in zip(images.features_F.tolist(), images.places_F.tolist(), strict=True):
                where = int(part[place])
                assert where not in given
                given[where] = int(cells[feature])
        assert all(torch.equal(seen[0], other) for other in seen)  # as tensor parallelism wants
    assert given == {int(place): m for m, place in enumerate(index_M)}


def test_without_an_image_a_blank_one_stands_in_and_gives_no_feature() -> None:
    nothing = images_of(torch.zeros(0, 3, 14, 14), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0).long(), 64)
    assert nothing.patches.shape == (4, 3, 14, 14) and nothing.grids.tolist() == [[2, 2]]
    assert nothing.features_F.numel() == nothing.places_F.numel() == 0


def test_a_batch_without_images_is_computed_whatever_the_size_of_patches(workers: Workers) -> None:
    (at_14,), (at_16,) = (workers.run(1, without_images, side) for side in (14, 16))
    assert not at_16.skipped and at_16.loss == pytest.approx(at_14.loss, rel=1e-6)


@pytest.mark.parametrize("parts", [("language_model",), ("vision_tower",), ("vision_tower", "language_model")])
def test_frozen_parts_stay_and_the_others_train(parts: tuple[str, ...], workers: Workers) -> None:
    """With the first stage alone holding what trains, too, and recomputed."""
    layouts = [(Parallel(), "none"), (Parallel(pp=2), "none")]
    layouts += [(Parallel(tp=2), "full")] if parts == ("language_model",) else []
    for parallel, recompute in layouts:
        ranks = workers.run(2, frozen, parts, parallel, recompute)
        moved = {name: change for rank in ranks for name, change in rank.items()}
        for name, change in moved.items():
            owner = name.partition(".")[0]
            part = owner if owner in ("vision_tower", "multi_modal_projector") else "language_model"
            assert (change == 0) == (part in parts), (name, change, parallel)


def test_bf16_on_images_follows_fp32_and_keeps_its_masters_wide(workers: Workers) -> None:
    wide, narrow = (workers.run(1, steps, compute)[0] for compute in ("fp32", "bf16"))
    assert narrow.weights == {torch.bfloat16} and narrow.masters == {torch.float32} and narrow.mastered > 0.99
    assert wide.losses[1] < wide.losses[0] - 0.01  # both learn
    assert narrow.losses == pytest.approx(wide.losses, rel=1e-2)
    assert all(narrow.largest_update[part] > 1e-4 for part in ("vision_tower", "multi_modal_projector", "decoder"))
