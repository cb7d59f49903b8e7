"""Attention inside each image against the formula with a mask over the whole pack, in both directions."""

from __future__ import annotations

import pytest
import torch

from perilune.kernels.attention import image_attention

SCALE = 0.3


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over the keys of the query's own image, in float64."""
    image_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = torch.einsum("qnd,knd->nqk", q.double(), k.double()) * SCALE
    weights = scores.masked_fill(image_T[:, None] != image_T[None, :], float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v.double())


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [[8], [4, 24, 4], [1, 3, 300], [4, 6, 6, 6, 4, 4]])
def test_values_and_gradients_equal_the_masked_formula(
    lengths: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), 3, 18)  # a head dim that is no power of two, as MoonViT's 72
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    upstream = torch.randn(shape, generator=generator).to(dtype)
    ours = image_attention(q, k, v, bounds(lengths), max(lengths), SCALE)
    theirs = formula(q, k, v, lengths)
    found = ours, *torch.autograd.grad(ours, (q, k, v), upstream)
    expected = theirs, *torch.autograd.grad(theirs, (q, k, v), upstream.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is dtype and one.shape == shape
        torch.testing.assert_close(
            one.double(), other.double(), atol=tolerance * float(other.detach().abs().max()), rtol=0
        )


def test_a_boundary_parts_images_in_both_directions() -> None:
    """What changes in one image changes nothing in the other; within the image the first token sees the last."""
    q, k, v = torch.randn(3, 12, 2, 8, generator=torch.Generator().manual_seed(1))
    before = image_attention(q, k, v, bounds([4, 8]), 8, SCALE)
    k[-1] += 1
    after = image_attention(q, k, v, bounds([4, 8]), 8, SCALE)
    assert torch.equal(before[:4], after[:4])
    assert not torch.isclose(before[4], after[4]).all()
