"""The feed-forward of many experts on a CPU, from tokens to tokens: gather, two matmuls, SwiGLU and sum in one pass.

Each expert's rows are gathered into memory that stays in the cache and serves one expert after another: neither the
copies of the tokens nor the activations are kept for backward, only the tokens and the first matmul's output. Threads
take experts, the largest first. All is computed in the type in which this CPU multiplies; in bf16 an expert's rows are
rounded up with rows of weight zero, since oneDNN builds a new matmul for every number of rows it meets.

T tokens, R routed copies sorted by expert, r rows of one expert, H hidden, F expert FFN, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from perilune.kernels import matmul, threads
from perilune.kernels.matmul import cast
from perilune.kernels.permute import Order, sum_copies
from perilune.kernels.weight_gradient import WeightGradient

ROWS = 32  # rows of an expert are a multiple of this, where they are multiplied in bf16


def routed_swiglu(
    x_TH: torch.Tensor, w1_EGH: torch.Tensor, w2_EHF: torch.Tensor, probs_R: torch.Tensor, order: Order
) -> torch.Tensor:
    """The sum over a token's experts of prob * (silu(x gate) * (x up)) down. Returns [T, H].

    `w1_EGH` is [E, 2F, H], gate rows before up rows; `w2_EHF` is [E, H, F]; `probs_R` in the order's.
    `kernels/weight_gradient.py` says where the weights' gradients go.
    """
    out: torch.Tensor = _Routed.apply(x_TH, w1_EGH, w2_EHF, probs_R, order)
    return out


@dataclass(frozen=True)
class _Rounded:
    """The order, in bf16 with each expert's rows rounded up: row 0 with weight 0 stands where there is no copy."""

    tokens: torch.Tensor  # [padded R]
    probs: torch.Tensor  # [padded R, 1]
    rows_R: torch.Tensor  # the row of each copy
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, order: Order, probs_R: torch.Tensor, dtype: torch.dtype) -> _Rounded:
        counts = order.counts_E.to(torch.int64)
        multiple = ROWS if dtype is torch.bfloat16 else 1
        sizes = (counts + multiple - 1) // multiple * multiple
        moved = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
        rows_R = torch.arange(probs_R.numel(), device=probs_R.device) + moved[order.experts_R]
        total = int(sizes.sum())
        tokens = rows_R.new_zeros(total).index_copy_(0, rows_R, order.tokens_R)
        probs = probs_R.new_zeros(total, dtype=dtype).index_copy_(0, rows_R, probs_R.to(dtype))
        return cls(tokens, probs[:, None], rows_R, tuple(sizes.tolist()))

    def share(self, work: Callable[[Iterator[int]], None]) -> None:
        """Do `work` on the experts that have rows, the largest first, on as many threads as pay."""
        experts = [e for e, size in enumerate(self.sizes) if size]
        experts.sort(key=self.sizes.__getitem__, reverse=True)
        threads.share(work, experts, threads.worth([self.sizes[e] for e in experts]))

    def split(self, *rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Of each expert its part of each of `rows` [padded R, ...].

        For all experts before threads take them: a view that a thread makes itself waits for Python's lock while
        another makes its own.
        """
        return list(zip(*(x.split(self.sizes) for x in rows), strict=True))


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, probs_R: torch.Tensor, order: Order
    ) -> torch.Tensor:
        wide_TH = matmul.wide(x_TH)
        rounded = _Rounded.of(order, probs_R, wide_TH.dtype)
        (H, F), most = w2.shape[1:], max(rounded.sizes, default=0)
        h_all, out_all = (x.new_empty(rounded.tokens.numel(), n) for x, n in ((x_TH, 2 * F), (wide_TH, H)))

        views = rounded.split(rounded.tokens, rounded.probs, h_all, h_all[:, :F], h_all[:, F:], out_all)
        weights = list(zip(w1.detach(), w2.detach(), strict=True))

        def work(experts: Iterator[int]) -> None:
            x_most, act_most, h_most = (wide_TH.new_empty(most, n) for n in (H, F, 2 * F))
            buffer = wide_TH.new_empty(2 * F * H)
            for e in experts:
                size, (w1_e, w2_e) = rounded.sizes[e], weights[e]
                tokens, prob, kept, gate, up, out = views[e]
                x, act = x_most[:size], act_most[:size]
                torch.index_select(wide_TH, 0, tokens, out=x)
                if kept.dtype == x.dtype:
                    torch.mm(x, cast(w1_e, buffer).T, out=kept)
                else:
                    h = torch.mm(x, cast(w1_e, buffer).T, out=h_most[:size])
                    kept.copy_(h)
                    gate, up = h[:, :F], h[:, F:]
                torch.ops.aten.silu.out(gate, out=act)
                act.mul_(up).mul_(prob)
                torch.mm(act, cast(w2_e, buffer).T, out=out)

        rounded.share(work)
        ctx.save_for_backward(x_TH, w1, w2, h_all)
        ctx.weights = w1, w2
        ctx.rounded, ctx.order, ctx.probs_dtype = rounded, order, probs_R.dtype
        return sum_copies(out_all, rounded.rows_R[order.copies_TK]).to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> Any:
        x_TH, w1, w2, h_all = ctx.saved_tensors
        rounded: _Rounded = ctx.rounded
        wide_TH, grad_TH = matmul.wide(x_TH), matmul.wide(grad_TH).contiguous()
        total, (H, F), most = rounded.tokens.numel(), w2.shape[1:], max(rounded.sizes, default=0)
        dw1, dw2 = (WeightGradient(w, needed) for w, needed in zip(ctx.weights, ctx.needs_input_grad[1:3], strict=True))
        dx_all, dprobs = (
            wide_TH.new_empty(total, H),
            wide_TH.new_empty(total, dtype=torch.promote_types(wide_TH.dtype, torch.float32)),
        )

        views = rounded.split(rounded.tokens, rounded.probs, h_all, dprobs, dx_all)
        weights = list(zip(w1, w2, strict=True))

        def work(experts: Iterator[int]) -> None:
            x_most, g_most, dh_most = (wide_TH.new_empty(most, size) for size in (H, H, 2 * F))
            part1, part2 = dw1.buffer(w1.shape[1:]), dw2.buffer(w2.shape[1:])
            buffers = [wide_TH.new_empty(most, F) for _ in range(4)]
            weight, hidden = wide_TH.new_empty(2 * F * H), wide_TH.new_empty(most * 2 * F)
            for e in experts:
                size, (w1_e, w2_e) = rounded.sizes[e], weights[e]
                tokens, prob, h, dprob, dx = views[e]
                x, g, dh = x_most[:size], g_most[:size], dh_most[:size]
                silu, product, d_act, other = (buffer[:size] for buffer in buffers)
                h = cast(h, hidden)
                gate, up = h[:, :F], h[:, F:]
                torch.index_select(wide_TH, 0, tokens, out=x)
                torch.index_select(grad_TH, 0, tokens, out=g)
                torch.mm(g, cast(w2_e, weight), out=d_act)
                torch.ops.aten.silu.out(gate, out=silu)
                torch.mul(silu, up, out=product)
                torch.sum(torch.mul(d_act, product, out=other), -1, dtype=dprob.dtype, out=dprob)
                dw2.add(g.T, product.mul_(prob), part2, e)
                d_act.mul_(prob)
                torch.mul(d_act, silu, out=dh[:, F:])
                torch.mul(d_act, up, out=other)
                torch.ops.aten.silu_backward.grad_input(other, gate, grad_input=dh[:, :F])
                dw1.add(dh.T, x, part1, e)
                torch.mm(dh, cast(w1_e, weight), out=dx)

        rounded.share(work)
        dx_TH = sum_copies(dx_all, rounded.rows_R[ctx.order.copies_TK]).to(x_TH.dtype)
        return dx_TH, dw1.done(), dw2.done(), dprobs[rounded.rows_R].to(ctx.probs_dtype), None
