"""SwiGLU (arXiv 2002.05202) of a dense layer on a CPU: in pieces that stay in the cache; its input alone is kept.

T tokens, F FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 1 << 17  # numbers of the result that are made at once


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of `h` [..., 2F], which has gate before up. Returns [..., F]."""
    out: torch.Tensor = _SwiGlu.apply(h)
    return out


def reference(h: torch.Tensor) -> torch.Tensor:
    """The same as it is written; for tests."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        for gate, up, act in _pieces(h, out):
            torch.ops.aten.silu.out(gate, out=act)
            act.mul_(up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (h,) = ctx.saved_tensors
        dh = torch.empty_like(h, memory_format=torch.contiguous_format)
        buffer = h.new_empty(max(CHUNK, grad.shape[-1]))
        for (gate, up, d_act), (d_gate, d_up, _) in zip(_pieces(h, grad), _pieces(dh, grad), strict=True):
            part = buffer[: d_act.numel()].view(d_act.shape)
            torch.mul(d_act, torch.ops.aten.silu.out(gate, out=part), out=d_up)
            torch.ops.aten.silu_backward.grad_input(torch.mul(d_act, up, out=part), gate, grad_input=d_gate)
        return dh


def _pieces(h: torch.Tensor, act: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Gate, up and the rows of `act` beside them."""
    F = act.shape[-1]
    rows = max(1, CHUNK // F)
    for h_rows, act_rows in zip(h.reshape(-1, 2 * F).split(rows), act.reshape(-1, F).split(rows), strict=True):
        yield h_rows[:, :F], h_rows[:, F:], act_rows
