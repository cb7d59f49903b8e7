"""A run's optimizer: Megatron-core's distributed one, with AdamW or Muon in it, and an average of the weights beside.

fp32 masters and moments are sharded over data-parallel ranks (`parallel.zero1`), or held whole on each. All weights
decay but those marked `undecayed`: the contrastive scale and bias (`vision/contrastive.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from perilune.parallel import mesh as meshes
from perilune.parallel import precision
from perilune.pretrain import checkpoint
from perilune.pretrain import checkpoint_optimizer as moments
from perilune.pretrain.model import Model
from perilune.pretrain.optim.average import Average, average_of
from perilune.pretrain.optim.matrices import Box, Name, cut_of, is_muons
from perilune.pretrain.optim.muon import Muon, Piece
from perilune.pretrain.rules import PARTS, part_of
from perilune.pretrain.schema import Config


def build(config: Config, model: Model) -> Any:
    """Megatron-core's optimizer over `model`'s chunks. `train_step` sets the learning rate. Collective."""
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
    # Of what Megatron-core knows of a group, these two are free: a group of its own for what does not decay.
    apart = get_standard_config_overrides(options)
    apart[ParamKey(attr="undecayed")] = ParamGroupOverride(start_wd=0.0, end_wd=0.0)
    built = get_megatron_optimizer(options, model.chunks, config_overrides=apart, use_gloo_process_groups=False)
    for part in moments.optimizers(built):
        _number_as_ordered(part)
        for group in part.param_groups:
            group["weight_decay"] = group.get("end_wd", o.weight_decay)
    if o.name == "muon":
        _put_muon_into(built, config, model)
    for part in moments.optimizers(built):
        if isinstance(adam := part.optimizer, torch.optim.AdamW):
            for group in adam.param_groups:
                group["fused"] = True  # one pass over memory in place of ten; Megatron-core has no key for it
        if o.ema_decay:
            part.average = Average(part, o.ema_decay)
    return built


def update(optimizer: Any) -> None:
    """Move the weights by the gradients, which are ready, and let their average follow. Collective."""
    averages = [found for part in moments.optimizers(optimizer) if (found := average_of(part)) is not None]
    for average in averages:
        average.begin()
    optimizer.step_with_ready_grads()
    for average in averages:
        average.follow()


def update_rms(optimizer: Any) -> float | None:
    """Root mean square of the last step's updates, before the learning rate: the mean over Muon's matrices.

    None without Muon. Collective.
    """
    inner = [one.optimizer for one in moments.optimizers(optimizer)]
    found = [one.update_rms for one in inner if isinstance(one, Muon)]
    if not found:
        return None
    total = torch.stack(found).sum(0)
    dist.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))


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


def _put_muon_into(built: Any, config: Config, model: Model) -> None:
    """Let Muon take AdamW's place in each optimizer of Megatron-core's chain."""
    entries = {entry.data: entry for entry in nested_values(checkpoint.model_state(model))}
    groups = {False: parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)}
    groups[True] = _holders_of_experts() if config.model.n_routed_experts else groups[False]
    for part in moments.optimizers(built):
        pieces, shapes = _pieces(part, entries, config)
        experts = any(group["is_expert_parallel"] for group in part.param_groups)
        inner = Muon(
            part.optimizer.param_groups,
            pieces,
            shapes,
            groups[experts],
            momentum=config.optim.momentum,
            dtype=precision.dtype(config.precision.compute),
            device=meshes.device(),
        )
        part.optimizer, part.init_state_fn = inner, lambda opt, config=None: opt.init_state()


def _pieces(
    part: Any, entries: dict[torch.Tensor, Any], config: Config
) -> tuple[list[Piece], dict[Name, tuple[int, int]]]:
    """What this rank optimizes of Muon's matrices, and their shapes."""
    pieces: list[Piece] = []
    shapes: dict[Name, tuple[int, int]] = {}
    for weight, parameter, start, end in moments.ranges(part):
        stored = moments.parts_of(entries[weight])
        key, shape = stored[0][0].key, tuple(stored[0][0].global_shape)
        if not is_muons(key, len(shape)):
            continue
        cut = cut_of(key, shape[-2], _head_dim(key, config))
        for begin, values in moments.views(parameter, start, end, tuple(weight.shape)):
            for _, offsets, box in moments.placed(stored, begin, values):
                first, row, column = (0, *offsets)[-3:]
                for expert, matrix in enumerate(box.unsqueeze(0) if box.ndim == 2 else box, start=first):
                    for number, at, stored_row, rows in cut.segments(row, matrix.shape[0]):
                        name = Name(key, expert, number)
                        shapes[name] = (shape[-2] // cut.parts, shape[-1])
                        view = matrix.narrow(0, stored_row - row, rows)
                        offset = view.storage_offset() - parameter.storage_offset()
                        where = Box(name, at, column, rows, matrix.shape[1])
                        pieces.append(Piece(parameter, where, offset, view.stride()))  # type: ignore[arg-type]
    return pieces, shapes


def _head_dim(key: str, config: Config) -> int:
    """Of the fused queries, keys and values of the layers to which a tensor belongs."""
    sizes = config.contrastive if part_of(key) == PARTS[2] else config.vision
    return sizes.hidden_size // sizes.num_attention_heads


def _holders_of_experts() -> dist.ProcessGroup:
    """The ranks that hold parts or copies of the same experts as this one. Collective over all ranks."""
    tensor, data = parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_data_parallel_group()
    if tensor.size() == 1:
        return data
    if data.size() == 1:
        return tensor
    mine = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank())
    everywhere: list[tuple[int, int]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    groups: dict[tuple[int, int], Any] = {
        place: dist.new_group([rank for rank, other in enumerate(everywhere) if other == place])
        for place in sorted(set(everywhere))
    }
    return groups[mine]
