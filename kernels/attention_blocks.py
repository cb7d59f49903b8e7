"""Causal attention by blocks of queries, for CPUs: FlashAttention's recomputation (arXiv 2205.14135) on plain matmuls.

A block of queries meets all its keys at once, so that no online softmax is needed; only its last columns are masked.
Scores and softmax are fp32, whatever the inputs; the other matmuls run in the inputs' type, or fp32 where this CPU is
faster with that, and sums over blocks are fp32. One buffer of scores, of the size of a cache, serves all blocks: fresh
memory would cost a page fault for every 4 KB. Backward computes the scores again, so no T x T matrix is held, but for
a few calls' softmax, in the inputs' type, as far as KEPT goes: gradients in 16 bits then differ by its rounding.

Threads take heads. The views of their blocks are made before they start: one that a thread makes itself waits for
Python's lock while another thread makes its own.

Q queries, K keys, N heads, D query and key head dim, E value head dim (they may differ, without padding).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from perilune.kernels import matmul, threads

Range = tuple[int, int]

BLOCK = 128  # queries: larger ones compute more of what is masked, smaller ones have slower matmuls
KEPT = 1 << 28  # bytes of softmax that all calls together may hold for their backward: 256 MB
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

    Ranges are [start, end); those of queries follow one another and cover all Q, or ValueError is raised.
    """
    end = queries[-1][1] if queries else 0
    if end != q_QND.shape[0]:
        raise ValueError(f"documents end at token {end}, but there are {q_QND.shape[0]}")
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
        q, k, v = (_by_head(x) for x in (q_QND, k_KND, v_KNE))
        wide_q, wide_k = _wide(q), _wide(k)
        out_QNE = v_KNE.new_empty(q_QND.shape[0], *v_KNE.shape[1:])
        out, parts = out_QNE.transpose(0, 1), _parts(queries, keys, q.shape[0])
        held = _Held.of(sum(part.numbers for part in parts) * v_KNE.element_size()) if backward else None
        views = [
            list(zip(part.queries(wide_q), part.columns(wide_k), part.keys(v), part.queries(out), strict=True))
            for part in parts
        ]
        kept: list[list[torch.Tensor]] = [[] for _ in parts]

        def work(mine: Iterator[int]) -> None:
            scores = _Scores(parts, scale, wide_q)
            low = scores.memory(v.dtype)
            for i in mine:
                for q_block, kT, v_seen, out_block in views[i]:
                    p = scores.softmax(q_block, kT, v_KNE.dtype if held else None)
                    if held:
                        kept[i].append(p.to(v_KNE.dtype))
                        p = kept[i][-1] if v.dtype == v_KNE.dtype else p
                    _product(out_block, low.cast(p), v_seen, 1.0)

        threads.share(work, range(len(parts)), len(parts))
        if held:
            held.softmax = kept
        ctx.parts, ctx.scale, ctx.held = parts, scale, held
        ctx.save_for_backward(q_QND, k_KND, v_KNE)
        return out_QNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QNE: torch.Tensor) -> Any:
        q_QND, k_KND, v_KNE = ctx.saved_tensors
        held: _Held | None = ctx.held
        ctx.held = None  # a second backward computes it again
        q, k, v, grad = (_by_head(x) for x in (q_QND, k_KND, v_KNE, grad_QNE))
        wide_q, wide_k = _wide(q), _wide(k)
        wide = wide_q.dtype
        dq_QND = torch.empty_like(q_QND, memory_format=torch.contiguous_format)
        dq = dq_QND.transpose(0, 1)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        parts: list[_Part] = ctx.parts
        softmax = held.softmax if held else [repeat(None, len(part.blocks)) for part in parts]
        blocks = [
            [
                _Block(*each)
                for each in zip(
                    *(part.queries(x) for x in (wide_q, q, grad, dq)),
                    *(part.columns(x) for x in (wide_k, v)),
                    *(part.keys(x) for x in (k, dk, dv)),
                    kept,
                    strict=True,
                )
            ]
            for part, kept in zip(parts, softmax, strict=True)
        ]

        def work(mine: Iterator[int]) -> None:
            scores = _Scores(parts, ctx.scale, wide_q)
            d_scores, low = scores.memory(wide), q.dtype
            p_low, ds_low = (scores.memory(low) for _ in range(2)) if low != wide else (d_scores, d_scores)
            for i in mine:
                for b in blocks[i]:
                    p = scores.softmax(b.wide_q, b.wide_kT) if b.p is None else scores.wide(b.p)
                    dp, dp_low = d_scores.of(p.shape), ds_low.of(p.shape)
                    torch.bmm(b.grad, b.vT, out=dp_low)
                    if dp_low is not dp:
                        dp.copy_(dp_low)
                    torch.ops.aten._softmax_backward_data.out(dp, p, -1, wide, grad_input=dp)
                    p = b.p if b.p is not None and b.p.dtype == low else p_low.cast(p)
                    ds = ds_low.cast(dp)
                    _product(b.dq, ds, b.k, ctx.scale)
                    _add_product(b.dk, ds, b.q, ctx.scale)
                    _add_product(b.dv, p, b.grad, 1.0)

        threads.share(work, range(len(parts)), min(len(parts), threads.available()))
        if held:
            held.give_back()
        return dq_QND, dk.transpose(0, 1).to(k_KND.dtype), dv.transpose(0, 1).to(v_KNE.dtype), None, None, None, None


