"""RMSNorm as a layer-spec submodule: Megatron-core's own torch wrapper refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch

from perilune.kernels.norm import rms_norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dim, in the input's precision.

    The weight is marked `sequence_parallel` when the tokens are split over tensor-parallel ranks: each rank then has
    the gradient of its own tokens only, and Megatron-core sums the marked ones.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
