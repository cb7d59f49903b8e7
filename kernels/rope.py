"""Rotary position embedding (arXiv 2104.09864) of pairs that are neighbours, as DeepSeek's MLA and MoonViT have them.

Both members of a pair stay where they are. DeepSeek's and Megatron-core's code puts all first ones before all second
ones; no product of a query and a key sees which, so nothing is moved here: a pair is a complex number, and turning it
one multiplication. `rotate_tails` and `keys_and_values` are MLA's (DeepSeek-V2, arXiv 2405.04434, section 2.1.3), with
as few copies as its projections allow.
T tokens, N heads, R = 2C the rotated size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rotate_neighbours(x_TNR: torch.Tensor, turns_T1C: torch.Tensor) -> torch.Tensor:
    """Pair i of each token times the complex number `turns_T1C[..., i]`, in fp32 whatever the type of x."""
    wide = x_TNR.float()
    pairs = _pairs(wide if _paired(wide) else wide.contiguous())
    return torch.view_as_real(pairs * turns_T1C).flatten(-2).to(x_TNR.dtype)


def rotate_tails(x_TNX: torch.Tensor, turns_T1C: torch.Tensor) -> torch.Tensor:
    """`rotate_neighbours` of the last R of a head's X numbers, written over them: `x_TNX` is returned.

    Its gradient is written over too. So nothing else may need the values of `x_TNX`, nor the gradient of what is
    returned: of MLA's queries the projection and attention need neither.
    """
    out: torch.Tensor = _RotateTails.apply(x_TNX, turns_T1C)
    return out


def keys_and_values(kv_TNX: torch.Tensor, key_T1R: torch.Tensor, P: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of MLA's up-projection, with the first P of X numbers of a head's key and its value after them, and the key that
    all heads share: keys [T, N, P + R] and values [T, N, X - P].
    """
    key, value = _KeysAndValues.apply(kv_TNX, key_T1R, P)
    return key, value


class _RotateTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(turns)
        _turn(x[..., -2 * turns.shape[-1] :], turns)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (turns,) = ctx.saved_tensors
        grad = grad.contiguous()  # in memory of its own, where one number stands for many
        _turn(grad[..., -2 * turns.shape[-1] :], turns.conj())
        return grad, None


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


def _turn(x_TNR: torch.Tensor, turns_T1C: torch.Tensor) -> None:
    """In place."""
    if x_TNR.dtype is torch.float32 and _paired(x_TNR):
        _pairs(x_TNR).mul_(turns_T1C)
    else:
        x_TNR.copy_(rotate_neighbours(x_TNR, turns_T1C))


def _pairs(x_TNR: torch.Tensor) -> torch.Tensor:
    """As complex numbers [T, N, C], in the same memory."""
    return torch.view_as_complex(x_TNR.unflatten(-1, (-1, 2)))


def _paired(x: torch.Tensor) -> bool:
    """Whether torch sees complex numbers in it as it lies."""
    return x.stride(-1) == 1 and not any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1]))


def reference(x_TNR: torch.Tensor, turns_T1C: torch.Tensor) -> torch.Tensor:
    """`rotate_neighbours` by sines and cosines, in fp32; for tests."""
    even, odd = x_TNR.float()[..., 0::2], x_TNR.float()[..., 1::2]
    cos, sin = turns_T1C.real, turns_T1C.imag
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_TNR.dtype)
