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
        ctx.weight = weight_NK
        x_TK = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], weight_NK.shape[0])
        product = _Product(matmul.wide(weight_NK).T, out.view(-1, weight_NK.shape[0]))
        for at, (x_CK,) in _chunks(x_TK):
            product.put(at, x_CK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight_NK = ctx.saved_tensors
        grad_TN, x_TK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        dw = WeightGradient(ctx.weight, ctx.needs_input_grad[1])
        into = None if dx is None else _Product(matmul.wide(weight_NK), dx.view(x_TK.shape))
        part = dw.buffer(weight_NK.shape) if ctx.needs_input_grad[1] else None
        for at, (grad_CN, x_CK) in _chunks(grad_TN, x_TK):
            if into is not None:
                into.put(at, grad_CN)
            if ctx.needs_input_grad[1]:
                dw.add(grad_CN.T, x_CK, part)
        return dx, dw.done()


class _Product:
    """The rows of a product, as they come, into a tensor that may have another type."""

    def __init__(self, right_KN: torch.Tensor, out_TN: torch.Tensor) -> None:
        self._right, self._out = right_KN, out_TN
        rows = min(CHUNK, len(out_TN)) if right_KN.dtype != out_TN.dtype else 0
        self._buffer = right_KN.new_empty(rows, right_KN.shape[1])

    def put(self, at: int, left_CK: torch.Tensor) -> None:
        """The product's rows from `at` on."""
        out = self._out[at : at + len(left_CK)]
        if out.dtype == self._right.dtype:
            torch.mm(left_CK, self._right, out=out)
        else:
            out.copy_(torch.mm(left_CK, self._right, out=self._buffer[: len(left_CK)]))


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Where rows begin and the same rows of each tensor, in the type that it is multiplied in: valid until the next.

    All at once if that is the type they have.
    """
    if all(matmul.working(x) == x.dtype for x in tensors):
        yield 0, tensors
        return
    buffers = [x.new_empty(min(CHUNK, len(x)) * x.shape[1], dtype=matmul.working(x)) for x in tensors]
    for at in range(0, len(tensors[0]), CHUNK):
        yield at, tuple(matmul.cast(x[at : at + CHUNK], b) for x, b in zip(tensors, buffers, strict=True))
