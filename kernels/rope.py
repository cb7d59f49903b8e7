"""Rotary position embedding (arXiv 2104.09864) of pairs that are neighbours in the input, as DeepSeek's MLA has them.

`rotate_pairs` puts out first all even, then all odd members of the pairs, as DeepSeek's and Megatron-core's do:
attention sees the same order in queries and keys, so nothing is moved back. `rotate_neighbours` leaves each in place.
T tokens, N heads, R the rotated size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rotate_pairs(x_TNR: torch.Tensor, angles_T1R: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Pair i of each token turned by `angles_T1R[..., i]` and scaled; the angles' second half repeats the first."""
    angles = angles_T1R[..., : angles_T1R.shape[-1] // 2]
    cos, sin = ((function(angles) * scale).to(x_TNR.dtype) for function in (torch.cos, torch.sin))
    out: torch.Tensor = _Rotate.apply(x_TNR, cos, sin)
    return out


def rotate_neighbours(x_TNR: torch.Tensor, turns_T1C: torch.Tensor) -> torch.Tensor:
    """Pair i of each token times the complex number `turns_T1C[..., i]` (C = R / 2), in fp32 whatever the type of x."""
    pairs = torch.view_as_complex(x_TNR.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_T1C).flatten(-2).to(x_TNR.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        first, second = out.chunk(2, dim=-1)
        torch.mul(even, cos, out=first).addcmul_(odd, sin, value=-1)
        torch.mul(odd, cos, out=second).addcmul_(even, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        first, second = grad.chunk(2, dim=-1)
        dx = torch.empty_like(grad, memory_format=torch.contiguous_format)
        torch.mul(first, cos, out=dx[..., 0::2]).addcmul_(second, sin)
        torch.mul(second, cos, out=dx[..., 1::2]).addcmul_(first, sin, value=-1)
        return dx, None, None


def reference(x_TNR: torch.Tensor, angles_T1R: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The same as a product of complex numbers, in fp32; for tests."""
    pairs = torch.view_as_complex(x_TNR.float().unflatten(-1, (-1, 2)).contiguous())
    angles = angles_T1R[..., : angles_T1R.shape[-1] // 2].float()
    turned = pairs * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_TNR.dtype)
