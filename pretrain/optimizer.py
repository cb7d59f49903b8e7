"""AdamW by Megatron-core's distributed optimizer: fp32 masters and moments, sharded over data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from perilune.pretrain.model import Model
from perilune.pretrain.schema import Config


def build(config: Config, model: Model) -> Any:
    """Megatron-core's optimizer over `model`'s chunks. `train_step` sets the learning rate."""
    o = config.optim
    bf16 = config.precision.compute == "bf16"
    options = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.zero1,
        overlap_param_gather=config.parallel.overlap_param_gather,
        log_num_zeros_in_grad=False,
    )
    built = get_megatron_optimizer(options, model.chunks, use_gloo_process_groups=False)
    for part in getattr(built, "chained_optimizers", [built]):
        _number_as_ordered(part)
        if isinstance(adam := getattr(part, "optimizer", None), torch.optim.AdamW):
            for group in adam.param_groups:
                group["fused"] = True  # one pass over memory in place of ten; Megatron-core has no key for it
    return built


def _number_as_ordered(part: Any) -> None:
    """Number the parameters of each group as the group orders them: those of fp32 first, then the 16-bit ones' masters.

    Megatron-core 0.19.2 numbers them in the model's order (distrib_optimizer.py, _build_optimizer_group_ranges) and
    finds a parameter's master and moments by that: another one's, where a 16-bit model has fp32 parameters too.
    """
    places = getattr(part, "model_param_group_index_map", {})
    by_group: dict[int, list[tuple[bool, int, torch.nn.Parameter]]] = {}
    for parameter, (group, order) in places.items():
        by_group.setdefault(group, []).append((parameter.dtype is not torch.float32, order, parameter))
    for group, members in by_group.items():
        for order, (*_, parameter) in enumerate(sorted(members, key=lambda member: member[:2])):
            places[parameter] = (group, order)
