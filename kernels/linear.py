"""A linear layer on a CPU: its weight's gradient is added where DDP collects it, bf16 multiplied as the CPU is fastest.

T tokens, K in, N out, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from perilune.kernels import matmul
from perilune.kernels.weight_gradient import WeightGradient

CHUNK = 1024  # tokens that are cast at once, into memory that stays in the cache


def linear(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x weight^T; [..., K] to [..., N]. `kernels/weight_gradient.py` says where the weight's gradient goes."""
    out: torch.Tensor = _Linear.apply(x, weight_NK)
    return out


def reference(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """The same by one matmul in the type that they have; for tests."""
    return x @ weight_NK.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight_NK)
        x_TK = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], weight_NK.shape[0])
        _product(x_TK, weight_NK.T, out.view(-1, weight_NK.shape[0]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight_NK = ctx.saved_tensors
        grad_TN, x_TK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            _product(grad_TN, weight_NK, dx.view(x_TK.shape))
        dw = WeightGradient(weight_NK, ctx.needs_input_grad[1])
        if ctx.needs_input_grad[1]:
            part = dw.buffer(weight_NK.shape)
            for left, right in _chunks(grad_TN, x_TK):
                dw.add(left.T, right, part)
        return dx, dw.done()


def _product(a_TK: torch.Tensor, b_KN: torch.Tensor, out_TN: torch.Tensor) -> None:
    b_KN = matmul.wide(b_KN)
    if b_KN.dtype == out_TN.dtype:
        torch.mm(a_TK, b_KN, out=out_TN)
        return
    buffer = b_KN.new_empty(min(CHUNK, len(a_TK)) * b_KN.shape[1])
    at = 0
    for (a_CK,) in _chunks(a_TK):
        product = torch.mm(a_CK, b_KN, out=buffer[: len(a_CK) * b_KN.shape[1]].view(len(a_CK), -1))
        out_TN[at : at + len(a_CK)] = product
        at += len(a_CK)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of each in their working type, valid until the next: all at once if that is the type they have."""
    if all(matmul.working(x) == x.dtype for x in tensors):
        yield tensors
        return
    buffers = [x.new_empty(min(CHUNK, len(x)) * x.shape[1], dtype=matmul.working(x)) for x in tensors]
    for at in range(0, len(tensors[0]), CHUNK):
        yield tuple(matmul.cast(x[at : at + CHUNK], buffer) for x, buffer in zip(tensors, buffers, strict=True))