class _Block(NamedTuple):
    """What backward needs of some heads' block of queries and the keys that its last query sees: views."""

    wide_q: torch.Tensor
    q: torch.Tensor
    grad: torch.Tensor
    dq: torch.Tensor
    wide_kT: torch.Tensor
    vT: torch.Tensor
    k: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    p: torch.Tensor | None  # the softmax, if it was kept


@dataclass(frozen=True)
class _Part:
    """The heads of one thread, and the blocks in which it goes through them."""

    heads: slice
    blocks: tuple[tuple[slice, slice, slice], ...]  # heads of these, queries, keys

    @property
    def numbers(self) -> int:
        """Of its scores."""
        return sum(_size(heads) * _size(block) * _size(seen) for heads, block, seen in self.blocks)

    def queries(self, x_NQD: torch.Tensor) -> list[torch.Tensor]:
        """Of each block."""
        mine = x_NQD[self.heads]
        return [mine[heads, block] for heads, block, _ in self.blocks]

    def keys(self, x_NKD: torch.Tensor) -> list[torch.Tensor]:
        """That each block sees."""
        mine = x_NKD[self.heads]
        return [mine[heads, seen] for heads, _, seen in self.blocks]

    def columns(self, x_NKD: torch.Tensor) -> list[torch.Tensor]:
        """The same transposed [heads, D, keys]."""
        mine = x_NKD[self.heads].transpose(1, 2)
        return [mine[heads, :, seen] for heads, _, seen in self.blocks]


