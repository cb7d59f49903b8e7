"""Sharded tensors in and out of torch's distributed checkpoint (DCP), with nothing unpickled that could run code.

Megatron-core's dist_checkpointing describes which part of which global tensor a rank holds (ShardedTensor); its planner
and torch's reader do the rest. Each rank writes `__R_0.distcp` with its part of the weights and `__R_1.distcp` with
that of the optimizer's state, so that what needs the weights alone reads and hashes no more. Two doors are shut on the
way in: `.metadata` (pretrain/checkpoint_metadata.py), and an entry that the metadata calls "bytes", which torch would
unpickle, so there may be none. A tensor's own bytes go through torch.load(weights_only=True).
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
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
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from perilune.pretrain import checkpoint_metadata as plain
from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_metadata import Shape
from perilune.pretrain.disk import SyncedFile

OPTIMIZER = "optimizer."  # begins the keys of what is no weight
_ALIGNED = 64  # bytes at whose multiples a tensor begins, as inside of what torch.save writes: it can be used in place


class _Writer(dcp.FileSystemWriter):
    """Two files a rank, hashed and synced as they are written; without this machine's paths in the metadata.

    `copied` is called once what the tensors hold may change: they are in the system's cache, or (of a GPU) in memory of
    the host, but not yet on the disk.
    """

    def __init__(self, folder: Path, copied: Callable[[], None] | None) -> None:
        super().__init__(folder, sync_files=True)
        self.written: dict[str, dict[str, Any]] = {}  # name -> size and hash, as the manifest has them
        self._folder, self._copied = folder, copied

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        held: list[tuple[WriteItem, Any]] = [(item, planner.resolve_data(item)) for item in plan.items]
        if self._copied is not None and any(tensor.is_cuda for _, tensor in held):
            held = [(item, tensor.cpu()) for item, tensor in held]
            self._copied()
        parts: dict[str, list[tuple[WriteItem, torch.Tensor]]] = defaultdict(list)
        for item, tensor in held:
            number = int(item.index.fqn.startswith(OPTIMIZER))
            parts[f"{plan.storage_data.prefix}{number}{filesystem.DEFAULT_SUFFIX}"].append((item, tensor))
        with ExitStack() as stack, ThreadPoolExecutor(len(parts) or 1) as threads:  # leaving the stack syncs
            files = [stack.enter_context(SyncedFile(self._folder / name, hashed=True)) for name in parts]
            results = [one for found in threads.map(_fill, files, parts, parts.values()) for one in found]
            if self._copied is not None:
                self._copied()
        self.written = {
            name: {"bytes": file.size, "sha256": file.hexdigest()} for name, file in zip(parts, files, strict=True)
        }
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _fill(file: SyncedFile, name: str, part: list[tuple[WriteItem, torch.Tensor]]) -> list[WriteResult]:
    """Append tensors, each as torch.save writes it; where each lies."""
    results = []
    for item, tensor in part:
        file.write(bytes(-file.size % _ALIGNED))
        start = file.size
        with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]  # the file's SHA-256 guards it
            torch.save(_alone(tensor.cpu()), cast(IO[bytes], file))
        place = filesystem._StorageInfo(name, start, file.size - start)
        results.append(WriteResult(index=item.index, size_in_bytes=place.length, storage_data=place))
    return results


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: torch.save writes whole storages, and a weight is a part of a buffer."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)


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


def prepare(sharded: dict[str, Any]) -> dict[str, Any]:
    """What of `sharded` (nested dicts and lists of ShardedTensor) this rank is to `write`. Collective.

    Of a tensor that several ranks hold, the main replica is written. Nothing is copied.
    """
    tensors, other = save_preprocess(sharded)  # checks that every element of every tensor is written exactly once
    if any(True for _ in nested_values(other)):
        raise TypeError(f"only tensors are written to shards; found {list(nested_values(other))[:3]}")
    mine = {
        key: parts
        for key, group in _by_key(tensors).items()
        if (parts := [part for part in group if is_main_replica(part.replica_id)])
    }
    return mcore_to_pyt_state_dict(mine, is_loading=False)


def write(
    prepared: dict[str, Any],
    folder: Path,
    group: dist.ProcessGroup | None = None,
    copied: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write this rank's part into `folder`; its files' sizes and hashes. Collective over `group`, in any thread.

    `copied` is called as soon as the tensors may change. Raises on every rank if any rank fails.
    """
    writer = _Writer(folder, copied)
    dcp.save(
        prepared,
        storage_writer=writer,
        planner=MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        ),
        process_group=group,
    )
    return writer.written


def shapes(sharded: dict[str, Any]) -> dict[str, Shape]:
    """Key -> global shape and dtype of what this rank asks for."""
    return {
        key: (tuple(parts[0].global_shape), str(parts[0].dtype).removeprefix("torch."))
        for key, parts in _by_key(sharded).items()
    }


def read(sharded: dict[str, Any], folder: Path, metadata: plain.Metadata) -> dict[str, Any]:
    """Fill the sharded tensors of `sharded` (no factories left) in place; returns it with plain tensors. Local.

    Whether keys and shapes fit is checked before (`shapes`, `stored_shapes`). Raises what torch raises on bad bytes.
    """
    reader, theirs = dcp.FileSystemReader(folder), _theirs(metadata)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(mcore_to_pyt_state_dict(_by_key(sharded), is_loading=True), theirs, False)
        reader.set_up_storage_reader(theirs, False)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()
    return dict_list_map_inplace(lambda tensor: tensor.data, sharded)


def _theirs(metadata: plain.Metadata) -> Metadata:
    """In DCP's own classes."""
    tensors: dict[str, STORAGE_TYPES] = {
        key: TensorStorageMetadata(
            TensorProperties(getattr(torch, entry.properties.dtype)),
            torch.Size(entry.size),
            [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks],
        )
        for key, entry in metadata.state_dict_metadata.items()
    }
    places = {
        MetadataIndex(at.fqn, at.offset): filesystem._StorageInfo(place.relative_path, place.offset, place.length)
        for at, place in metadata.storage_data.items()
    }
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())
