"""The gradient of a weight, summed where Megatron-core's DDP collects it, if it does."""

from __future__ import annotations

from types import EllipsisType

import torch

from perilune.kernels import matmul


class WeightGradient:
    """Of a weight, or of many in one tensor: as forward was given it, for what autograd saved may be a copy of it.

    Where the weight has Megatron-core's `main_grad` (its DDP's buffer) products are added there;
    `grad_added_to_main_grad` says so, and backward returns memory without content in the gradient's place (zeros
    where Megatron-core marks a weight for that), as its own layers do where accumulation is fused.
    """

    def __init__(self, weight: torch.Tensor, needed: bool) -> None:
        self._weight = weight
        collected: torch.Tensor | None = getattr(weight, "main_grad", None) if needed else None
        self._collected = collected is not None
        dtype = matmul.working(weight)
        self._total = torch.zeros_like(weight, dtype=dtype) if needed and collected is None else collected

    def buffer(self, shape: torch.Size) -> torch.Tensor | None:
        """For `add`: where products of `shape` lie that have another type than their sum."""
        dtype = matmul.working(self._weight)
        other_type = self._total is not None and self._total.dtype != dtype
        return self._weight.new_empty(shape, dtype=dtype) if other_type else None

    def add(
        self, left: torch.Tensor, right: torch.Tensor, part: torch.Tensor | None, which: int | EllipsisType = ...
    ) -> None:
        """Add left right, in the weight's working type, to that of weight `which`."""
        if self._total is None:  # a frozen weight
            return
        total = self._total[which]
        if part is None:
            torch.addmm(total, left, right, out=total)  # torch's counter of FLOPs does not know addmm_
        else:
            total.add_(torch.mm(left, right, out=part))

    def done(self) -> torch.Tensor | None:
        """What backward returns for the weight."""
        if self._total is None or not self._collected:
            return None if self._total is None else self._total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        made = torch.zeros_like if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like
        return made(self._weight)
