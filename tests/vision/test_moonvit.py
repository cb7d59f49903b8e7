"""Tower and projector alone: split over ranks, recomputed, of the published size, and positions as PyTorch has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import tower_ranks
from tower_ranks import Run

from perilune.parallel.workers import Workers
from perilune.vision import moonvit


@pytest.fixture(scope="module")
def one(workers: Workers) -> Run:
    found: Run = workers.run(1, tower_ranks.run)[0]
    return found


def whole(ranks: list[Run], name: str) -> torch.Tensor:
    """A gradient put together; what ranks hold twice must be equal."""
    pieces = [rank.gradients[name] for rank in ranks]
    out = torch.full(pieces[0].whole, math.nan)
    for piece in pieces:
        place = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.values.shape, strict=True))
        held = ~out[place].isnan()
        assert torch.equal(out[place][held], piece.values[held]), f"{name}: ranks differ"
        out[place] = piece.values
    assert not out.isnan().any(), name
    return out


def test_split_over_ranks_features_and_gradients_are_one_ranks(one: Run, workers: Workers) -> None:
    split = workers.run(2, tower_ranks.run)
    assert one.features.shape == (sum(down * across // 4 for down, across in tower_ranks.GRIDS), tower_ranks.TEXT)
    for rank in split:
        torch.testing.assert_close(rank.features, one.features, atol=1e-5 * float(one.features.abs().max()), rtol=0)
    halves = [n for n, piece in split[0].gradients.items() if tuple(piece.values.shape) != tuple(piece.whole)]
    assert len(halves) == 2 * 6 + 3  # qkv, fc1 (weight and bias), proj and fc2 of a layer; linear_1, linear_2
    for name, piece in one.gradients.items():
        found, largest = whole(split, name), float(piece.values.abs().max())
        torch.testing.assert_close(found, piece.values, atol=1e-5 * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (("full",), 0.5),
        (("selective", ("core_attn",)), 0.95),
        (("selective", ("mlp", "moe", "mtp")), 0.85),  # of which the decoder has the others
    ],
)
def test_recomputed_blocks_give_the_same_numbers_and_keep_little(
    policy: tuple[Any, ...], kept: float, one: Run, workers: Workers
) -> None:
    again = workers.run(1, tower_ranks.run, *policy)[0]
    assert torch.equal(again.features, one.features)
    for name, piece in one.gradients.items():
        assert torch.equal(again.gradients[name].values, piece.values), name
    assert again.kept < kept * one.kept


def test_recomputed_norms_give_the_same_features_and_gradients_but_for_their_order_of_sums(
    one: Run, workers: Workers
) -> None:
    again = workers.run(1, tower_ranks.run, "selective", ("layernorm",))[0]
    assert torch.equal(again.features, one.features)
    for name, piece in one.gradients.items():
        assert float((again.gradients[name].values - piece.values).norm()) <= 1e-6 * float(piece.values.norm()), name


def test_recomputed_blocks_split_over_ranks(one: Run, workers: Workers) -> None:
    split = workers.run(2, tower_ranks.run, "full")
    for name, piece in one.gradients.items():
        largest = float(piece.values.abs().max())
        torch.testing.assert_close(whole(split, name), piece.values, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_tower_and_projector_are_335_tensors_of_one_type(dtype: torch.dtype, workers: Workers) -> None:
    """As many as the hub's checkpoint has, since fused q, k and v are one tensor there too."""
    shapes, types = zip(*workers.run(1, tower_ranks.published, dtype)[0], strict=True)
    assert len(shapes) == 335 and sum(map(math.prod, shapes)) == 447_545_840
    assert set(types) == {dtype}


@pytest.mark.parametrize(("down", "across"), [(4, 6), (6, 4), (2, 12), (16, 3), (1, 1)])
def test_positions_and_their_gradient_are_interpolated_as_pytorch_does(down: int, across: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table_YXH = torch.randn(4, 6, 5, generator=generator, requires_grad=True)
    ours = moonvit._interpolated(table_YXH, down, across)
    images = F.interpolate(table_YXH.permute(2, 0, 1)[None], size=(down, across), mode="bicubic", align_corners=False)
    theirs = images[0].permute(1, 2, 0).reshape(down * across, 5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    upstream = torch.randn(theirs.shape, generator=generator)
    found, expected = (torch.autograd.grad(x, table_YXH, upstream)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("patches", "grids", "said"),
    [
        (7, [(2, 4)], "7 patches for images of [(2, 4)] patches (down, across)"),
        (12, [(2, 2), (2, 2)], "12 patches for images of [(2, 2), (2, 2)]"),
        (10, [(2, 2), (3, 2)], "images of [(3, 2)] patches (down, across) are not whole 2 x 2 cells"),
        (10, [(2, 2), (2, 3)], "images of [(2, 3)]"),
        (4, [(2, 2), (0, 2)], "images of [(0, 2)]"),
    ],
)
def test_grids_that_are_not_of_the_patches_are_refused(
    patches: int, grids: list[tuple[int, int]], said: str, workers: Workers
) -> None:
    assert said in workers.run(1, tower_ranks.refused, patches, grids)[0]
