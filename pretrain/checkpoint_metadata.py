"""What tensors a checkpoint holds and where: torch's distributed checkpoint (DCP) metadata, read with nothing run.

`.metadata` is a pickle, read here by an unpickler that knows a dozen classes.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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
