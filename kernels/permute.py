"""Tokens into the order of their experts and back, by one sort and gathers: no dense mask is multiplied.

T tokens, E experts, K experts of each token, R = T * K routed copies, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Order:
    """Where the routed copies of tokens lie once they are sorted by expert, tokens of one expert in their old order."""

    tokens_R: torch.Tensor  # the token of each copy
    experts_R: torch.Tensor  # its expert, ascending
    copies_TK: torch.Tensor  # a token's copies, by expert
    counts_E: torch.Tensor

    @classmethod
    def of(cls, chosen_TE: torch.Tensor, K: int) -> Order:
        """From which experts each token chose (bool, K in every line). Raises ValueError for another number of all."""
        experts_R, tokens_R = chosen_TE.T.nonzero(as_tuple=True)
        if tokens_R.numel() != chosen_TE.shape[0] * K:
            raise ValueError(f"{tokens_R.numel()} choices of {chosen_TE.shape[0]} tokens that choose {K} experts each")
        copies_TK = tokens_R.argsort(stable=True).view(-1, K)
        return cls(tokens_R, experts_R, copies_TK, chosen_TE.sum(0))

    @classmethod
    def sorted(cls, counts_E: torch.Tensor) -> Order:
        """Of copies that lie in this order already: each is its own token."""
        R = int(counts_E.sum())
        at_R = torch.arange(R, device=counts_E.device)
        return cls(at_R, torch.repeat_interleave(counts_E), at_R[:, None], counts_E)


def permute(x_TH: torch.Tensor, order: Order) -> torch.Tensor:
    """The copies sorted by expert, [R, H]."""
    out: torch.Tensor = _Permute.apply(x_TH, order)
    return out


def unpermute(x_RH: torch.Tensor, order: Order) -> torch.Tensor:
    """The sum of each token's copies, [T, H]; summed in fp32."""
    out: torch.Tensor = _Unpermute.apply(x_RH, order)
    return out


def sum_copies(x_RH: torch.Tensor, copies_TK: torch.Tensor) -> torch.Tensor:
    """Lines `copies_TK` of x, summed over K: gathered and added in one pass, without gradient. [T, H]."""
    if copies_TK.shape[1] == 1:
        return x_RH.index_select(0, copies_TK.flatten())
    return F.embedding_bag(copies_TK, x_RH.detach(), mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return x_TH.index_select(0, order.tokens_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: torch.Tensor) -> Any:
        return sum_copies(grad_RH.contiguous(), ctx.order.copies_TK), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return sum_copies(x_RH, order.copies_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> Any:
        return grad_TH.index_select(0, ctx.order.tokens_R), None


def reference_permute(x_TH: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The same expert by expert; for tests."""
    return torch.cat([x_TH[chosen_TE[:, e]] for e in range(chosen_TE.shape[1])])


def reference_unpermute(x_RH: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """The same expert by expert, in fp32; for tests."""
    out_TH = x_RH.new_zeros(chosen_TE.shape[0], x_RH.shape[1], dtype=torch.float32)
    for e, part in enumerate(x_RH.split(chosen_TE.sum(0).tolist())):
        out_TH = out_TH.index_add(0, chosen_TE[:, e].nonzero()[:, 0], part.float())
    return out_TH.to(x_RH.dtype)
