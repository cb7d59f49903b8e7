"""Causal attention inside each document of a pack (FlashAttention's variable-length form, arXiv 2205.14135).

T tokens of the pack, N heads, D query and key head dim, E value head dim (MLA: D 192, E 128).
The only file that imports flash-attn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from perilune.kernels.attention_blocks import blocked_attention


@cache
def _flash_varlen() -> Callable[..., Any] | None:
    """flash-attn 4's or 2's variable-length function where it is installed and there is a GPU, else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        return None
    if importlib.util.find_spec("flash_attn.cute") is not None:
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _pytorch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
) -> Any:  # fmt: skip
    """PyTorch's own (torch >= 2.11) by flash-attn's words. It runs flash-attn 2, so its causal mask is aligned with the
    last query and the last key, where that of PyTorch's SDPA is with the first ones."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(-1, 0) if causal else (-1, -1),
    )


def _flash_for(q: torch.Tensor, by: str = "auto") -> Callable[..., Any] | None:
    """They take 16 bits on a GPU."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _pytorch_varlen if by == "varlen_attn" else _flash_varlen()


def name(by: str = "auto") -> str:
    """Which implementation `varlen_attention` uses for tensors of this machine's device, for the log."""
    if by == "varlen_attn":
        return "PyTorch's varlen_attn"
    if _flash_varlen() is not None:
        return "flash-attn varlen"
    return "PyTorch SDPA by document" if torch.cuda.is_available() else "blocks of queries by document"


def varlen_attention(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNE: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    by: str = "auto",
) -> torch.Tensor:
    """Softmax attention, causal, never across the boundaries `cu_seqlens` ([documents+1], int32). Returns [T, N, E].

    In 16 bits on a GPU `by` chooses: auto (flash-attn where it is installed, else PyTorch's SDPA) or varlen_attn.
    """
    flash = _flash_for(q_TND, by)
    if flash is None:
        ranges = tuple(pairwise(cu_seqlens.tolist()))
        return by_piece(q_TND, k_TND, v_TNE, Pieces(ranges, ranges), scale)
    return _flash(flash, q_TND, k_TND, v_TNE, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), scale)


def image_attention(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """As `varlen_attention`, but every token sees all of its segment. Returns [T, N, D]."""
    flash = _flash_for(q_TND)
    if flash is not None:
        bounds, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
        return _flash(flash, q_TND, k_TND, v_TND, bounds, longest, scale, causal=False)
    outs = []
    alike = [(length, len(list(run))) for length, run in groupby(cu_seqlens.diff().tolist())]  # neighbours, one call
    tokens = [length * count for length, count in alike]
    for (_, count), *parts in zip(alike, *(x.split(tokens) for x in (q_TND, k_TND, v_TND)), strict=True):
        q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in parts)
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _flash(
    flash: Callable[..., Any],
    q_QND: torch.Tensor,
    k_KND: torch.Tensor,
    v_KNE: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """flash-attn on segments of queries and of keys; the mask is aligned with the last query and the last key."""
    E = v_KNE.shape[-1]
    if q_QND.shape[-1] > E and "cute" not in flash.__module__:  # flash-attn 2 wants equal head dims, PyTorch's too
        v_KNE = F.pad(v_KNE, (0, q_QND.shape[-1] - E))
    out = flash(
        q_QND,
        k_KND,
        v_KNE,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        softmax_scale=scale,
        causal=causal,
    )
    return (out[0] if isinstance(out, tuple) else out)[..., :E]


def _sdpa(
    q_QND: torch.Tensor, k_KND: torch.Tensor, v_KNE: torch.Tensor, scale: float, mask_QK: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's SDPA, causal where there is no mask. Returns [Q, N, E]."""
    E = v_KNE.shape[-1]
    if q_QND.shape[-1] > E:  # its fused kernels want equal head dims, and without them holds all scores in memory
        v_KNE = F.pad(v_KNE, (0, q_QND.shape[-1] - E))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QND, k_KND, v_KNE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QK, is_causal=mask_QK is None, scale=scale)
    return out.squeeze(0).transpose(0, 1)[..., :E]


@dataclass(frozen=True)
class Pieces:
    """Which keys each range of queries sees, where queries are a part of a longer pack (context parallelism).

    Range i of `queries` ([start, end) among the queries at hand) sees range i of `keys` ([start, end) of the whole
    pack): its last query all of them, the query before one less, and so on. Together the queries are all there are.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]


def piecewise_attention(
    q_QND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, pieces: Pieces, scale: float, by: str = "auto"
) -> torch.Tensor:
    """Softmax attention of Q queries on the keys and values of a whole pack, as `pieces` says. Returns [Q, N, E].

    `by` as for `varlen_attention`.
    """
    flash = _flash_for(q_QND, by)
    if flash is None:
        return by_piece(q_QND, k_TND, v_TNE, pieces, scale)

    def bounds(ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
        ends = list(accumulate((end - start for start, end in ranges), initial=0))
        return torch.tensor(ends, dtype=torch.int32, device=q_QND.device)

    # Ranges of keys overlap (a document cut into several pieces), so they are laid out one after the other.
    k, v = (torch.cat([x[start:end] for start, end in pieces.keys]) for x in (k_TND, v_TNE))
    longest_q, longest_k = (max(end - start for start, end in ranges) for ranges in (pieces.queries, pieces.keys))
    cu_seqlens = bounds(pieces.queries), bounds(pieces.keys)
    return _flash(flash, q_QND, k, v, cu_seqlens, (longest_q, longest_k), scale)


def by_piece(
    q_QND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, pieces: Pieces, scale: float
) -> torch.Tensor:
    """Piece by piece, without a mask over the pack: our blocks on a CPU, PyTorch's SDPA elsewhere. [Q, N, E]."""
    if q_QND.device.type == "cpu":
        return blocked_attention(q_QND, k_TND, v_TNE, pieces.queries, pieces.keys, scale)
    return sdpa_by_piece(q_QND, k_TND, v_TNE, pieces, scale)


def sdpa_by_piece(
    q_QND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, pieces: Pieces, scale: float
) -> torch.Tensor:
    """One call of PyTorch's SDPA a piece; a mask only where the queries do not begin with their document."""
    outs = []
    for (start, end), (first, last) in zip(pieces.queries, pieces.keys, strict=True):
        before = (last - first) - (end - start)
        mask = None
        if before:
            mask = torch.ones(end - start, last - first, dtype=torch.bool, device=q_QND.device).tril(before)
        outs.append(_sdpa(q_QND[start:end], k_TND[first:last], v_TNE[first:last], scale, mask))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def reference(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The formula with a block-diagonal causal mask over the whole pack, quadratic in T; for tests."""
    T = q_TND.shape[0]
    at = torch.arange(T, device=q_TND.device)
    document = torch.bucketize(at, cu_seqlens[1:].to(at.dtype), right=True)
    seen = (document[:, None] == document[None, :]) & (at[:, None] >= at[None, :])
    scores = torch.einsum("qnd,knd->nqk", q_TND.float(), k_TND.float()) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nqk,kne->qne", weights, v_TNE.float()).to(v_TNE.dtype)
