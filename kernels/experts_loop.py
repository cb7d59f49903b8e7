"""The feed-forward of many experts on a CPU, from tokens to tokens: gather, two matmuls, SwiGLU and sum in one pass.

Each expert's rows are gathered into memory that stays in the cache and serves one expert after another: neither the
copies of the tokens nor the activations are kept for backward, only the tokens and the first matmul's output. Threads
take experts, the largest first. An expert's rows are rounded up with rows of weight zero, since oneDNN builds a new
bf16 matmul for every number of rows it meets.

T tokens, R routed copies sorted by expert, r rows of one expert, H hidden, F expert FFN, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from perilune.kernels import threads
from perilune.kernels.permute import Order, sum_copies

ROWS = 32  # rows of an expert are a multiple of this


def routed_swiglu(
    x_TH: torch.Tensor, w1_EGH: torch.Tensor, w2_EHF: torch.Tensor, probs_R: torch.Tensor, order: Order
) -> torch.Tensor:
    """The sum over a token's experts of prob * (silu(x gate) * (x up)) down. Returns [T, H].

    `w1_EGH` is [E, 2F, H], gate rows before up rows; `w2_EHF` is [E, H, F]; `probs_R` in the order's. Where a weight
    has Megatron-core's `main_grad` (its DDP's buffer), backward adds its gradient there, says so by
    `grad_added_to_main_grad`, and returns memory without content in its place, as Megatron-core's own layers do where
    accumulation is fused.
    """
    out: torch.Tensor = _Routed.apply(x_TH, w1_EGH, w2_EHF, probs_R, order)
    return out


@dataclass(frozen=True)
class _Rounded:
    """The order with each expert's rows rounded up: row 0 with weight 0 stands where there is no copy."""

    tokens: torch.Tensor  # [padded R]
    probs: torch.Tensor  # [padded R, 1]
    rows_R: torch.Tensor  # the row of each copy
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, order: Order, probs_R: torch.Tensor, dtype: torch.dtype) -> _Rounded:
        counts = order.counts_E.to(torch.int64)
        sizes = (counts + ROWS - 1) // ROWS * ROWS
        moved = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
        rows_R = torch.arange(probs_R.numel(), device=probs_R.device) + moved[order.experts_R]
        total = int(sizes.sum())
        tokens = rows_R.new_zeros(total).index_copy_(0, rows_R, order.tokens_R)
        probs = probs_R.new_zeros(total, dtype=dtype).index_copy_(0, rows_R, probs_R.to(dtype))
        return cls(tokens, probs[:, None], rows_R, tuple(sizes.tolist()))

    def share(self, work: Callable[[Iterator[tuple[int, slice]]], None]) -> None:
        """Do `work` on (expert, its rows) of those that have any, the largest first, on as many threads as pay."""
        ends = tuple(accumulate(self.sizes))
        experts = [(e, slice(ends[e] - size, ends[e])) for e, size in enumerate(self.sizes) if size]
        experts.sort(key=lambda expert: self.sizes[expert[0]], reverse=True)
        threads.share(work, experts, threads.worth([self.sizes[e] for e, _ in experts]))


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, probs_R: torch.Tensor, order: Order
    ) -> torch.Tensor:
        rounded = _Rounded.of(order, probs_R, x_TH.dtype)
        total, F, most = rounded.tokens.numel(), w2.shape[2], max(rounded.sizes, default=0)
        h_all, out_all = x_TH.new_empty(total, 2 * F), x_TH.new_empty(total, x_TH.shape[1])

        def work(experts: Iterator[tuple[int, slice]]) -> None:
            x_most, act_most = x_TH.new_empty(most, x_TH.shape[1]), x_TH.new_empty(most, F)
            for e, rows in experts:
                size = rows.stop - rows.start
                x, act, h = x_most[:size], act_most[:size], h_all[rows]
                torch.index_select(x_TH, 0, rounded.tokens[rows], out=x)
                torch.mm(x, w1[e].T, out=h)
                torch.ops.aten.silu.out(h[:, :F], out=act)
                act.mul_(h[:, F:]).mul_(rounded.probs[rows])
                torch.mm(act, w2[e].T, out=out_all[rows])

        rounded.share(work)
        ctx.save_for_backward(x_TH, w1, w2, h_all)
        ctx.rounded, ctx.order, ctx.probs_dtype = rounded, order, probs_R.dtype
        return sum_copies(out_all, rounded.rows_R[order.copies_TK])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> Any:
        x_TH, w1, w2, h_all = ctx.saved_tensors
        rounded: _Rounded = ctx.rounded
        grad_TH = grad_TH.contiguous()
        total, (H, F), most = rounded.tokens.numel(), w2.shape[1:], max(rounded.sizes, default=0)
        dw1, dw2 = (_WeightGradient(w, needed) for w, needed in zip((w1, w2), ctx.needs_input_grad[1:3], strict=True))
        dx_all, dprobs = x_TH.new_empty(total, H), torch.empty(total, dtype=torch.float32, device=x_TH.device)

        def work(experts: Iterator[tuple[int, slice]]) -> None:
            x_most, g_most, dh_most = (x_TH.new_empty(most, size) for size in (H, H, 2 * F))
            part1, part2 = dw1.buffer(), dw2.buffer()
            buffers = [x_TH.new_empty(most, F) for _ in range(4)]
            for e, rows in experts:
                size = rows.stop - rows.start
                x, g, dh = x_most[:size], g_most[:size], dh_most[:size]
                silu, product, d_act, other = (buffer[:size] for buffer in buffers)
                gate, up, prob = h_all[rows, :F], h_all[rows, F:], rounded.probs[rows]
                torch.index_select(x_TH, 0, rounded.tokens[rows], out=x)
                torch.index_select(grad_TH, 0, rounded.tokens[rows], out=g)
                torch.mm(g, w2[e], out=d_act)
                torch.ops.aten.silu.out(gate, out=silu)
                torch.mul(silu, up, out=product)
                torch.sum(torch.mul(d_act, product, out=other), -1, dtype=torch.float32, out=dprobs[rows])
                dw2.add(e, g.T, product.mul_(prob), part2)
                d_act.mul_(prob)
                torch.mul(d_act, silu, out=dh[:, F:])
                torch.mul(d_act, up, out=other)
                torch.ops.aten.silu_backward.grad_input(other, gate, grad_input=dh[:, :F])
                dw1.add(e, dh.T, x, part1)
                torch.mm(dh, w1[e], out=dx_all[rows])

        rounded.share(work)
        dx_TH = sum_copies(dx_all, rounded.rows_R[ctx.order.copies_TK])
        return dx_TH, dw1.done(), dw2.done(), dprobs[rounded.rows_R].to(ctx.probs_dtype), None


class _WeightGradient:
    """The gradient of a weight of all experts, summed where Megatron-core's DDP collects it, if it does."""

    def __init__(self, weight: torch.Tensor, needed: bool) -> None:
        self._weight = weight
        collected: torch.Tensor | None = getattr(weight, "main_grad", None) if needed else None
        self._collected = collected is not None
        self._total = torch.zeros_like(weight) if needed and collected is None else collected

    def buffer(self) -> torch.Tensor | None:
        """For `add`: where products lie that have another type than their sum."""
        other_type = self._total is not None and self._total.dtype != self._weight.dtype
        return self._weight.new_empty(self._weight.shape[1:]) if other_type else None

    def add(self, expert: int, left: torch.Tensor, right: torch.Tensor, part: torch.Tensor | None) -> None:
        """Add left right to the expert's."""
        if self._total is None:  # a frozen weight
            return
        if part is None:
            self._total[expert].addmm_(left, right)
        else:
            self._total[expert].add_(torch.mm(left, right, out=part))

    def done(self) -> torch.Tensor | None:
        """What backward returns for the weight."""
        if not self._collected:
            return self._total
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self._weight)
