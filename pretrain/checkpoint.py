"""A run's state, saved and loaded bitwise: weights, masters, moments, step counters, and the run's own counters.

Tensors go through Megatron-core's dist_checkpointing in its fully reshardable form, so that any layout, with or without
sharded optimizer state (`parallel.zero1`), loads what any other saved. Everything else is JSON in the manifest: the
run's state, and Adam's step count, the only number of the optimizer that its config does not give back; and that config
lies beside it as YAML, so that a checkpoint says by itself what model it is.

Every function with a model in it is collective: all ranks call it, with the same arguments, and all raise or none.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import CheckpointException

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import checkpoint_shards as shards
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_files import CheckpointError, SaveError, latest, verify
from perilune.pretrain.model import Model
from perilune.pretrain.schema import Config

__all__ = ["CheckpointError", "SaveError", "init_from", "latest", "load", "save", "verify"]

log = logging.getLogger(__name__)

_FORM = {"non_homogeneous_layers": True}  # every layer a tensor of its own, never stacked
_MASTER = "optimizer.state.param."  # as the distributed optimizer names it...
_PLAIN_MASTER = "optimizer.state.fp32_param."  # ...and as the plain mixed-precision one does
_NAMED = 5  # names in a message


# --- all ranks or none --------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's, raised on every rank with the causes of all
        return "; ".join(f"rank {rank}: {_reason(cause)}" for rank, (cause, _) in error.failures.items())
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _everywhere[T](action: Callable[[], T], kind: type[Exception], doing: str) -> T:
    """`action()` of this rank; if it fails on any rank, every rank raises `kind` with the reasons of all."""
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        failure = error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if failure is None else _reason(failure))
    said = list(dict.fromkeys(reason for reason in reasons if reason is not None))
    if said:
        where = [rank for rank, reason in enumerate(reasons) if reason is not None]
        raise kind(f"{doing} failed on rank {', '.join(map(str, where))}: {'; '.join(said)}") from failure
    return result  # type: ignore[return-value]


def _on_first[T](action: Callable[[], T], kind: type[Exception], doing: str) -> T:
    """`action()` of rank 0, given to all; if it fails, every rank raises."""
    result = _everywhere(lambda: action() if dist.get_rank() == 0 else None, kind, doing)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def _gathered[T](value: T) -> list[T]:
    """`value` of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- what there is to save ----------------------------------------------------------------------------------------


def _model_state(model: Model) -> dict[str, dict[str, Any]]:
    """chunk -> parameter or buffer -> its sharded tensor.

    Megatron-core's `_extra_state` objects are left out: empty without Transformer Engine; with it they hold the FP8
    recipe, and history only for delayed scaling, which is not offered.
    """
    state = {}
    for index, chunk in enumerate(model.bare()):
        entries = chunk.sharded_state_dict(metadata=dict(_FORM))
        objects = [key for key, entry in entries.items() if isinstance(entry, ShardedObject)]
        unknown = [key for key in objects if not key.endswith("_extra_state")]
        if unknown:
            raise TypeError(f"the model has state that is no tensor and would be lost: {unknown[:_NAMED]}")
        state[f"model{index}"] = {key: entry for key, entry in entries.items() if key not in objects}
    return state


def _optimizers(optimizer: Any) -> list[Any]:
    """The optimizers in Megatron-core's chain that hold parameters of this rank."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def _begin(optimizer: Any) -> None:
    """Give a new optimizer the zero moments and step count that its first step would give it."""
    for one in _optimizers(optimizer):
        if getattr(one, "grad_scaler", None) is not None:
            raise TypeError("dynamic loss scaling (fp16) is not built: its scale would be lost")
        one.init_state_fn(one.optimizer, one.config)
        if _counts_by_parameter(one):
            for moments in one.optimizer.state.values():
                moments.setdefault("step", torch.tensor(0.0))


def _counts_by_parameter(one: Any) -> bool:
    """torch's Adam counts steps in each parameter's state, Transformer Engine's in each group."""
    return isinstance(one.optimizer, torch.optim.Adam)  # AdamW is one too


