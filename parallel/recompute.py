"""Activation recomputation (gradient checkpointing) by name: what backward computes again instead of keeping.

`full` keeps only the input of each layer, MTP's included. `selective` recomputes the named modules; DeepSeek-V3 does so
with norms, the MLA up-projection and SwiGLU (arXiv 2412.19437, section 3.2.3). Gradients stay what they are without.
"""

from __future__ import annotations

from typing import Any

# Megatron-core's names, and `mtp`, which is ours.
MODULES = {
    "core_attn": "attention core: q, k, v are kept, scores and output are not",
    "mla_up_proj": "MLA up-projections and RoPE: only the latents are kept",
    "layernorm": "norms before attention and FFN",
    "mlp": "FFN of the dense layers, and of a tower's",
    "moe": "whole MoE layer: routing, dispatch and experts run twice",
    "moe_act": "SwiGLU of the routed experts",
    "shared_experts": "shared experts",
    "mtp": "whole MTP layers",
}

TOWER = ("core_attn", "layernorm", "mlp")  # what a vision tower's layers have of these


def of_tower(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `modules` that a vision tower has: the others are the decoder's alone."""
    return tuple(name for name in modules if name in TOWER)


def problem(granularity: str, modules: tuple[str, ...]) -> str | None:
    """What is wrong with a policy, or None."""
    if unknown := [name for name in modules if name not in MODULES]:
        return f"recompute.modules={unknown} are not among {list(MODULES)}"
    if granularity == "selective" and not modules:
        return f"recompute.granularity=selective needs recompute.modules, some of {list(MODULES)}"
    if granularity != "selective" and modules:
        return (
            f"recompute.modules={list(modules)} with recompute.granularity={granularity}: modules are chosen by "
            "recompute.granularity=selective"
        )
    if "moe" in modules and (inner := [name for name in ("moe_act", "shared_experts") if name in modules]):
        return f"recompute.modules names moe and {inner}, which it contains; leave out one or the other"
    return None


def settings(granularity: str, modules: tuple[str, ...]) -> dict[str, Any]:
    """Megatron-core's settings of a policy. `mtp` is not among them: MTP's layers get their own (`moe/mtp.py`)."""
    if granularity == "none":
        return {"recompute_granularity": None}
    if granularity == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    own = [name for name in modules if name != "mtp"]
    return {"recompute_granularity": "selective" if own else None, "recompute_modules": own or None}
