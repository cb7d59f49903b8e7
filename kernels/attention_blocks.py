"""Causal attention by blocks of queries, for CPUs: FlashAttention's recomputation (arXiv 2205.14135) on plain matmuls.

A block of queries meets all its keys at once, so that no online softmax is needed; only its last columns are masked.
Scores and softmax are fp32, whatever the inputs; the other matmuls run in the inputs' type, or fp32 where this CPU is
faster with that, and sums over blocks are fp32. One buffer of scores, of the size of a cache, serves all blocks: fresh
memory would cost a page fault for every 4 KB. Backward computes the scores again, so no T x T matrix is held; of
documents so short that their softmax is small beside the other activations, it is kept in bf16.

Q queries, K keys, N heads, D query and key head dim, E value head dim (they may differ, without padding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from perilune.kernels import matmul, threads
from perilune.kernels.matmul import cast

Range = tuple[int, int]

BLOCK = 128  # queries: larger ones compute more of what is masked, smaller ones have slower matmuls
KEPT = 1 << 25  # bf16 numbers of softmax that one call may keep for backward: 64 MB
SCORES = 1 << 19  # fp32 numbers of the buffer: 2 MB, the second-level cache of the cores measured


def blocked_attention(
    q_QND: torch.Tensor,
    k_KND: torch.Tensor,
    v_KNE: torch.Tensor,
    queries: Sequence[Range],
    keys: Sequence[Range],
    scale: float,
) -> torch.Tensor:
    """Range i of `queries` sees range i of `keys`, its last query all of them, the one before one less. [Q, N, E].

    Ranges are [start, end); those of queries follow one another and cover all Q.
    """
    out: torch.Tensor = _Blocked.apply(q_QND, k_KND, v_KNE, tuple(queries), tuple(keys), scale, torch.is_grad_enabled())
    return out


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_QND: torch.Tensor,
        k_KND: torch.Tensor,
        v_KNE: torch.Tensor,
        queries: tuple[Range, ...],
        keys: tuple[Range, ...],
        scale: float,
        backward: bool,
    ) -> torch.Tensor:
        ctx.queries, ctx.keys, ctx.scale = queries, keys, scale
        q, k, v = (matmul.wide(_by_head(x)) for x in (q_QND, k_KND, v_KNE))
        out_QNE = v_KNE.new_empty(q_QND.shape[0], *v_KNE.shape[1:])
        out, shares = out_QNE.transpose(0, 1), _shares(q.shape[0])
        wide_q, wide_k = _wide(q), _wide(k)
        keep = backward and v_KNE.dtype != wide_q.dtype and _numbers(queries, keys, q.shape[0]) <= KEPT
        kept: list[list[torch.Tensor]] = [[] for _ in shares]

        def work(mine: Iterator[int]) -> None:
            scores = _Scores(wide_q, wide_k, scale)
            low = scores.buffer(v.dtype)
            for i in mine:
                for heads, block, seen in _blocks(queries, keys, shares[i]):
                    p = scores.softmax(heads, block, seen)
                    if keep:
                        kept[i].append(p.to(v_KNE.dtype))
                        p = kept[i][-1] if v.dtype == v_KNE.dtype else p
                    out[heads, block] = cast(p, low) @ v[heads, seen]

        threads.share(work, range(len(shares)), len(shares))
        ctx.shares, ctx.kept = shares, [len(part) for part in kept]
        ctx.save_for_backward(q_QND, k_KND, v_KNE, *(p for part in kept for p in part))
        return out_QNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QNE: torch.Tensor) -> Any:
        q_QND, k_KND, v_KNE, *kept = ctx.saved_tensors
        q, k, v, grad = (matmul.wide(_by_head(x)) for x in (q_QND, k_KND, v_KNE, grad_QNE))
        wide_q, wide_k = _wide(q), _wide(k)
        wide = wide_q.dtype
        dq_QND = torch.empty_like(q_QND, memory_format=torch.contiguous_format)
        dq = dq_QND.transpose(0, 1)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))

        def work(mine: Iterator[int]) -> None:
            scores = _Scores(wide_q, wide_k, ctx.scale)
            d_scores = scores.buffer(wide)
            p_low, ds_low = (scores.buffer(q.dtype) for _ in range(2)) if q.dtype != wide else (d_scores, d_scores)
            for i in mine:
                first = sum(ctx.kept[:i])
                for at, (heads, block, seen) in enumerate(_blocks(ctx.queries, ctx.keys, ctx.shares[i]), first):
                    p = scores.wide(kept[at]) if kept else scores.softmax(heads, block, seen)
                    dp, dp_low = (x[: p.numel()].view(p.shape) for x in (d_scores, ds_low))
                    torch.bmm(grad[heads, block], v[heads, seen].transpose(1, 2), out=dp_low)
                    if ds_low is not d_scores:
                        dp.copy_(dp_low)
                    torch.ops.aten._softmax_backward_data.out(dp, p, -1, dp.dtype, grad_input=dp)
                    p = kept[at] if kept and kept[at].dtype == v.dtype else cast(p, p_low)
                    ds = cast(dp, ds_low)
                    dq[heads, block] = (ds @ k[heads, seen]).mul_(ctx.scale)
                    _add_product(dk[heads, seen], ds, q[heads, block], ctx.scale)
                    _add_product(dv[heads, seen], p, grad[heads, block], 1.0)

        threads.share(work, range(len(ctx.shares)), min(len(ctx.shares), threads.available()))
        return dq_QND, dk.transpose(0, 1).to(k_KND.dtype), dv.transpose(0, 1).to(v_KNE.dtype), None, None, None, None


class _Scores:
    """Softmax of a block's scores, from queries and keys in fp32 at least, always in the same memory."""

    def __init__(self, q_NQD: torch.Tensor, k_NKD: torch.Tensor, scale: float) -> None:
        self._q, self._k, self._scale = q_NQD, k_NKD, scale
        self.dtype = self._q.dtype
        self._size = max(SCORES, BLOCK * k_NKD.shape[1])
        self._scores = self.buffer(self.dtype)
        self._mask = torch.full((BLOCK, BLOCK), float("-inf"), dtype=self.dtype, device=q_NQD.device).triu_(1)

    def buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for the numbers of any block; it costs nothing until it is written."""
        return torch.empty(self._size, dtype=dtype, device=self._q.device)

    def softmax(self, heads: slice, block: slice, seen: slice) -> torch.Tensor:
        """[heads, block, seen], valid until the next call."""
        q, k = self._q[heads, block], self._k[heads, seen].transpose(1, 2)
        shape = (q.shape[0], q.shape[1], k.shape[2])
        s = self._scores[: math.prod(shape)].view(shape)
        torch.baddbmm(s, q, k, beta=0, alpha=self._scale, out=s)
        s[:, :, -shape[1] :] += self._mask[: shape[1], : shape[1]]
        torch.ops.aten._softmax.out(s, -1, False, out=s)
        return s

    def wide(self, kept: torch.Tensor) -> torch.Tensor:
        """What `softmax` gave, of what was kept of it."""
        return self._scores[: kept.numel()].view(kept.shape).copy_(kept)


def _shares(N: int) -> list[slice]:
    """The heads of each thread."""
    parts = min(N, threads.available())
    return [slice(N * i // parts, N * (i + 1) // parts) for i in range(parts)]


def _blocks(queries: Sequence[Range], keys: Sequence[Range], heads: slice) -> Iterator[tuple[slice, slice, slice]]:
    """(heads, queries, keys) of which the last query sees all keys; as many heads at once as the buffer holds."""
    for block, seen in _ranges(queries, keys):
        together = max(1, SCORES // ((block.stop - block.start) * (seen.stop - seen.start)))
        for head in range(heads.start, heads.stop, together):
            yield slice(head, min(head + together, heads.stop)), block, seen


def _ranges(queries: Sequence[Range], keys: Sequence[Range]) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries and the keys that their last query sees."""
    for (start, end), (first, last) in zip(queries, keys, strict=True):
        before = (last - first) - (end - start)
        for at in range(start, end, BLOCK):
            stop = min(at + BLOCK, end)
            yield slice(at, stop), slice(first, first + before + stop - start)


def _numbers(queries: Sequence[Range], keys: Sequence[Range], N: int) -> int:
    """Of all blocks' scores."""
    return N * sum((q.stop - q.start) * (k.stop - k.start) for q, k in _ranges(queries, keys))


def _by_head(x_TND: torch.Tensor) -> torch.Tensor:
    """[N, T, D] in memory too: matmuls read neighbouring lines."""
    return x_TND.transpose(0, 1).contiguous()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left^T right, summed in the type of `total`."""
    if total.dtype == left.dtype:
        total.baddbmm_(left.transpose(1, 2), right, alpha=scale)
    else:
        total.add_(left.transpose(1, 2) @ right, alpha=scale)
