"""Sharded tensors in and out of torch's distributed checkpoint (DCP), with nothing unpickled that could run code.

Megatron-core's dist_checkpointing describes which part of which global tensor a rank holds (ShardedTensor); its planner
and torch's file writer and reader do the rest. Two doors are shut on the way in: `.metadata` is a pickle, read here by
an unpickler that knows a dozen classes, and an entry that the metadata calls "bytes" would be unpickled by torch, so
there may be none. A tensor's own bytes go through torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from perilune.pretrain.checkpoint_files import CheckpointError

METADATA = ".metadata"
Shape = tuple[tuple[int, ...], str]  # global shape and dtype of a tensor

_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name)
        for name in (
            "Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING ChunkStorageMetadata MetadataIndex "
            "StorageMeta"
        ).split()
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a DCP `.metadata` of tensors, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise CheckpointError(f"it asks for {module}.{name}, which has no business there; do not trust its source")
        return _CLASSES[module, name]


class _Writer(dcp.FileSystemWriter):
    """torch's writer, one file a rank, synced; without this machine's paths in the metadata."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


class _LoadPlanner(MCoreLoadPlanner):
    """Megatron-core's planner; torch's would unpickle an entry of bytes without restriction."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is stored as bytes, not as a tensor")


def _by_key(sharded: dict[str, Any]) -> dict[str, list[ShardedTensor]]:
    """The sharded tensors of a nested state dict under their global keys; one key may have several parts here."""
    grouped: dict[str, list[ShardedTensor]] = defaultdict(list)
    for tensor in nested_values(sharded):
        grouped[tensor.key].append(tensor)
    return dict(grouped)


def write(sharded: dict[str, Any], folder: Path) -> None:
    """Write this rank's part of `sharded` (nested dicts and lists of ShardedTensor) into `folder`. Collective.

    Of a tensor that several ranks hold, the main replica is written. Raises on every rank if any rank fails.
    """
    tensors, other = save_preprocess(sharded)  # checks that every element of every tensor is written exactly once
    if any(True for _ in nested_values(other)):
        raise TypeError(f"only tensors are written to shards; found {list(nested_values(other))[:3]}")
    mine = {
        key: parts
        for key, group in _by_key(tensors).items()
        if (parts := [part for part in group if is_main_replica(part.replica_id)])
    }
    dcp.save(
        mcore_to_pyt_state_dict(mine, is_loading=False),
        storage_writer=_Writer(folder, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        ),
    )


def shapes(sharded: dict[str, Any]) -> dict[str, Shape]:
    """Key -> global shape and dtype of what this rank asks for."""
    return {
        key: (tuple(parts[0].global_shape), str(parts[0].dtype).removeprefix("torch."))
        for key, parts in _by_key(sharded).items()
    }


def stored_shapes(metadata: Metadata) -> dict[str, Shape]:
    """Key -> global shape and dtype of what a checkpoint holds."""
    return {
        key: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_metadata(folder: Path, sizes: dict[str, int]) -> Metadata:
    """What tensors a checkpoint holds and where. `sizes`: bytes of each file of its manifest.

    Raises CheckpointError if `.metadata` asks for a class that does not belong there, holds anything but tensors, does
    not cover one of them, or points outside of the manifest's files. None of its content is run.
    """
    path = folder / METADATA
    if METADATA not in sizes:
        raise CheckpointError(f"{folder}: the manifest lists no {METADATA}; this is not a whole checkpoint")
    with open(path, "rb") as stream:
        try:
            metadata = _Unpickler(stream).load()
            _check(metadata, sizes)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is refused: {error}") from error
        except Exception as error:  # whatever a malformed pickle makes torch's classes raise
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    metadata.storage_meta = StorageMeta()
    return metadata


def _check(metadata: Any, sizes: dict[str, int]) -> None:
    if type(metadata) is not Metadata:
        raise CheckpointError(f"it holds a {type(metadata).__name__} in place of DCP's Metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata or not isinstance(entry.properties.dtype, torch.dtype):
            raise CheckpointError(f"{key!r} is a {type(entry).__name__}, not a tensor")
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.size):
            raise CheckpointError(f"{key!r} has {math.prod(entry.size)} elements, its parts {covered}")
    for index, place in metadata.storage_data.items():
        end = place.offset + place.length
        if place.relative_path not in sizes or place.offset < 0 or end > sizes[place.relative_path]:
            raise CheckpointError(
                f"{index.fqn!r} lies at bytes {place.offset} to {end} of {place.relative_path!r}, which is not in a "
                "file of the manifest"
            )
        if place.transform_descriptors:
            raise CheckpointError(f"{index.fqn!r} is stored with {place.transform_descriptors}, which is never written")


def read(sharded: dict[str, Any], folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Fill the sharded tensors of `sharded` (no factories left) in place; returns it with plain tensors. Local.

    Whether keys and shapes fit is checked before (`shapes`, `stored_shapes`). Raises what torch raises on bad bytes.
    """
    reader = dcp.FileSystemReader(folder)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(mcore_to_pyt_state_dict(_by_key(sharded), is_loading=True), metadata, False)
        reader.set_up_storage_reader(metadata, False)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()
    return dict_list_map_inplace(lambda tensor: tensor.data, sharded)
