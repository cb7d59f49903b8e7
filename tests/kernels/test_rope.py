"""RoPE against complex numbers, Megatron-core's and transformers' own."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from perilune.kernels.rope import reference, rotate_neighbours, rotate_pairs


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, 8, generator=generator).to(dtype).requires_grad_()
    half = torch.arange(9)[:, None, None] * 10.0 ** -torch.arange(4)
    return x, torch.cat((half, half), dim=-1)


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_formula_and_megatron(scale: float, dtype: torch.dtype) -> None:
    x, angles = _inputs(dtype)
    upstream = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = rotate_pairs(x, angles, scale)
    close = {"atol": 0.05, "rtol": 0.02} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    megatron = _apply_rotary_pos_emb_bshd(x, angles, mla_rotary_interleaved=True, mscale=scale)
    for theirs in (reference(x, angles, scale), megatron):
        torch.testing.assert_close(ours, theirs, **close)
        (mine,), (formula,) = (torch.autograd.grad(y, x, upstream, retain_graph=True) for y in (ours, theirs))
        torch.testing.assert_close(mine, formula, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_in_place_are_megatrons_with_their_gradients(dtype: torch.dtype) -> None:
    x, angles = _inputs(dtype)
    turns = torch.polar(torch.ones(()), angles[..., :4].float())
    upstream = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = rotate_neighbours(x, turns)
    twice = angles[..., :4].repeat_interleave(2, dim=-1)
    theirs = _apply_rotary_pos_emb_bshd(x[:, None], twice[:, None], rotary_interleaved=True).squeeze(1)
    assert ours.dtype is dtype
    close = {"atol": 0.05, "rtol": 0.02} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours, theirs, **close)
    (mine,), (other,) = (torch.autograd.grad(y, x, upstream) for y in (ours, theirs))
    torch.testing.assert_close(mine, other, **close)


def test_scores_of_queries_and_keys_equal_transformers() -> None:
    """Its order of the rotated numbers may be another, which no product of a query and a key sees."""
    q, angles = _inputs(torch.float32)
    k = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(2))
    flat = angles[None, :, 0]
    theirs = apply_rotary_pos_emb_interleave(q.transpose(0, 1)[None], k.transpose(0, 1)[None], flat.cos(), flat.sin())
    expected = torch.einsum("bnqr,bnkr->nqk", *theirs)
    ours = torch.einsum("qnr,knr->nqk", rotate_pairs(q, angles), rotate_pairs(k, angles))
    torch.testing.assert_close(ours, expected)
