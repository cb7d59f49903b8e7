"""What tensors a checkpoint holds and where: torch's distributed checkpoint (DCP) metadata, read with nothing run.

`.metadata` is a pickle, read here by an unpickler that knows a dozen names. torch's and DCP's classes among them are
plain ones here, with the attributes of theirs: an export takes less time than to import both.
"""

from __future__ import annotations

import enum
import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_tensor import DTYPES

METADATA = ".metadata"
MASTER = "optimizer.state.param."  # before the name of a weight: its fp32 master, as the distributed optimizer has it
EMA = "ema"  # the name of an average (optim/average.py) among a weight's states
AVERAGE = f"optimizer.state.{EMA}."  # before the name of a weight
Size = tuple[int, ...]
Shape = tuple[Size, str]  # global shape and dtype of a tensor


@dataclass(frozen=True)
class Index:
    """A part of a tensor, by name and where it begins."""

    fqn: str
    offset: Size | None = None


@dataclass
class Place:
    """Where a part lies."""

    relative_path: str
    offset: int  # bytes
    length: int
    transform_descriptors: Any = None


@dataclass
class Chunk:
    """The box of a tensor that a part is."""

    offsets: Size
    sizes: Size


class _MemoryFormat(enum.Enum):
    CONTIGUOUS, CHANNELS_LAST, PRESERVE = range(3)


@dataclass
class Properties:
    """Of a tensor."""

    dtype: str  # a key of checkpoint_tensor.DTYPES

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype, *_ = state


@dataclass
class Stored:
    """A tensor and its parts."""

    properties: Properties
    size: Size
    chunks: list[Chunk]


@dataclass
class Metadata:
    """Of all tensors."""

    state_dict_metadata: dict[str, Stored]
    storage_data: dict[Index, Place]


class _Unused:
    """What is written besides: the layout of a tensor, and DCP about itself."""

    def __init__(self, *_: Any) -> None: ...


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Unused,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Place,
    **{
        ("torch.distributed.checkpoint.metadata", name): ours
        for name, ours in {
            "Metadata": Metadata, "TensorStorageMetadata": Stored, "TensorProperties": Properties,
            "_MEM_FORMAT_ENCODING": _MemoryFormat, "ChunkStorageMetadata": Chunk, "MetadataIndex": Index,
            "StorageMeta": _Unused,
        }.items()
    },
    **{("torch", name): name for name in DTYPES},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a DCP `.metadata` of tensors, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise CheckpointError(f"it asks for {module}.{name}, which has no business there; do not trust its source")
        return _CLASSES[module, name]


def stored_shapes(metadata: Metadata) -> dict[str, Shape]:
    """Key -> global shape and dtype of what a checkpoint holds."""
    return {key: (entry.size, entry.properties.dtype) for key, entry in metadata.state_dict_metadata.items()}


def read_metadata(folder: Path, sizes: dict[str, int]) -> Metadata:
    """What tensors a checkpoint holds and where. `sizes`: bytes of each file of its manifest.

    Raises CheckpointError if `.metadata` asks for a class that does not belong there, holds anything but tensors, does
    not cover one of them, or points outside of the manifest's files. None of its content is run.
    """
    path = folder / METADATA
    if METADATA not in sizes:
        raise CheckpointError(f"{folder}: the manifest lists no {METADATA}; this is not a whole checkpoint")
    content = io.BytesIO(path.read_bytes())  # an error of reading is the disk's, and says nothing of the content
    try:
        metadata = _Unpickler(content).load()
        _check(metadata, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # whatever a malformed pickle raises
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return metadata  # type: ignore[no-any-return]


def _check(metadata: Any, sizes: dict[str, int]) -> None:
    if type(metadata) is not Metadata:
        raise CheckpointError(f"it holds a {type(metadata).__name__} in place of DCP's Metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry) is not Stored or entry.properties.dtype not in DTYPES:
            raise CheckpointError(f"{key!r} is a {type(entry).__name__}, not a tensor")
        for size in (entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))):
            if type(size) is not tuple or not all(type(n) is int and n >= 0 for n in size):
                raise CheckpointError(f"{key!r} or a part of it has the size or offset {size!r}")
        for chunk in entry.chunks:
            if any(o + n > whole for o, n, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)):
                raise CheckpointError(f"{key!r} is {entry.size}, a part of it {chunk.sizes} at {chunk.offsets}")
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.size):
            raise CheckpointError(f"{key!r} has {math.prod(entry.size)} elements, its parts {covered}")
    _check_places(metadata, sizes)


def _check_places(metadata: Metadata, sizes: dict[str, int]) -> None:
    for index, place in metadata.storage_data.items():
        end = place.offset + place.length
        if place.relative_path not in sizes or not 0 <= place.offset <= end <= sizes[place.relative_path]:
            raise CheckpointError(
                f"{index.fqn!r} lies at bytes {place.offset} to {end} of {place.relative_path!r}, which is not in a "
                "file of the manifest"
            )
        if place.transform_descriptors:
            raise CheckpointError(f"{index.fqn!r} is stored with {place.transform_descriptors}, which is never written")
