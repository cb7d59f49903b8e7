"""RMSNorm (arXiv 1910.07467) over the last dim. R rows, H the size of the last dim.

PyTorch has a fused kernel on GPU; on CPU it is a chain of operations over the whole tensor, in forward and again in
backward. Ours walks over rows in chunks that stay in the cache, and keeps only the input and a number a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 1 << 18  # fp32 numbers at once: a megabyte


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32. Returns x's shape and type."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    out: torch.Tensor = _RmsNorm.apply(x, weight_H, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x_RH = x.reshape(-1, x.shape[-1])
        mean_R1 = torch.linalg.vector_norm(x_RH, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        scale_R1 = mean_R1.add_(eps).rsqrt_()
        out_RH, weight = torch.empty_like(x_RH), weight_H.float()
        buffer = _buffer(x_RH)
        for rows in _chunks(x_RH):
            wide, out = _in_fp32(out_RH[rows], buffer), out_RH[rows]
            torch.mul(x_RH[rows], scale_R1[rows], out=wide).mul_(weight)
            if wide.dtype != out.dtype:
                out.copy_(wide)
        ctx.save_for_backward(x_RH, weight_H, scale_R1)
        return out_RH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x_RH, weight_H, scale_R1 = ctx.saved_tensors
        grad_RH, weight = grad.reshape(x_RH.shape), weight_H.float()
        dx_RH, dweight = torch.empty_like(x_RH), torch.zeros_like(weight)
        units, products = _buffer(x_RH), _buffer(x_RH)
        for rows in _chunks(x_RH):
            scale, grad_rows, dx = scale_R1[rows], grad_RH[rows], dx_RH[rows]
            unit, product = units[: len(dx)], products[: len(dx)]
            torch.mul(x_RH[rows], scale, out=unit)
            torch.mul(grad_rows, unit, out=product)
            dweight += product.sum(0)
            along = (product @ weight).div_(weight.numel()).unsqueeze(1)
            wide = _in_fp32(dx, products)
            torch.mul(grad_rows, weight, out=wide).addcmul_(unit, along, value=-1).mul_(scale)
            if wide.dtype != dx.dtype:
                dx.copy_(wide)
        return dx_RH.view(grad.shape), dweight.to(weight_H.dtype), None


def _rows(x_RH: torch.Tensor) -> int:
    return max(1, CHUNK // x_RH.shape[1])


def _chunks(x_RH: torch.Tensor) -> Iterator[slice]:
    for at in range(0, x_RH.shape[0], _rows(x_RH)):
        yield slice(at, at + _rows(x_RH))


def _buffer(x_RH: torch.Tensor) -> torch.Tensor:
    """fp32 memory of a chunk, without content."""
    return torch.empty(min(len(x_RH), _rows(x_RH)), x_RH.shape[1], dtype=torch.float32, device=x_RH.device)


def _in_fp32(out: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Where the chunk `out` is computed: in its own memory if that is fp32."""
    return out if out.dtype == buffer.dtype else buffer[: len(out)]


def reference(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula in fp32; for tests."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H.float()).to(x.dtype)
