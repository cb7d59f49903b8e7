"""An optimizer's moments, masters and averages as sharded tensors, in the shape and name of their weight, and back.

What is saved is never gathered: the distributed optimizer's ranks each hold ranges of flattened weights, and a range is
a few boxes of its weight. What is loaded is any boxes, into the whole of each weight of which a rank holds a range. A
weight has the state that its optimizer gives it: AdamW two moments, Muon one momentum, either an average if asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from perilune.pretrain.agreement import Ranks
from perilune.pretrain.checkpoint_metadata import AVERAGE, EMA, MASTER
from perilune.pretrain.optim.average import average_of

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes

_PLAIN_MASTER = "optimizer.state.fp32_param."  # what the plain mixed-precision optimizer calls a master
_STATE = re.compile(r"^optimizer\.state\.[^.]+\.")  # stands before a weight's key


def optimizers(optimizer: Any) -> list[Any]:
    """The optimizers in Megatron-core's chain that hold parameters of this rank."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def _begin(optimizer: Any) -> None:
    """Give a new optimizer the zero moments and step count that its first step would give it."""
    for one in optimizers(optimizer):
        if getattr(one, "grad_scaler", None) is not None:
            raise TypeError("dynamic loss scaling (fp16) is not built: its scale would be lost")
        one.init_state_fn(one.optimizer, one.config)
        if _counts_by_parameter(one):
            for parameter, moments in one.optimizer.state.items():
                moments.setdefault("step", _count(one, parameter, 0))


def _counts_by_parameter(one: Any) -> bool:
    """torch's Adam counts steps in each parameter's state, Transformer Engine's in each group."""
    return isinstance(one.optimizer, torch.optim.Adam)  # AdamW is one too