def _adam_step(optimizer: Any) -> int:
    """The step count that all parameters of all ranks share. Raises ValueError if they do not."""
    counts: set[int] = set()
    for one in _optimizers(optimizer):
        if _counts_by_parameter(one):
            counters = list(one.optimizer.state.values())
        else:  # a group without parameters on this rank is not counted up
            counters = [group for group in one.optimizer.param_groups if group["params"]]
        counts.update(int(counter.get("step", 0)) for counter in counters)
    found = sorted(set().union(*_gathered(counts)))
    if len(found) != 1:
        raise ValueError(f"the optimizer's parameters are at steps {found}; they move together or not at all")
    return found[0]


def _optimizer_state(optimizer: Any, model_state: dict[str, Any], is_loading: bool) -> dict[int, Any]:
    """Optimizer in the chain -> its sharded moments and masters, in the shape and under the name of the weight.

    Masters have one name here, and there are none for fp32 weights: the master of such a weight is the weight.

    The distributed optimizer is asked for its tensors alone: the rest of its state (distrib_optimizer.py, state_dict)
    cannot be had in 0.19.2 on a rank that holds no parameter of it, as a pipeline stage without experts.
    """
    _begin(optimizer)
    weights = {entry.key: entry.data for entry in nested_values(model_state)}
    state = {}
    for index, one in enumerate(_optimizers(optimizer)):
        if _is_distributed(one):
            with _padding_counted(one):
                part = {"param_state": one.sharded_param_state_fully_reshardable(model_state, is_loading, {})}
            for tensors in part["param_state"].values():
                weight = weights[tensors["param"].key.removeprefix(_MASTER)]
                if weight.dtype is torch.float32:
                    tensors["param"] = LocalNonpersistentObject(weight.detach())
        else:
            part = one.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(_FORM))
            for master in nested_values(part.get("fp32_from_fp16_params", [])):
                master.key = master.key.replace(_PLAIN_MASTER, _MASTER, 1)
        state[index] = part
    return state


@contextmanager
def _padding_counted(one: Any) -> Iterator[None]:
    """Let the distributed optimizer find its tensors where several buckets make a buffer.

    Megatron-core 0.19.2 gathers each bucket without the padding at its end, but cuts by offsets that count it: what
    lies behind the first padded bucket is saved shifted (an MTP stage's embedding, say), with no more than a warning.
    """
    kept = [(part, part.numel_unpadded) for buffer in one.buffers for part in (buffer, *buffer.buckets)]
    for buffer in one.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, size in kept:
            part.numel_unpadded = size


def _is_distributed(one: Any) -> bool:
    return hasattr(one, "sharded_param_state_fully_reshardable")


def _load_optimizer(optimizer: Any, state: dict[int, Any], step: int) -> None:
    """Put loaded moments and masters into the optimizers of the chain, all at Adam step `step`.

    Megatron-core 0.19.2 wants a "step" among the tensors of torch's AdamW that it has not saved (distrib_optimizer.py,
    _set_main_param_and_optimizer_states); its plain optimizers want it as "common_step".
    """
    for index, one in enumerate(_optimizers(optimizer)):
        if not one.get_parameters():  # this rank holds none of its weights
            continue
        part = state[index]
        if _is_distributed(one):
            for moments in one.optimizer.state.values():
                moments.pop("step", None)
            one.load_parameter_state_from_fully_reshardable(part["param_state"])
        else:
            if _counts_by_parameter(one):
                part.get("optimizer", part)["state"]["common_step"] = torch.tensor(float(step))
            one.load_state_dict(part)
        if _counts_by_parameter(one):
            for moments in one.optimizer.state.values():
                moments["step"] = torch.tensor(float(step))
        else:
            for group in one.optimizer.param_groups:
                group["step"] = step


