"""RoPE against complex numbers, Megatron-core's and transformers' own."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from perilune.kernels.rope import keys_and_values, reference, rotate_neighbours, rotate_tails


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[9, 3, 8], and the angles of its pairs [9, 1, 4]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, 8, generator=generator).to(dtype).requires_grad_()
    return x, torch.arange(9)[:, None, None] * 10.0 ** -torch.arange(4)


def _turns(angles: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return torch.complex(angles.cos() * scale, angles.sin() * scale)


def _upstream(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_formula_and_megatron(scale: float, dtype: torch.dtype) -> None:
    x, angles = _inputs(dtype)
    ours = rotate_neighbours(x, _turns(angles, scale))
    assert ours.dtype is dtype
    twice = angles.repeat_interleave(2, dim=-1)
    theirs = _apply_rotary_pos_emb_bshd(x[:, None], twice[:, None], rotary_interleaved=True, mscale=scale).squeeze(1)
    for other, bf16 in ((theirs, {"atol": 0.05, "rtol": 0.02}), (reference(x, _turns(angles, scale)), {})):
        close = {} if dtype is torch.float32 else bf16
        torch.testing.assert_close(ours, other, **close)
        mine, formula = (torch.autograd.grad(y, x, _upstream(dtype), retain_graph=True)[0] for y in (ours, other))
        torch.testing.assert_close(mine, formula, **close)


@pytest.mark.parametrize("untouched", [4, 3], ids=["even", "odd"])  # odd: torch sees no complex numbers there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_are_turned_in_place_beside_what_is_not_turned(dtype: torch.dtype, untouched: int) -> None:
    x, angles = _inputs(dtype)
    x, turns = x.detach()[..., : untouched + 4].contiguous().requires_grad_(), _turns(angles[..., :2])
    made = x.detach() * 1
    found = rotate_tails(x * 1, turns)
    plain = torch.cat((x[..., :untouched], rotate_neighbours(x[..., untouched:], turns)), dim=-1)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert rotate_tails(made, turns).data_ptr() == made.data_ptr()
    for upstream in (_upstream(dtype)[..., : untouched + 4], torch.ones((), dtype=dtype).expand(x.shape)):
        mine, expected = (torch.autograd.grad(y, x, upstream + 0, retain_graph=True)[0] for y in (found, plain))
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


def test_scores_of_queries_and_keys_equal_transformers() -> None:
    """Its order of the rotated numbers is another, which no product of a query and a key sees."""
    q, angles = _inputs(torch.float32)
    k = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(2))
    flat = torch.cat((angles, angles), dim=-1)[None, :, 0]
    theirs = apply_rotary_pos_emb_interleave(q.transpose(0, 1)[None], k.transpose(0, 1)[None], flat.cos(), flat.sin())
    expected = torch.einsum("bnqr,bnkr->nqk", *theirs)
    ours = torch.einsum("qnr,knr->nqk", *(rotate_neighbours(x, _turns(angles)) for x in (q, k)))
    torch.testing.assert_close(ours, expected)
