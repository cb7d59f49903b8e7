"""RoPE against complex numbers, Megatron-core's and transformers' own."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from perilune.kernels.rope import keys_and_values, reference, rotate_neighbours, rotate_pairs, rotate_tails


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, 8, generator=generator).to(dtype).requires_grad_()
    half = torch.arange(9)[:, None, None] * 10.0 ** -torch.arange(4)
    return x, torch.cat((half, half), dim=-1)


def _turns(angles: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = angles[..., : angles.shape[-1] // 2]
    return (half.cos() * scale).to(dtype), (half.sin() * scale).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_formula_and_megatron(scale: float, dtype: torch.dtype) -> None:
    x, angles = _inputs(dtype)
    upstream = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    turns = _turns(angles, scale, dtype)
    ours = rotate_pairs(x, *turns)
    close = {"atol": 0.05, "rtol": 0.02} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    megatron = _apply_rotary_pos_emb_bshd(x, angles, mla_rotary_interleaved=True, mscale=scale)
    for theirs in (reference(x, *turns), megatron):
        torch.testing.assert_close(ours, theirs, **close)
        (mine,), (formula,) = (torch.autograd.grad(y, x, upstream, retain_graph=True) for y in (ours, theirs))
        torch.testing.assert_close(mine, formula, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_are_turned_in_place_as_pairs_are_beside_what_is_not_turned(dtype: torch.dtype) -> None:
    x, angles = _inputs(dtype)  # of a head's 8 numbers, the last 4 are turned
    turns = _turns(torch.cat((angles[..., :2], angles[..., :2]), dim=-1), 1.0, dtype)
    made = x.detach() * 1
    found = rotate_tails((x * 1).view(9, 3, 8), *turns)
    plain = torch.cat((x[..., :4], rotate_pairs(x[..., 4:], *turns)), dim=-1)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert rotate_tails(made, *turns).data_ptr() == made.data_ptr()
    for upstream in (torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1)), torch.ones(()).expand(9, 3, 8)):
        (expected,) = torch.autograd.grad(plain, x, upstream.to(dtype), retain_graph=True)
        (mine,) = torch.autograd.grad(found, x, upstream.to(dtype), retain_graph=True)
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_keys_and_values_are_the_parts_of_the_projection_and_the_shared_key() -> None:
    generator = torch.Generator().manual_seed(0)
    kv, shared = (torch.randn(9, n, 8, generator=generator).requires_grad_() for n in (3, 1))
    found = keys_and_values(kv, shared, 5)
    plain = torch.cat((kv[..., :5], shared.expand(-1, 3, -1)), dim=-1), kv[..., 5:]
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert all(x.is_contiguous() for x in found)
    upstream = [torch.randn(x.shape, generator=generator) for x in found]
    mine, expected = (torch.autograd.grad(y, (kv, shared), upstream) for y in (found, plain))
    torch.testing.assert_close(mine, expected)


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
    flat, turns = angles[None, :, 0], _turns(angles, 1.0, torch.float32)
    theirs = apply_rotary_pos_emb_interleave(q.transpose(0, 1)[None], k.transpose(0, 1)[None], flat.cos(), flat.sin())
    expected = torch.einsum("bnqr,bnkr->nqk", *theirs)
    ours = torch.einsum("qnr,knr->nqk", rotate_pairs(q, *turns), rotate_pairs(k, *turns))
    torch.testing.assert_close(ours, expected)
