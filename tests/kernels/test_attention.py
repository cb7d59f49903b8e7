"""Attention by document, in blocks and by SDPA, against the formula with a mask over the whole pack."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

from perilune.kernels import attention as attentions
from perilune.kernels import attention_blocks
from perilune.kernels.attention import (
    Pieces,
    image_attention,
    piecewise_attention,
    reference,
    sdpa_by_piece,
    varlen_attention,
)
from perilune.kernels.attention_blocks import BLOCK, blocked_attention

Attention = Callable[..., torch.Tensor]


def _by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces, scale: float) -> torch.Tensor:
    return blocked_attention(q, k, v, pieces.queries, pieces.keys, scale)


def _documents(lengths: list[int]) -> tuple[torch.Tensor, Pieces]:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ranges = tuple(pairwise(bounds))
    return torch.tensor(bounds, dtype=torch.int32), Pieces(ranges, ranges)


def _qkv(T: int, N: int, D: int, E: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, N, size, generator=generator).to(dtype).requires_grad_() for size in (D, D, E)]


def _same(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Values and gradients, each within `tolerance` of the largest number in it."""
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours.dtype)
    mine, formula = torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    for a, b in zip((ours, *mine), (theirs, *formula), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("attention", [_by_blocks, sdpa_by_piece])
@pytest.mark.parametrize("lengths", [[7], [1, 5, 2], [3, 1, 1, 11], [BLOCK + 3, BLOCK, 2 * BLOCK + 1]])
def test_documents_equal_the_masked_formula(attention: Attention, lengths: list[int]) -> None:
    q, k, v = _qkv(sum(lengths), 3, 12, 8)
    bounds, pieces = _documents(lengths)
    _same(attention(q, k, v, pieces, 0.3), reference(q, k, v, bounds, 0.3), [q, k, v], 1e-5)


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("kept", [0, attention_blocks.KEPT])
@pytest.mark.parametrize("attention", [_by_blocks, sdpa_by_piece])
def test_bf16_is_as_near_to_the_formula_as_its_rounding(
    attention: Attention, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "KEPT", kept)
    q, k, v = _qkv(300, 2, 24, 16, torch.bfloat16)
    bounds, pieces = _documents([100, 200])
    _same(attention(q, k, v, pieces, 0.2), reference(q, k, v, bounds, 0.2), [q, k, v], 1e-2)


@pytest.mark.usefixtures("bf16_multiplied")
def test_what_is_kept_of_the_softmax_is_free_after_backward_which_may_be_called_again() -> None:
    q, k, v = _qkv(300, 2, 24, 16, torch.bfloat16)
    before = attention_blocks._Held._all
    out = _by_blocks(q, k, v, _documents([100, 200])[1], 0.2)
    assert attention_blocks._Held._all - before > 2 * 2 * (100 * 100 + 200 * 200) // 2  # bytes of two heads' numbers
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert attention_blocks._Held._all == before
    again = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(first, again, rtol=0.02, atol=0.02)  # from what was not rounded


def test_calls_hold_no_more_of_the_softmax_together_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one holds is free again after its backward, or when its graph is gone."""
    q, k, v = _qkv(300, 2, 12, 8)
    pieces = _documents([100, 200])[1]

    def call() -> tuple[torch.Tensor, bool]:
        before = attention_blocks._Held._all
        out = _by_blocks(q, k, v, pieces, 0.2)
        return out, attention_blocks._Held._all > before

    assert call()[1]
    one = 4 * 2 * (100 * 100 + 128 * 128 + 72 * 200)
    monkeypatch.setattr(attention_blocks, "KEPT", attention_blocks._Held._all + one)
    first, holds = call()
    second, another = call()
    assert (holds, another) == (True, False)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (first, second)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    third, holds = call()
    assert holds
    del third
    assert call()[1]


def test_recomputation_may_find_less_room_for_the_softmax_than_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv(300, 2, 12, 8)
    pieces = _documents([100, 200])[1]
    expected = torch.autograd.grad(_by_blocks(q, k, v, pieces, 0.2).sum(), (q, k, v))
    out = checkpoint(_by_blocks, q, k, v, pieces, 0.2, use_reentrant=False)
    monkeypatch.setattr(attention_blocks, "KEPT", 0)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), expected)


def test_documents_that_end_before_the_tokens_are_refused() -> None:
    q, k, v = _qkv(300, 2, 12, 8)
    with pytest.raises(ValueError, match="end at token 200, but there are 300"):
        _by_blocks(q, k, v, _documents([200])[1], 0.2)


def test_scores_that_do_not_fit_the_buffer_take_fewer_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv(300, 5, 12, 8)
    bounds, pieces = _documents([300])
    for size in (2 * BLOCK * 300, 1):  # two heads of the longest block, and less than one
        monkeypatch.setattr(attention_blocks, "SCORES", size)
        _same(_by_blocks(q, k, v, pieces, 0.3), reference(q, k, v, bounds, 0.3), [q, k, v], 1e-5)


def test_a_boundary_changes_only_what_lies_behind_it() -> None:
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    one = varlen_attention(q, k, v, torch.tensor([0, 6]), 6, 1.0)
    two = varlen_attention(q, k, v, torch.tensor([0, 4, 6]), 4, 1.0)
    torch.testing.assert_close(one[:4], two[:4])
    assert not torch.allclose(one[4:], two[4:])


@pytest.mark.parametrize("attention", [piecewise_attention, sdpa_by_piece])
def test_pieces_of_a_pack_equal_the_masked_formula(attention: Attention) -> None:
    """Queries 2..5 and 9..12 of documents of 4, 7 and 2 tokens: three pieces, of which the last begins its document."""
    q, k, v = _qkv(13, 2, 12, 8)
    bounds = torch.tensor([0, 4, 11, 13])
    mine = torch.tensor([2, 3, 4, 5, 9, 10, 11, 12])
    pieces = Pieces(((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 4), (4, 6), (4, 11), (11, 13)))
    _same(attention(q[mine], k, v, pieces, 0.3), reference(q, k, v, bounds, 0.3)[mine], [q, k, v], 1e-5)


def _like_flash_attn(version: int) -> Callable[..., Any]:
    """What flash-attn documents of its variable-length function: a causal mask ends at the last query and key."""

    def flash(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
    ) -> Any:  # fmt: skip
        assert version == 4 or q.shape[-1] == v.shape[-1], "flash-attn 2 wants equal head dims"
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == tuple(int(x.diff().max()) for x in (cu_seqlens_q, cu_seqlens_k))
        outs = []
        for queries, keys in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
            scores = torch.einsum("qnd,knd->nqk", q[slice(*queries)], k[slice(*keys)]) * softmax_scale
            if causal:
                seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
                scores = scores.masked_fill(~seen, float("-inf"))
            outs.append(torch.einsum("nqk,kne->qne", scores.softmax(-1), v[slice(*keys)]))
        return (torch.cat(outs), None) if version == 4 else torch.cat(outs)

    flash.__module__ = {2: "flash_attn.flash_attn_interface", 4: "flash_attn.cute.interface"}[version]
    return flash


def _like_pytorch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Ours of PyTorch's varlen_attn, in whose place stands what it documents; called as it really is."""
    real = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v, *rest = real.bind(*args, **kwargs).args
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        window = {(-1, 0): True, (-1, -1): False}[kwargs["window_size"]]
        of = dict(zip(names, rest, strict=True))
        out: torch.Tensor = _like_flash_attn(2)(q, k, v, **of, softmax_scale=kwargs["scale"], causal=window)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return attentions._pytorch_varlen


@pytest.mark.parametrize("version", [2, 4, "PyTorch's"])
def test_flash_attn_is_asked_for_the_same(version: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By documents, by pieces, whose keys overlap, and by images, which see all of themselves."""
    flash = _like_flash_attn(version) if isinstance(version, int) else _like_pytorch(monkeypatch)
    monkeypatch.setattr(attentions, "_flash_for", lambda q, by="auto": flash)
    q, k, v = _qkv(13, 2, 12, 8)
    bounds = torch.tensor([0, 4, 11, 13], dtype=torch.int32)
    _same(varlen_attention(q, k, v, bounds, 7, 0.3), reference(q, k, v, bounds, 0.3), [q, k, v], 1e-5)
    mine = torch.tensor([2, 3, 4, 5, 9, 10, 11, 12])
    pieces = Pieces(((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 4), (4, 6), (4, 11), (11, 13)))
    expected = reference(q, k, v, bounds, 0.3)[mine]
    _same(piecewise_attention(q[mine], k, v, pieces, 0.3), expected, [q, k, v], 1e-5)
    q, k, v = _qkv(13, 2, 12, 12)
    by_flash = image_attention(q, k, v, bounds, 7, 0.3)
    monkeypatch.setattr(attentions, "_flash_for", lambda q, by="auto": None)
    _same(by_flash, image_attention(q, k, v, bounds, 7, 0.3), [q, k, v], 1e-5)


def test_a_long_piece_late_in_its_document_equals_the_masked_formula() -> None:
    start, T = BLOCK // 2, 3 * BLOCK
    q, k, v = _qkv(T, 2, 12, 8)
    pieces = Pieces(((0, T - start),), ((0, T),))
    expected = reference(q, k, v, torch.tensor([0, T]), 0.3)[start:]
    _same(piecewise_attention(q[start:], k, v, pieces, 0.3), expected, [q, k, v], 1e-5)
