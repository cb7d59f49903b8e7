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

CHUNK = 1 << 17  # fp32 numbers at once: half a megabyte


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
        for rows in _chunks(x_RH):
            out_RH[rows] = (x_RH[rows] * scale_R1[rows]).mul_(weight)
        ctx.save_for_backward(x_RH, weight_H, scale_R1)
        return out_RH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x_RH, weight_H, scale_R1 = ctx.saved_tensors
        grad_RH, weight = grad.reshape(x_RH.shape), weight_H.float()
        dx_RH, dweight = torch.empty_like(x_RH), torch.zeros_like(weight)
        for rows in _chunks(x_RH):
            scale = scale_R1[rows]
            unit, g = x_RH[rows] * scale, grad_RH[rows].to(torch.float32, copy=True)
            product = g * unit
            dweight += product.sum(0)
            along = (product @ weight).div_(weight.numel()).unsqueeze(1)
            dx_RH[rows] = g.mul_(weight).addcmul_(unit, along, value=-1).mul_(scale)
        return dx_RH.view(grad.shape), dweight.to(weight_H.dtype), None


def _chunks(x_RH: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // x_RH.shape[1])
    for at in range(0, x_RH.shape[0], rows):
        yield slice(at, at + rows)


def reference(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula in fp32; for tests."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H.float()).to(x.dtype)