def _parts(queries: Sequence[Range], keys: Sequence[Range], N: int) -> list[_Part]:
    """One a thread."""
    number = min(N, threads.available())
    shares = [slice(N * i // number, N * (i + 1) // number) for i in range(number)]
    return [_Part(heads, tuple(_blocks(queries, keys, _size(heads)))) for heads in shares]


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size


class _Held:
    """What one call holds of KEPT, until its backward is done or its graph is gone.

    Not among autograd's saved tensors, whose number must not depend on what other calls hold.
    """

    _all = 0
    _lock = threading.RLock()  # a graph may be collected while another call counts

    def __init__(self, size: int) -> None:
        self._size = size
        self.softmax: list[list[torch.Tensor]] = []  # of each part's blocks

    @classmethod
    def of(cls, size: int) -> _Held | None:
        """So many bytes; None where that is more than is left."""
        with cls._lock:
            if cls._all + size > KEPT:
                return None
            cls._all += size
        return cls(size)

    def give_back(self) -> None:
        """Safe to call again."""
        with self._lock:
            _Held._all -= self._size
            self._size = 0
        self.softmax = []

    __del__ = give_back


class _Memory:
    """Of one thread, for the numbers of any block: it costs nothing until it is written."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(size, dtype=dtype, device=device)
        self._views: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Valid until the next."""
        if shape not in self._views:
            self._views[shape] = self._flat[: math.prod(shape)].view(shape)
        return self._views[shape]

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the type of this memory; in it, where that is another."""
        return x if x.dtype == self._flat.dtype else self.of(x.shape).copy_(x)


class _Scores:
    """Softmax of a block's scores, from queries and keys in fp32 at least, always in the same memory."""

    def __init__(self, parts: Sequence[_Part], scale: float, wide_q: torch.Tensor) -> None:
        self._scale, self._dtype, self._device = scale, wide_q.dtype, wide_q.device
        self._most = max((math.prod(map(_size, block)) for part in parts for block in part.blocks), default=0)
        self._scores = self.memory(self._dtype)
        self._mask = torch.full((BLOCK, BLOCK), float("-inf"), dtype=self._dtype, device=self._device).triu_(1)

    def memory(self, dtype: torch.dtype) -> _Memory:
        """For the numbers of any block."""
        return _Memory(self._most, dtype, self._device)

    def softmax(self, q_nQD: torch.Tensor, kT_nDK: torch.Tensor, kept_as: torch.dtype | None = None) -> torch.Tensor:
        """Of some heads' block of queries and the keys that its last query sees [n, Q, K].

        In memory of its own if it is to be kept in the type that it has, else valid until the next call.
        """
        Q = q_nQD.shape[1]
        shape = (q_nQD.shape[0], Q, kT_nDK.shape[2])
        if kept_as == self._dtype:
            s = torch.empty(shape, dtype=self._dtype, device=self._device)
        else:
            s = self._scores.of(shape)
        _product(s, q_nQD, kT_nDK, self._scale)
        s[:, :, -Q:].add_(self._mask[:Q, :Q])
        torch.ops.aten._softmax.out(s, -1, False, out=s)
        return s

    def wide(self, kept: torch.Tensor) -> torch.Tensor:
        """What `softmax` gave, of what was kept of it."""
        return self._scores.cast(kept)


def _blocks(queries: Sequence[Range], keys: Sequence[Range], N: int) -> Iterator[tuple[slice, slice, slice]]:
    """(heads, queries, keys) of which the last query sees all keys; as many heads at once as the buffer holds."""
    for block, seen in _ranges(queries, keys):
        together = max(1, SCORES // ((block.stop - block.start) * (seen.stop - seen.start)))
        for head in range(0, N, together):
            yield slice(head, min(head + together, N)), block, seen


def _ranges(queries: Sequence[Range], keys: Sequence[Range]) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries and the keys that their last query sees."""
    for (start, end), (first, last) in zip(queries, keys, strict=True):
        before = (last - first) - (end - start)
        for at in range(start, end, BLOCK):
            stop = min(at + BLOCK, end)
            yield slice(at, stop), slice(first, first + before + stop - start)


def _by_head(x_TND: torch.Tensor) -> torch.Tensor:
    """[N, T, D], as it is multiplied; where that is in 16 bits, in memory too: oneDNN would copy each block."""
    x = matmul.wide(x_TND).transpose(0, 1)
    return x.contiguous() if x.element_size() == 2 else x


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """out = scale * left right, in the type of `out`."""
    if out.dtype == left.dtype:
        torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
    else:
        out.copy_((left @ right).mul_(scale))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left^T right, summed in the type of `total`."""
    if total.dtype == left.dtype:
        total.baddbmm_(left.transpose(1, 2), right, alpha=scale)
    else:
        total.add_(left.transpose(1, 2) @ right, alpha=scale)
