"""What tensors a checkpoint holds and where: torch's distributed checkpoint (DCP) metadata, read with nothing run.

`.metadata` is a pickle, read here by an unpickler that knows a dozen names. torch's and DCP's classes among them are
plain ones here, with the attributes of theirs: an export takes less time than to import both.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_tensor import DTYPES, brief

METADATA = ".metadata"
MASTER = "optimizer.state.param."  # before the name of a weight: its fp32 master, as the distributed optimizer has it
EMA = "ema"  # the name of an average (optim/average.py) among a weight's states
AVERAGE = f"optimizer.state.{EMA}."  # before the name of a weight
Size = tuple[int, ...]
_Box = tuple[tuple[int, int], ...]  # begin and end in each dim
_UNCUT = 1000  # parts that no plane parts: no layout has as many, and comparing them two by two takes time
Shape = tuple[Size, str]  # global shape and dtype of a tensor


class _Closed(type):
    """Of classes that a pickle may name: the state of an object in a pickle can set attributes, and a class is one."""

    made = False  # whether all of them are there

    def __setattr__(cls, name: str, value: Any) -> None:
        if _Closed.made:
            raise CheckpointError(f"it sets {name!r} of a class, which has no business there; do not trust its source")
        super().__setattr__(name, value)


@dataclass(frozen=True)
class Index(metaclass=_Closed):
    """A part of a tensor, by name and where it begins."""

    fqn: str
    offset: Size | None = None


@dataclass
class Place(metaclass=_Closed):
    """Where a part lies."""

    relative_path: str
    offset: int  # bytes
    length: int
    transform_descriptors: Any = None


@dataclass
class Chunk(metaclass=_Closed):
    """The box of a tensor that a part is."""

    offsets: Size
    sizes: Size


@dataclass
class Properties(metaclass=_Closed):
    """Of a tensor."""

    dtype: str  # a key of checkpoint_tensor.DTYPES

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype, *_ = state


@dataclass
class Stored(metaclass=_Closed):
    """A tensor and its parts."""

    properties: Properties
    size: Size
    chunks: list[Chunk]


@dataclass
class Metadata(metaclass=_Closed):
    """Of all tensors."""

    state_dict_metadata: dict[str, Stored]
    storage_data: dict[Index, Place]


class _Unused(metaclass=_Closed):
    """What is written besides: the layout of a tensor and its memory's, and DCP about itself."""

    def __init__(self, *_: Any) -> None: ...


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Unused,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Place,
    **{
        ("torch.distributed.checkpoint.metadata", name): ours
        for name, ours in {
            "Metadata": Metadata, "TensorStorageMetadata": Stored, "TensorProperties": Properties,
            "_MEM_FORMAT_ENCODING": _Unused, "ChunkStorageMetadata": Chunk, "MetadataIndex": Index,
            "StorageMeta": _Unused,
        }.items()
    },
    **{("torch", name): name for name in DTYPES},
}  # fmt: skip


_Closed.made = True


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
    not cover each element of one of them once, or points outside of the manifest's files. None of its content is run;
    a hostile one may still exhaust this process's memory or time.
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
        if type(key) is not str or type(entry) is not Stored or type(entry.properties) is not Properties:
            raise CheckpointError(f"{brief(key)} is a {type(entry).__name__}, not a tensor")
        if type(entry.properties.dtype) is not str or entry.properties.dtype not in DTYPES:
            raise CheckpointError(f"{key!r} is of type {brief(entry.properties.dtype)}, which is never written")
        _check_parts(key, entry)
    _check_places(metadata, sizes)


def _check_parts(key: str, entry: Stored) -> None:
    """Raises CheckpointError unless the parts of a tensor cover each of its elements once."""
    boxes: list[_Box] = []
    for size in (entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))):
        if type(size) is not tuple or not all(type(n) is int and n >= 0 for n in size):
            raise CheckpointError(f"{key!r} or a part of it has the size or offset {brief(size)}")
    for chunk in entry.chunks:
        bounds = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
        if any(o + n > whole for o, n, whole in bounds):
            raise CheckpointError(f"{key!r} is {entry.size}, a part of it {chunk.sizes} at {chunk.offsets}")
        boxes.append(tuple((o, o + n) for o, n, _ in bounds))
    covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if covered != math.prod(entry.size):
        raise CheckpointError(f"{key!r} has {math.prod(entry.size)} elements, its parts {covered}")
    if not _disjoint([box for box in boxes if all(first < end for first, end in box)]):
        raise CheckpointError(f"parts of {key!r} overlap, so that others of its elements are in none")


def _disjoint(boxes: list[_Box]) -> bool:
    """Whether no two boxes, none of them empty, share an element.

    Where no box reaches across a plane, those of its two sides have nothing in common: cut there, and again along the
    other dims. Parts of a layout are cut so into single ones; what cannot be cut is compared two by two.
    """
    todo = [boxes]
    while todo:
        group = todo.pop()
        if len(group) < 2:
            continue
        for dim in range(len(group[0])):
            slabs = _slabs(group, dim)
            if len(slabs) > 1:
                todo += slabs
                break
        else:
            if len(group) > _UNCUT or any(_meet(a, b) for a, b in itertools.combinations(group, 2)):
                return False
    return True


def _slabs(group: list[_Box], dim: int) -> list[list[_Box]]:
    """The boxes, parted wherever none reaches across a plane of this dim."""
    slabs: list[list[_Box]] = []
    reached = -1
    for box in sorted(group, key=lambda box: box[dim]):
        if not slabs or box[dim][0] >= reached:
            slabs.append([])
        slabs[-1].append(box)
        reached = max(reached, box[dim][1])
    return slabs


def _meet(a: _Box, b: _Box) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True))


def _check_places(metadata: Metadata, sizes: dict[str, int]) -> None:
    for index, place in metadata.storage_data.items():
        if type(index) is not Index or type(index.fqn) is not str or type(place) is not Place:
            raise CheckpointError(f"{brief(index)} is at {brief(place)}, which is no place of a part")
        file, begin, length = place.relative_path, place.offset, place.length
        if type(file) is not str or type(begin) is not int or type(length) is not int:
            raise CheckpointError(f"{index.fqn!r} lies at {brief((file, begin, length))}, which is no place")
        if file not in sizes or not 0 <= begin <= begin + length <= sizes[file]:
            raise CheckpointError(
                f"{index.fqn!r} lies at bytes {begin} to {begin + length} of {file!r}, which is not in a file of the "
                "manifest"
            )
        if place.transform_descriptors:
            raise CheckpointError(
                f"{index.fqn!r} is stored with {brief(place.transform_descriptors)}, which is never written"
            )
    for key, entry in metadata.state_dict_metadata.items():
        for chunk in entry.chunks:
            if Index(key, chunk.offsets) not in metadata.storage_data:
                raise CheckpointError(f"{key!r} has a part at {chunk.offsets}, and no file holds it")
