"""A run's state, saved and loaded bitwise: weights, masters, moments, averages, step counters, the run's own counters.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.nn import Parameter

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import checkpoint_optimizer as moments
from perilune.pretrain import checkpoint_shards as shards
from perilune.pretrain import config as configs
from perilune.pretrain.agreement import Ranks
from perilune.pretrain.checkpoint_files import CheckpointError, SaveError, latest, verify
from perilune.pretrain.checkpoint_metadata import AVERAGE, Shape, read_metadata, stored_shapes
from perilune.pretrain.model import Model
from perilune.pretrain.schema import Config

__all__ = ["CheckpointError", "SaveError", "init_from", "latest", "load", "save", "snapshot", "verify", "write"]

log = logging.getLogger(__name__)

_FORM = {"non_homogeneous_layers": True}  # every layer a tensor of its own, never stacked
_NAMED = 5  # names in a message


# --- what there is to save ----------------------------------------------------------------------------------------


def model_state(model: Model) -> dict[str, dict[str, Any]]:
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


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint before it is written. Its weights, masters, moments and averages are the training's own memory."""

    step: int
    run_state: dict[str, Any]
    config: Config
    about: dict[str, Any]  # the manifest's other entries
    tensors: dict[str, Any]  # as `shards.prepare` has them


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
    return write(snapshot(step, model, optimizer, run_state, config), folder, keep)


def snapshot(step: int, model: Model, optimizer: Any | None, run_state: dict[str, Any], config: Config) -> Snapshot:
    """What `save` writes, before it is written. Collective; raises TypeError and ValueError as `save` does.

    Only what changes outside of the optimizer's update is copied: the rest may not change before `write` allows it.
    """
    ranks = Ranks()
    run_state = ranks.everywhere(lambda: files.json_only(run_state), TypeError, f"saving step {step}")
    if len({files.digest_of(state) for state in ranks.gathered(run_state)}) != 1:
        raise ValueError(f"saving step {step}: run_state is not the same on all ranks")
    state: dict[str, Any] = dict(model_state(model))
    for entry in nested_values(state):
        if not isinstance(entry.data, Parameter):  # router biases move in the backward pass
            entry.data = entry.data.clone()
    adam_step = None
    if optimizer is not None:
        state["optimizer"] = moments.sharded_state(optimizer, state, loading=False)
        adam_step = moments.adam_step(optimizer, ranks)
    tensors, _ = extract_matching_values(state, _is_sharded)
    about = {
        "optimizer_step": adam_step,
        "layout": _layout(model),
        "versions": {name: importlib.metadata.version(name) for name in ("perilune", "torch", "megatron-core")},
    }
    return Snapshot(step, run_state, config, about, shards.prepare(tensors))


def write(
    taken: Snapshot,
    folder: Path,
    keep: int,
    *,
    group: dist.ProcessGroup | None = None,
    copied: Callable[[], None] | None = None,
) -> Path:
    """Write and commit a snapshot, as `save` says. Collective over `group`: in a thread, one of its own.

    `copied` is called once this rank's tensors may change, long before they are on the disk.
    """
    ranks, step = Ranks(group), taken.step
    doing = f"saving step {step} to {folder}"
    there, temporary = ranks.on_first(lambda: files.prepare(folder, step), SaveError, doing)
    if there is not None:
        return ranks.on_first(lambda: _same(there, taken.run_state), SaveError, doing)
    try:
        mine = ranks.everywhere(lambda: shards.write(taken.tensors, temporary, group, copied), SaveError, doing)
        written = {name: about for part in ranks.gathered(mine) for name, about in part.items()}

        def finish() -> Path:
            files.write_config(temporary, configs.to_yaml(taken.config))
            rest = [entry.name for entry in os.scandir(temporary) if entry.name not in written]
            listed = dict(sorted({**written, **files.describe(temporary, rest)}.items()))
            body = {"step": step, "run_state": taken.run_state, **taken.about, "files": listed}
            files.write_manifest(temporary, body)
            return files.commit(temporary, step, keep)

        return ranks.on_first(finish, SaveError, doing)
    except Exception:
        if ranks.rank == 0:
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


# --- load ---------------------------------------------------------------------------------------------------------


def load(path: Path, model: Model, optimizer: Any | None) -> dict[str, Any]:
    """Fill model and optimizer from the checkpoint `path`, bitwise; returns its run state. Collective.

    `optimizer` None loads the weights alone. An average of the weights that the checkpoint lacks begins as its weights,
    one that `optimizer` does not keep is left, and the log says so. Raises CheckpointError on every rank for a
    checkpoint that is damaged, hostile, or of another model, OSError for one that cannot be read; hashes, names and
    shapes are checked before the first weight changes.
    """
    manifest, metadata = opened(path)
    if optimizer is not None and manifest.get("optimizer_step") is None:
        raise CheckpointError(f"{path} holds weights only: start from it with --init-from, it cannot be resumed")
    state = _fill(path, metadata, model, optimizer, exact=True)
    if optimizer is not None:
        # Merging drops what is empty, as the state of a pipeline stage that holds nothing.
        moments.load_state(optimizer, state.get("optimizer", {}), manifest["optimizer_step"])
    return manifest["run_state"]


