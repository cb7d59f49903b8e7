"""Rotary position embedding (arXiv 2104.09864) of pairs that are neighbours in the input, as DeepSeek's MLA has them.

`rotate_pairs` puts out first all even, then all odd members of the pairs, as DeepSeek's and Megatron-core's do:
attention sees the same order in queries and keys, so nothing is moved back. `rotate_neighbours` leaves each in place.
`rotate_tails` and `keys_and_values` are MLA's (DeepSeek-V2, arXiv 2405.04434, section 2.1.3), with as few copies as its
projections allow.
T tokens, N heads, R the rotated size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rotate_pairs(x_TNR: torch.Tensor, cos_T1C: torch.Tensor, sin_T1C: torch.Tensor) -> torch.Tensor:
    """Pair i of each token turned by the angle of which `[..., i]` are the cos and the sin (C = R / 2)."""
    out: torch.Tensor = _Rotate.apply(x_TNR, cos_T1C, sin_T1C)
    return out


def rotate_tails(x_TNX: torch.Tensor, cos_T1C: torch.Tensor, sin_T1C: torch.Tensor) -> torch.Tensor:
    """`rotate_pairs` of the last R = 2C of a head's X numbers, written over them: `x_TNX` is returned.

    Its gradient is written over too. So nothing else may need the values of `x_TNX`, nor the gradient of what is
    returned: of MLA's queries the projection and attention need neither.
    """
    out: torch.Tensor = _RotateTails.apply(x_TNX, cos_T1C, sin_T1C)
    return out


def keys_and_values(kv_TNX: torch.Tensor, key_T1R: torch.Tensor, P: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of MLA's up-projection, with the first P of X numbers of a head's key and its value after them, and the key that
    all heads share: keys [T, N, P + R] and values [T, N, X - P].
    """
    key, value = _KeysAndValues.apply(kv_TNX, key_T1R, P)
    return key, value


def rotate_neighbours(x_TNR: torch.Tensor, turns_T1C: torch.Tensor) -> torch.Tensor:
    """Pair i of each token times the complex number `turns_T1C[..., i]` (C = R / 2), in fp32 whatever the type of x."""
    pairs = torch.view_as_complex(x_TNR.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_T1C).flatten(-2).to(x_TNR.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _turned_back(grad, *ctx.saved_tensors), None, None


class _RotateTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        tail = x[..., -2 * cos.shape[-1] :]
        tail.copy_(_turned(tail, cos, sin))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        grad = grad.contiguous()  # in memory of its own, where one number stands for many
        tail = grad[..., -2 * cos.shape[-1] :]
        tail.copy_(_turned_back(tail, cos, sin))
        return grad, None, None


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: torch.Tensor, shared: torch.Tensor, P: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.P = P
        key = kv.new_empty(*kv.shape[:-1], P + shared.shape[-1])
        key[..., :P], key[..., P:] = kv[..., :P], shared
        return key, kv[..., P:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_key: torch.Tensor, d_value: torch.Tensor) -> Any:
        own, shared = d_key.split([ctx.P, d_key.shape[-1] - ctx.P], dim=-1)
        return torch.cat((own, d_value), dim=-1), shared.sum(-2, keepdim=True), None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = out.chunk(2, dim=-1)
    torch.mul(even, cos, out=first).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=second).addcmul_(even, sin)
    return out


def _turned_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = grad.chunk(2, dim=-1)
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., 0::2]).addcmul_(second, sin)
    torch.mul(second, cos, out=out[..., 1::2]).addcmul_(first, sin, value=-1)
    return out


def reference(x_TNR: torch.Tensor, cos_T1C: torch.Tensor, sin_T1C: torch.Tensor) -> torch.Tensor:
    """`rotate_pairs` as a product of complex numbers, in fp32; for tests."""
    pairs = torch.view_as_complex(x_TNR.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos_T1C.float(), sin_T1C.float())
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_TNR.dtype)