def _count(one: Any, parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Steps as torch's Adam counts them: beside the parameter if it is fused, whose kernel reads the number there."""
    fused = any(group.get("fused") for group in one.optimizer.param_groups)
    return torch.tensor(float(step), device=parameter.device if fused else "cpu")


def keeps_average(optimizer: Any) -> bool:
    """Whether an average of this rank's parameters is kept."""
    return any(average_of(one) is not None for one in optimizers(optimizer))


def adam_step(optimizer: Any, ranks: Ranks) -> int:
    """The step count that all parameters of all ranks share. Raises ValueError if they do not."""
    counts: set[int] = set()
    for one in optimizers(optimizer):
        if _counts_by_parameter(one):
            counters = list(one.optimizer.state.values())
        else:  # a group without parameters on this rank is not counted up
            counters = [group for group in one.optimizer.param_groups if group["params"]]
        counts.update(int(counter.get("step", 0)) for counter in counters)
    found = sorted(set().union(*ranks.gathered(counts)))
    if len(found) != 1:
        raise ValueError(f"the optimizer's parameters are at steps {found}; they move together or not at all")
    return found[0]


def sharded_state(
    optimizer: Any, model_state: dict[str, Any], *, loading: bool, with_average: bool = True
) -> dict[int, Any]:
    """Optimizer in the chain -> its sharded moments, masters and averages, in the shape and name of the weight.

    To save they are the optimizer's own memory. Masters have one name here, and there are none for fp32 weights: the
    master of such a weight is the weight. An average that is to be kept and is not to be loaded (`with_average`) begins
    at the next update.
    """
    _begin(optimizer)
    for average in filter(None, map(average_of, optimizers(optimizer))):
        if with_average:
            average.begin()
        else:
            average.forget()
    state: dict[int, Any] = {}
    for index, one in enumerate(optimizers(optimizer)):
        if _is_distributed(one):
            state[index] = _to_load(one, model_state) if loading else _to_save(one, model_state)
        else:
            part = one.sharded_state_dict(model_state, is_loading=loading, metadata={"non_homogeneous_layers": True})
            for master in nested_values(part.get("fp32_from_fp16_params", [])):
                master.key = master.key.replace(_PLAIN_MASTER, MASTER, 1)
            state[index] = part | _whole_averages(one, model_state)
    return state


def _whole_averages(one: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """What a plain optimizer's state does not have: the averages, by the order of `ranges`."""
    entries = {entry.data: entry for entry in nested_values(model_state)}
    found = {
        number: make_sharded_optimizer_tensor(entries[weight], flat, prefix=AVERAGE.removesuffix("."))
        for number, (weight, parameter, *_) in enumerate(ranges(one))
        for flat in _average(one, parameter).values()
    }
    return {EMA: found} if found else {}


def _average(one: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The average of a parameter under its name, if it has begun."""
    average = average_of(one)
    return {EMA: average.of[parameter]} if average is not None and average.of else {}


def _states(one: Any) -> Iterator[tuple[torch.nn.Parameter, slice, dict[str, torch.Tensor]]]:
    """(weight, range of its elements, name -> what the distributed optimizer has of them here, flat)."""
    for weight, parameter, start, end in ranges(one):
        own = {} if weight.dtype is torch.float32 else {"param": parameter}
        own |= {name: t for name, t in one.optimizer.state[parameter].items() if name != "step" and torch.is_tensor(t)}
        own |= _average(one, parameter)
        yield weight, slice(start, end), {name: flat.detach().view(-1) for name, flat in own.items()}


def _to_load(one: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What is to be filled for the distributed optimizer: the weights, whole, of which it holds a range here.

    (Megatron-core's own form asks for AdamW's moments of all weights, whatever the optimizer, and for all of a buffer
    where a rank holds a range.)
    """
    entries = {entry.data: entry for entry in nested_values(model_state)}
    return {
        number: {
            name: make_sharded_optimizer_tensor(
                entries[weight], flat.new_empty(weight.shape), prefix=f"optimizer.state.{name}"
            )
            for name, flat in own.items()
        }
        for number, (weight, _, own) in enumerate(_states(one))
    }


def _to_save(one: Any, model_state: dict[str, Any]) -> list[ShardedTensor]:
    """The boxes of all weights of which the distributed optimizer holds moments, masters and averages on this rank."""
    entries = {entry.data: entry for entry in nested_values(model_state)}
    found: list[ShardedTensor] = []
    for weight, held, own in _states(one):
        parts = parts_of(entries[weight])
        for name, flat in own.items():
            for start, values in views(flat, held.start, held.stop, tuple(weight.shape)):
                found += _stored(parts, name, start, values)
    return found


def ranges(one: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int]]:
    """(weight, the parameter that is optimized, the range of the weight's elements that it is), all on this rank.

    The parameter is the weight, its fp32 master, or with ZeRO-1 a flat range of either.
    """
    if _is_distributed(one):
        for weight, (group, order) in one.model_param_group_index_map.items():
            held = one._get_model_param_range_map(weight)["param"]
            yield weight, one.optimizer.param_groups[group]["params"][order], held.start, held.end
        return
    masters = {
        id(master): weight
        for weights, group in zip(
            getattr(one, "float16_groups", []), getattr(one, "fp32_from_float16_groups", []), strict=True
        )
        for weight, master in zip(weights, group, strict=True)
    }
    for parameter in one.get_parameters():
        yield masters.get(id(parameter), parameter), parameter, 0, parameter.numel()


def views(
    flat: torch.Tensor, start: int, end: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """(where it begins in a weight of `shape`, view of `flat`) of the boxes that are elements `start` to `end`."""
    flat, at = flat.detach().view(-1), 0
    for begin, sizes in boxes(start, end, shape):
        values = flat[at : at + math.prod(sizes)].view(sizes)
        at += values.numel()
        yield begin, values


def boxes(start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """(offsets, sizes) of few boxes of `shape` that together are its flattened elements `start` to `end`, in order."""
    if len(shape) == 1 or start >= end:
        if start < end:
            yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if start < first * row:
        yield from _in_row(first - 1, start, min(end, first * row), shape)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last and last * row < end:
        yield from _in_row(last, last * row, end, shape)


def _in_row(row: int, start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    begin = row * math.prod(shape[1:])
    for offsets, sizes in boxes(start - begin, end - begin, shape[1:]):
        yield (row, *offsets), (1, *sizes)


def parts_of(entry: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int, int]]:
    """(part, dim, where along dim it begins in this rank's weight) of the global slices in which a weight is stored.

    More than one where a factory cuts it along a dim (gate and up, which lie apart in the global tensor).
    """
    if isinstance(entry, ShardedTensor):
        return [(entry, 0, 0)]
    stored = list(nested_values(replace(entry, data=torch.empty_like(entry.data, device="meta")).build()))
    (dim,) = [dim for dim, size in enumerate(entry.data.shape) if stored[0].local_shape[dim] != size]
    return [(part, dim, sum(before.local_shape[dim] for before in stored[:i])) for i, part in enumerate(stored)]


def placed(
    parts: list[tuple[ShardedTensor, int, int]], start: tuple[int, ...], values: torch.Tensor
) -> Iterator[tuple[ShardedTensor, tuple[int, ...], torch.Tensor]]:
    """(part, offset, view) of the boxes of global tensors that are `values`, a box at `start` of this rank's weight."""
    for part, dim, begin in parts:
        low, high = max(start[dim], begin), min(start[dim] + values.shape[dim], begin + part.local_shape[dim])
        if low >= high:
            continue
        local = [low - begin if d == dim else offset for d, offset in enumerate(start)]
        offsets = [0] * part.prepend_axis_num + local
        cut = values.narrow(dim, low - start[dim], high - low)
        for _ in range(part.prepend_axis_num):
            cut = cut.unsqueeze(0)
        yield part, tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)), cut


def _stored(
    parts: list[tuple[ShardedTensor, int, int]], name: str, start: tuple[int, ...], values: torch.Tensor
) -> Iterator[ShardedTensor]:
    """`values`, a box at `start` of this rank's weight, in the global tensors of the state `name`."""
    for part, offset, cut in placed(parts, start, values):
        yield ShardedTensor(
            key=f"optimizer.state.{name}.{part.key}",
            data=cut,
            dtype=cut.dtype,
            local_shape=tuple(cut.shape),
            global_shape=part.global_shape,
            global_offset=offset,
            axis_fragmentations=None,  # boxes make no regular grid
            replica_id=(*part.replica_id[:2], 0),  # no other data-parallel rank holds it
        )


def is_moment(key: str) -> bool:
    """Whether `key`, of an optimizer's state, is no master's and no average's."""
    return not key.startswith((MASTER, AVERAGE))


def is_average(key: str) -> bool:
    """Whether `key`, of whatever is in a checkpoint, is that of a weight's average."""
    return key.startswith(AVERAGE)


def weight_of(key: str) -> str:
    """The key of the weight to which `key`, of an optimizer's state or a weight itself, belongs."""
    return _STATE.sub("", key)


def begin_where(state: dict[int, Any], model_state: dict[str, Any], new: Callable[[str], bool]) -> None:
    """Fill, of what `sharded_state` asks for, the entries whose key is `new` with what a new optimizer holds.

    That is zero moments, and the weight, as it is now, for its master and its average.
    """
    weights = {entry.key: entry.data for entry in nested_values(model_state)}
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and new(entry.key):
            if is_moment(entry.key):
                entry.data.zero_()
            else:
                entry.data.copy_(weights[weight_of(entry.key)].detach())


def masters_of_weights(optimizer: Any) -> None:
    """Let each 16-bit weight's master be one that rounds to it: where another run's does not, the weight itself."""
    for one in optimizers(optimizer):
        distributed = _is_distributed(one)
        weights = one.shard_float16_groups if distributed else getattr(one, "float16_groups", [])
        masters = one.shard_fp32_from_float16_groups if distributed else getattr(one, "fp32_from_float16_groups", [])
        for group, of_group in zip(weights, masters, strict=True):
            for weight, master in zip(group, of_group, strict=True):
                fits = master.data.to(weight.dtype) == weight.data
                master.data.copy_(torch.where(fits, master.data, weight.data.float()))


def _is_distributed(one: Any) -> bool:
    return hasattr(one, "sharded_param_state_fully_reshardable")


def load_state(optimizer: Any, state: dict[int, Any], step: int) -> None:
    """Put loaded moments, masters and averages into the optimizers of the chain, all at Adam step `step`.

    Megatron-core 0.19.2's plain optimizers want the "step" of torch's AdamW as "common_step".
    """
    for index, one in enumerate(optimizers(optimizer)):
        if not one.get_parameters():  # this rank holds none of its weights
            continue
        part = state[index]
        if _is_distributed(one):
            for number, (_, held, own) in enumerate(_states(one)):
                for name, flat in own.items():
                    flat.copy_(part[number][name].view(-1)[held])
        else:
            average = part.pop(EMA, {})
            for number, (_, parameter, *_) in enumerate(ranges(one)):
                for flat in _average(one, parameter).values():
                    flat.copy_(average[number])
            if _counts_by_parameter(one):
                part.get("optimizer", part)["state"]["common_step"] = torch.tensor(float(step))
            one.load_state_dict(part)
        if _counts_by_parameter(one):
            for parameter, moments in one.optimizer.state.items():
                moments["step"] = _count(one, parameter, step)
        else:
            for group in one.optimizer.param_groups:
                group["step"] = step