def _layout(model: Model) -> dict[str, Any]:
    config = model.megatron_config
    return {
        "world": dist.get_world_size(),
        "tp": config.tensor_model_parallel_size,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        "etp": config.expert_tensor_parallel_size,
        "zero1": model.chunks[0].ddp_config.use_distributed_optimizer,
    }


# --- save ---------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    model: Model,
    optimizer: Any | None,
    run_state: dict[str, Any],
    *,
    config: Config,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXXXX` and keep the newest `keep` (0: all). Returns its path. Collective.

    `run_state` is JSON and equal on all ranks; `config` is the run's. `optimizer` None saves weights alone. A good
    checkpoint of this step and run state that is there already stays and is returned. Raises SaveError on every rank if
    any rank cannot write, with what was committed before untouched; TypeError or ValueError for state that cannot be
    kept exactly.
    """
    run_state = _everywhere(lambda: files.json_only(run_state), TypeError, f"saving step {step}")
    if len({files.digest_of(state) for state in _gathered(run_state)}) != 1:
        raise ValueError(f"saving step {step}: run_state is not the same on all ranks")
    doing = f"saving step {step} to {folder}"
    there, temporary = _on_first(lambda: files.prepare(folder, step), SaveError, doing)
    if there is not None:
        return _on_first(lambda: _same(there, run_state), SaveError, doing)
    try:
        state: dict[str, Any] = dict(_model_state(model))
        adam_step = None
        if optimizer is not None:
            state["optimizer"] = _optimizer_state(optimizer, state, is_loading=False)
            adam_step = _adam_step(optimizer)
        tensors, _ = extract_matching_values(state, _is_sharded)
        _everywhere(lambda: shards.write(tensors, temporary), SaveError, doing)
        _on_first(lambda: files.write_config(temporary, configs.to_yaml(config)), SaveError, doing)
        body = {
            "step": step,
            "run_state": run_state,
            "optimizer_step": adam_step,
            "layout": _layout(model),
            "versions": {name: importlib.metadata.version(name) for name in ("perilune", "torch", "megatron-core")},
            "files": _described(temporary, doing),
        }

        def finish() -> Path:
            files.write_manifest(temporary, body)
            return files.commit(temporary, step, keep)

        return _on_first(finish, SaveError, doing)
    except Exception:
        if dist.get_rank() == 0:
            files.discard(temporary)
        raise


def _same(there: Path, run_state: dict[str, Any]) -> Path:
    """The checkpoint of this step that is there already. Raises FileExistsError if it is of another run."""
    if files.read_manifest(there)["run_state"] != run_state:
        raise FileExistsError(f"{there} holds another run's state, and is never overwritten: move it away")
    log.warning("%s is there already and good: not written again", there)
    files.point_to(there)
    return there


def _is_sharded(entry: Any) -> bool:
    """Not the numbers that the config gives back, nor what Megatron-core marks as of this process only."""
    return hasattr(entry, "replica_id")


def _described(temporary: Path, doing: str) -> dict[str, Any]:
    """Size and hash of every file written, each rank hashing its share."""
    sizes = _on_first(lambda: {entry.name: entry.stat().st_size for entry in os.scandir(temporary)}, SaveError, doing)
    mine = files.shares(sizes, dist.get_world_size())[dist.get_rank()]
    found = _gathered(_everywhere(lambda: files.describe(temporary, mine), SaveError, doing))
    return {name: part[name] for name in sorted(sizes) for part in found if name in part}


# --- load ---------------------------------------------------------------------------------------------------------


def load(path: Path, model: Model, optimizer: Any | None) -> dict[str, Any]:
    """Fill model and optimizer from the checkpoint `path`, bitwise; returns its run state. Collective.

    `optimizer` None loads the weights alone. Raises CheckpointError on every rank for a checkpoint that is damaged,
    hostile, or of another model; hashes, names and shapes are checked before the first weight changes.
    """
    manifest, metadata = _opened(path)
    if optimizer is not None and manifest["optimizer_step"] is None:
        raise CheckpointError(f"{path} holds weights only: start from it with --init-from, it cannot be resumed")
    state = _fill(path, metadata, model, optimizer, exact=True)
    if optimizer is not None:
        # Merging drops what is empty, as the state of a pipeline stage that holds nothing.
        _load_optimizer(optimizer, state.get("optimizer", {}), manifest["optimizer_step"])
    return manifest["run_state"]


def init_from(path: Path, model: Model, optimizer: Any | None = None) -> None:
    """Only the weights (and router biases) of `path`, cast to the model's dtype; the masters follow. Collective.

    Raises CheckpointError as `load` does.
    """
    _, metadata = _opened(path)
    _fill(path, metadata, model, None, exact=False)
    if optimizer is not None:
        optimizer.reload_model_params()


def _opened(path: Path) -> tuple[dict[str, Any], Any]:
    """(manifest, DCP metadata) of a checkpoint whose every file has the size and hash that its manifest says."""
    doing = f"loading {path}"

    def check() -> dict[str, Any]:
        manifest = files.read_manifest(path)
        mine = files.shares(files.sizes_of(manifest), dist.get_world_size())[dist.get_rank()]
        files.check_files(path, manifest, mine)
        return manifest

    manifest = _everywhere(check, CheckpointError, doing)
    if len({files.digest_of(one) for one in _gathered(manifest)}) != 1:
        raise CheckpointError(f"{path} is not the same on all ranks: it must lie on a file system that all share")
    sizes = files.sizes_of(manifest)
    return manifest, _everywhere(lambda: shards.read_metadata(path, sizes), CheckpointError, doing)


def _fill(path: Path, metadata: Any, model: Model, optimizer: Any | None, exact: bool) -> dict[str, Any]:
    """Load the model's weights, and read what `optimizer` asks for: it is returned, in Megatron-core's form."""
    state: dict[str, Any] = dict(_model_state(model))
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(optimizer, state, is_loading=True)
    # As in Megatron-core's dist_checkpointing.load, but what is no tensor comes from the present optimizer, not a file.
    state, local, factories = load_preprocess(state)
    tensors, plain = extract_sharded_base(state)
    merge(plain, local)
    _compare(path, tensors, metadata, with_optimizer=optimizer is not None, exact=exact)
    loaded = _everywhere(lambda: shards.read(tensors, path, metadata), CheckpointError, f"loading {path}")
    state = apply_factory_merges(merge(plain, loaded), factories)
    for index, chunk in enumerate(model.bare()):
        missing, unexpected = chunk.load_state_dict(state.get(f"model{index}", {}), strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if missing or unexpected:
            raise RuntimeError(f"Megatron-core's sharded state and its modules disagree: {missing}, {unexpected}")
    return state


def _compare(path: Path, tensors: dict[str, Any], metadata: Any, with_optimizer: bool, exact: bool) -> None:
    """Raises CheckpointError on every rank unless all ranks together ask for the checkpoint's tensors, no less."""
    asked: dict[str, shards.Shape] = {}
    for part in _gathered(shards.shapes(tensors)):
        asked.update(part)
    held = {
        key: shape
        for key, shape in shards.stored_shapes(metadata).items()
        if with_optimizer or not key.startswith("optimizer.")
    }
    complaints = []
    for what, keys in (("lacks", asked.keys() - held.keys()), ("has, unlike this model,", held.keys() - asked.keys())):
        if keys:
            complaints.append(f"it {what} {len(keys)} tensors ({', '.join(sorted(keys)[:_NAMED])}...)")
    for key in sorted(asked.keys() & held.keys()):
        if asked[key][0] != held[key][0] or (exact and asked[key][1] != held[key][1]):
            complaints.append(f"{key} is {_told(held[key])} in it and {_told(asked[key])} here")
    if complaints:
        raise CheckpointError(
            f"{path} is not of this model: {'; '.join(complaints[:_NAMED])}. Set model.* and precision.compute as it "
            "was saved"
        )


def _told(shape: shards.Shape) -> str:
    return f"{list(shape[0])} {shape[1]}"