def init_from(path: Path, model: Model, optimizer: Any | None = None) -> None:
    """Only the weights (and router biases) of `path`, cast to the model's dtype; the masters follow. Collective.

    Raises CheckpointError and OSError as `load` does.
    """
    _, metadata = opened(path)
    _fill(path, metadata, model, None, exact=False)
    if optimizer is not None:
        optimizer.reload_model_params()


def opened(path: Path) -> tuple[dict[str, Any], Any]:
    """(manifest, DCP metadata) of a checkpoint whose every file has the size and hash that its manifest says."""
    ranks = Ranks()
    manifest = _agreed(ranks, path, lambda: files.read_manifest(path))

    def check() -> None:
        mine = files.shares(files.sizes_of(manifest), ranks.size)[ranks.rank]
        files.check_files(path, manifest, mine)

    _agreed(ranks, path, check)
    if len({files.digest_of(one) for one in ranks.gathered(manifest)}) != 1:
        raise CheckpointError(f"{path} is not the same on all ranks: it must lie on a file system that all share")
    sizes = files.sizes_of(manifest)
    return manifest, _agreed(ranks, path, lambda: read_metadata(path, sizes))


def _agreed[T](ranks: Ranks, path: Path, reading: Callable[[], T]) -> T:
    """`reading()` of this rank; if it fails on any, every rank raises the gravest that any met, and names where.

    Damage that one rank saw is damage, whatever kept another from reading. What kept it is an OSError, and no word
    about the checkpoint: a launched run sets aside what is damaged, and must keep what could not be read for a moment.
    """
    kinds = (
        (files.DamagedCheckpoint, lambda text: files.DamagedCheckpoint(path, text)),
        (OSError, OSError),
        (Exception, CheckpointError),
    )
    gravity = (0, 2, 1)  # of each kind: what cannot be read may be whole
    result: T | None = None
    failure: Exception | None = None
    try:
        result = reading()
    except Exception as error:
        failure = error
    mine = None if failure is None else next(k for k, (kind, _) in enumerate(kinds) if isinstance(failure, kind))
    met = [kind for kind in ranks.gathered(mine) if kind is not None]
    gravest = min(met, key=lambda kind: gravity[kind], default=None)

    def tell() -> None:
        if failure is not None and mine == gravest:
            raise failure

    ranks.everywhere(tell, kinds[gravest or 0][1], f"loading {path}")
    return result  # type: ignore[return-value]


def _fill(path: Path, metadata: Any, model: Model, optimizer: Any | None, exact: bool) -> dict[str, Any]:
    """Load the model's weights, and read what `optimizer` asks for: it is returned, in Megatron-core's form."""
    state: dict[str, Any] = dict(model_state(model))
    if optimizer is not None:
        held = any(map(moments.is_average, stored_shapes(metadata)))
        state["optimizer"] = moments.sharded_state(optimizer, state, loading=True, with_average=held)
        _tell_of_average(path, held, moments.keeps_average(optimizer))
    # As in Megatron-core's dist_checkpointing.load, but what is no tensor comes from the present optimizer, not a file.
    state, local, factories = load_preprocess(state)
    tensors, plain = extract_sharded_base(state)
    merge(plain, local)
    _compare(path, tensors, metadata, with_optimizer=optimizer is not None, exact=exact)
    loaded = _agreed(Ranks(), path, lambda: shards.read(tensors, path, metadata))
    state = apply_factory_merges(merge(plain, loaded), factories)
    for index, chunk in enumerate(model.bare()):
        missing, unexpected = chunk.load_state_dict(state.get(f"model{index}", {}), strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if missing or unexpected:
            raise RuntimeError(f"Megatron-core's sharded state and its modules disagree: {missing}, {unexpected}")
    return state


def _tell_of_average(path: Path, held: bool, kept: bool) -> None:
    if held != kept and dist.get_rank() == 0:
        what = "no average of the weights: it begins as they are" if kept else "an average of the weights: it is left"
        log.warning("%s has %s (optim.ema_decay is %s)", path, what, "above 0" if kept else "0")


def _compare(path: Path, tensors: dict[str, Any], metadata: Any, with_optimizer: bool, exact: bool) -> None:
    """Raises CheckpointError on every rank unless all ranks together ask for the checkpoint's tensors, no less."""
    asked: dict[str, Shape] = {}
    for part in Ranks().gathered(shards.shapes(tensors)):
        asked.update(part)
    averaged = any(map(moments.is_average, asked))
    left = ("optimizer.",) if not with_optimizer else () if averaged else (AVERAGE,)
    held = {key: shape for key, shape in stored_shapes(metadata).items() if not key.startswith(left)}
    complaints = []
    for what, keys in (("lacks", asked.keys() - held.keys()), ("has, unlike this model,", held.keys() - asked.keys())):
        if keys:
            complaints.append(f"it {what} {len(keys)} tensors ({', '.join(sorted(keys)[:_NAMED])}...)")
    for key in sorted(asked.keys() & held.keys()):
        if asked[key][0] != held[key][0] or (exact and asked[key][1] != held[key][1]):
            complaints.append(f"{key} is {_told(held[key])} in it and {_told(asked[key])} here")
    if complaints:
        raise CheckpointError(
            f"{path} is not of this model: {'; '.join(complaints[:_NAMED])}. Set model.*, optim.name and "
            "precision.compute as it was saved"
        )


def _told(shape: Shape) -> str:
    return f"{list(shape[0])} {shape[1]}"
