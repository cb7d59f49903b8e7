"""A tensor as torch.save wrote it, taken from where the system caches its file: numpy's, with nothing run and no torch.

torch.save writes a zip archive: a pickle that describes the tensor, and its storage as it lies in memory. The pickle is
read by an unpickler that knows the dozen names which describe a plain tensor; the storage is mapped, not copied. A
hostile file runs nothing, but it may exhaust this process's memory or time.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import reprlib
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from perilune.pretrain.checkpoint_files import CheckpointError

_OF_NUMPY = "float32 float16 float64 int64 int32 int16 int8 uint8 bool".split()
DTYPES = {name: np.dtype(name) for name in _OF_NUMPY} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # by torch's names
_STORAGES = {
    "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_LOCAL_HEADER = 30  # bytes before a zip record's name


class _Brief(reprlib.Repr):
    """Of objects their type: a few bytes of a pickle can describe one whose text is larger than memory."""

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if type(x) in (float, bool, type(None)) else type(x).__name__


brief = _Brief().repr  # of what a file holds, for a message, before its type was checked


class _Storage(NamedTuple):
    """Where the elements are: a record of the archive."""

    kind: str
    dtype: str
    key: str
    device: str
    elements: int


class _Described(NamedTuple):
    """The arguments of torch's `_rebuild_tensor_v2`; strides and offset in elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: dict[str, Any]


_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows what describes a tensor in memory of its own, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _REBUILD:
            return self._described  # a bound method, of which a pickle can set no attribute, as of a class it can
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"it asks for {module}.{name}, which has no business there; do not trust its source")
        return _KNOWN[module, name]

    def _described(self, *arguments: Any) -> _Described:
        return _Described(*arguments)

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(*pid)


def mapped(file: Path, start: int, length: int) -> np.ndarray:
    """The tensor that torch.save wrote to `length` bytes of `file` from byte `start` on.

    It lies in the system's cache of the file, unless it does not begin there at a multiple of its items' size: then it
    is copied. Raises CheckpointError for bytes that are no such tensor, or one that is compressed, in another machine's
    byte order, of a type or class that checkpoints do not hold, or larger than its storage.
    """
    try:
        skipped = start % mmap.ALLOCATIONGRANULARITY
        with open(file, "rb") as stream:
            window = mmap.mmap(stream.fileno(), skipped + length, offset=start - skipped, access=mmap.ACCESS_COPY)
        found = _tensor(memoryview(window)[skipped : skipped + length])  # mmap takes a length of 0 for the whole file
        return found if found.flags.aligned else found.copy()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: the tensor at byte {start} is refused: {error}") from error
    except Exception as error:  # whatever malformed bytes make zipfile and pickle raise
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: the tensor at byte {start} cannot be read: {text}") from error


def _tensor(archive: memoryview) -> np.ndarray:
    """The tensor of an archive, in the archive's own memory."""
    with zipfile.ZipFile(cast(IO[bytes], _View(archive))) as records:
        held = {info.filename.partition("/")[2]: info for info in records.infolist()}  # below the archive's own name
    if "byteorder" in held and (order := bytes(_record(archive, held["byteorder"]))) != b"little":
        raise CheckpointError(f"its byte order is {order[:20]!r}, not little")
    described = _Unpickler(io.BytesIO(_record(archive, held["data.pkl"]))).load()
    if type(described) is not _Described or type(described.storage) is not _Storage:
        raise CheckpointError(f"it holds a {type(described).__name__} in place of a tensor")
    storage, offset, shape, strides = described[:4]
    if type(storage.dtype) is not str or type(storage.key) is not str:
        raise CheckpointError(f"its storage is {brief(storage.key)} of {brief(storage.dtype)}")
    dtype = DTYPES[storage.dtype]
    raw = _record(archive, held[f"data/{storage.key}"])
    counts = (storage.elements, offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(count) is int and count >= 0 for count in counts):
        raise CheckpointError(
            f"its shape is {brief(shape)}, its strides are {brief(strides)}, its offset is {brief(offset)}"
        )
    # In Python's integers: numpy's own check of a view's bounds can overflow.
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (0 not in shape and last >= storage.elements) or storage.elements * dtype.itemsize > len(raw):
        raise CheckpointError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches beyond its storage of "
            f"{storage.elements} {storage.dtype} in {len(raw)} bytes"
        )
    if 0 in shape:
        return np.empty(shape, dtype)
    if math.prod(shape) > storage.elements:  # a copy of it may be larger than memory
        raise CheckpointError(f"its shape is {shape}, and its storage has {storage.elements} elements")
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, in_bytes)


def _record(archive: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """A record's bytes. Its CRC-32 is not looked at: none is written, the file has its SHA-256."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(f"its record {info.filename} is compressed, which torch.save never does")
    name_and_extra = archive[info.header_offset + _LOCAL_HEADER - 4 : info.header_offset + _LOCAL_HEADER]
    lengths = int.from_bytes(name_and_extra[:2], "little") + int.from_bytes(name_and_extra[2:], "little")
    begin = info.header_offset + _LOCAL_HEADER + lengths
    if info.header_offset < 0 or begin + info.file_size > len(archive):
        raise CheckpointError(f"its record {info.filename} reaches beyond the archive's {len(archive)} bytes")
    return archive[begin : begin + info.file_size]


class _View(io.RawIOBase):
    """Memory as a file."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._memory))[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._memory[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
