"""The recipe of numbers: which modules compute (Transformer Engine's or ours), in which type.

Transformer Engine is reached only through Megatron-core's spec provider. `fp8` other than `off` selects its recipe.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider


def have_transformer_engine() -> bool:
    """Whether all of Transformer Engine is here (its core wheel alone breaks the import of Megatron-core)."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


class OurSpecProvider(LocalSpecProvider):
    """Megatron-core's local modules with the norm, attention core and experts that it lacks without TE.

    The layers above (moe, vision) bring their own modules: they are handed in, so that this one imports neither.
    """

    def __init__(self, norm: type, core_attention: type, experts: type) -> None:
        self._norm, self._core_attention, self._experts = norm, core_attention, experts

    def linear(self) -> type:
        """Down projections are sharded by column here; Transformer Engine keeps them whole on each rank."""
        return self.column_parallel_linear()

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        del rms_norm, for_qk, has_residual
        return self._norm

    def core_attention(self) -> type:
        return self._core_attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        del moe_use_grouped_gemm
        return self._experts


def spec_provider(norm: type, core_attention: type, experts: type) -> Any:
    """Transformer Engine's provider on a GPU where all of it is installed, else ours."""
    if torch.cuda.is_available() and have_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return OurSpecProvider(norm, core_attention, experts)


def with_eps(norm: Any, eps: float) -> Any:
    """A norm builder with its own epsilon (the latent norms' differs from the others' in some models)."""

    def build(*, config: Any, hidden_size: int, **kwargs: Any) -> torch.nn.Module:
        return norm(**(kwargs | {"config": config, "hidden_size": hidden_size, "eps": eps}))

    return build


def dtype(compute: str) -> torch.dtype:
    """The type of weights and activations in forward and backward; masters and optimizer state are fp32."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]


def name() -> str:
    """Which modules compute, for the log."""
    if torch.cuda.is_available() and have_transformer_engine():
        return "Transformer Engine's modules"
    return "our modules in Megatron-core's local spec"
