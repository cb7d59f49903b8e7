"""Causal attention inside each document of a pack (FlashAttention's variable-length form, arXiv 2205.14135).

T tokens of the pack, N heads, D query and key head dim, E value head dim (MLA: D 192, E 128).
The only file that imports flash-attn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F


@cache
def _flash_varlen() -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None:
    """flash-attn 4's or 2's variable-length function where it is installed and there is a GPU, else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        return None
    if importlib.util.find_spec("flash_attn.cute") is not None:
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def name() -> str:
    """Which implementation `varlen_attention` uses for tensors of this machine's device, for the log."""
    return "flash-attn varlen" if _flash_varlen() is not None else "PyTorch SDPA by document"


def varlen_attention(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNE: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """Softmax attention, causal, never across the boundaries `cu_seqlens` ([documents+1], int32). Returns [T, N, E]."""
    flash = _flash_varlen() if q_TND.is_cuda and q_TND.dtype in (torch.bfloat16, torch.float16) else None
    if flash is None:
        return sdpa_by_document(q_TND, k_TND, v_TNE, cu_seqlens, scale)
    out = flash(
        q_TND,
        k_TND,
        v_TNE,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


def sdpa_by_document(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """One call of PyTorch's SDPA a document: no mask in memory, no work between documents."""
    bounds = cu_seqlens.tolist()
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_TND, k_TND, v_TNE))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outs.append(out.squeeze(0).transpose(0, 1))
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
