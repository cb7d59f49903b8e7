"""Tensors of torch.save read without torch: as torch.load has them, and nothing that is hostile gets through."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_metadata import Size, read_metadata
from perilune.pretrain.checkpoint_tensor import DTYPES, mapped
from perilune.pretrain.hf.weights import as_torch

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "part of a storage": lambda t: t[1:, 2:5],
    "transposed": lambda t: t.T,
    "scalar": lambda t: t[1, 3],
    "empty": lambda t: t[:0],
}


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def placed(blob: bytes, file: Path, start: int = 0) -> Path:
    """`blob` among other bytes."""
    file.write_bytes(bytes(start) + blob + b"behind")
    return file


@pytest.mark.parametrize("start", [0, 64, 4097])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_what_torch_loads(name: str, start: int, tmp_path: Path) -> None:
    bits = torch.randint(0, 2 if name == "bool" else 256, (4, 6, DTYPES[name].itemsize), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, name))[..., 0]
    for view in VIEWS.values():
        blob = saved(view(tensor))
        want = torch.load(io.BytesIO(blob), weights_only=True)
        got = as_torch(mapped(placed(blob, tmp_path / "x", start), start, len(blob)))
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.contiguous().view(-1).view(torch.uint8), want.contiguous().view(-1).view(torch.uint8))


def test_it_lies_in_the_file_where_it_is_aligned(tmp_path: Path) -> None:
    blob = saved(torch.arange(1000.0))
    assert not mapped(placed(blob, tmp_path / "x", 128), 128, len(blob)).flags.owndata
    unaligned = mapped(placed(blob, tmp_path / "x", 127), 127, len(blob))
    assert unaligned.flags.owndata and unaligned.flags.aligned and unaligned[-1] == 999


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000  # halfway, for every bfloat16; subnormals among them
    values = np.concatenate((bits, ties - 1, ties, ties + 1, ties + 0x7FFF)).view(np.float32)
    with np.errstate(invalid="ignore"):
        got, want = as_torch(values.astype(DTYPES["bfloat16"])), torch.from_numpy(values).bfloat16()
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any() and got.isinf().any()
    number = ~want.isnan()  # torch gives NaN other bits by the instructions that the processor has
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))


# ---------------------------------------------------------------- hostile


class Call:
    """Pickled, it is an order to call `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.order = function, arguments

    def __reduce__(self) -> Any:
        return self.order


class Where:
    """A reference to a storage, as torch.save pickles one."""

    def __init__(self, *said: Any) -> None:
        self.said = said


def pickled(tree: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, one: Any) -> Any:
            return one.said if isinstance(one, Where) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(tree)
    return stream.getvalue()


def described(
    size: Any = (2, 3), strides: Any = (3, 1), offset: Any = 0, elements: Any = 6, storage: Any = torch.FloatStorage
) -> bytes:
    where = Where("storage", storage, "0", "cpu", elements)
    return pickled(Call(torch._utils._rebuild_tensor_v2, where, offset, size, strides, False, OrderedDict()))


def archive(description: bytes, data: bytes = bytes(24), compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as records:
        for name, content in {"data.pkl": description, "data/0": data, **more}.items():
            records.writestr(f"archive/{name}", content)
    return stream.getvalue()


def beyond(blob: bytes) -> bytes:
    """The storage's record said to be longer than the archive, in its directory."""
    at = blob.rindex(b"PK\x01\x02")
    sizes = (1 << 20).to_bytes(4, "little") * 2
    return blob[: at + 20] + sizes + blob[at + 28 :]


# The rebuilding function with a state of slots, {"storage": 1}.
SETS = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x07\x00\x00\x00storageK\x01s\x86b."
HOSTILE: dict[str, tuple[bytes, str]] = {
    "runs code": (archive(pickled(Call(exec, "raise SystemExit"))), "asks for __builtin__.exec"),
    "another class": (archive(pickled(Call(torch.nn.Linear, 1, 1))), "asks for torch.nn.modules.linear.Linear"),
    "another storage": (archive(described(storage=torch.ComplexFloatStorage)), "asks for torch.ComplexFloatStorage"),
    "a number": (archive(pickled(1)), "it holds a int in place of a tensor"),
    "a storage": (archive(pickled(Where("storage", torch.FloatStorage, "0", "cpu", 6))), "holds a _Storage"),
    "no storage": (archive(pickled(Call(torch._utils._rebuild_tensor_v2, *range(6)))), "in place of a tensor"),
    "too few words": (archive(pickled(Call(torch._utils._rebuild_tensor_v2, 1))), "cannot be read: TypeError"),
    "too large": (archive(described(size=(3, 3))), "reaches beyond its storage of 6 float32 in 24 bytes"),
    "too far": (archive(described(offset=1)), "reaches beyond its storage"),
    "too far apart": (archive(described(strides=(4, 1))), "reaches beyond its storage"),
    "far enough to overflow": (archive(described(size=(5,), strides=(2**60,))), "reaches beyond its storage"),
    "many": (archive(described(size=(2**40, 2**40), strides=(0, 0))), "its storage has 6 elements"),
    "stretched": (archive(described(size=(2**45,), strides=(0,))), "its storage has 6 elements"),
    "sets what is ours": (archive(SETS), "cannot be read: AttributeError"),
    "storage too short": (archive(described(), bytes(23)), "storage of 6 float32 in 23 bytes"),
    "offset below zero": (archive(described(offset=-1)), "its offset is -1"),
    "stride below zero": (archive(described(strides=(-3, 1), offset=3)), r"strides are \(-3, 1\)"),
    "size below zero": (archive(described(size=(-2, -3))), r"shape is \(-2, -3\)"),
    "size of a float": (archive(described(size=(2.0, 3))), r"shape is \(2.0, 3\)"),
    "a stride less": (archive(described(strides=(1,))), r"strides are \(1,\)"),
    "compressed": (archive(described(), compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed"),
    "of another machine": (archive(described(), byteorder=b"big"), "byte order is b'big'"),
    "cut": (archive(described())[:-10], "cannot be read: BadZipFile"),
    "cut in front": (archive(described())[40:], "cannot be read|is refused"),
    "a record beyond the end": (beyond(archive(described())), "reaches beyond the archive's"),
    "no description": (archive(described()).replace(b"data.pkl", b"data.pk_"), "cannot be read: KeyError"),
    "no data": (archive(described()).replace(b"data/0", b"data/1"), "cannot be read: KeyError"),
    "nothing": (b"", "cannot be read"),
}


def test_the_archives_here_are_as_torch_writes_them(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    blob = archive(described(), data.tobytes(), byteorder=b"little")
    assert np.array_equal(mapped(placed(blob, tmp_path / "x"), 0, len(blob)), data.reshape(2, 3))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name: str, tmp_path: Path) -> None:
    blob, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=f"x: the tensor at byte 64 .*{message}"):
        mapped(placed(blob, tmp_path / "x", 64), 64, len(blob))


def test_no_cut_archive_gets_through(tmp_path: Path) -> None:
    blob = saved(torch.arange(6.0))
    for length in range(0, len(blob), 7):
        with pytest.raises(CheckpointError, match=r"cannot be read|is refused"):
            mapped(placed(blob[:length], tmp_path / "x"), 0, length)


# ---------------------------------------------------------------- metadata


def described_as(
    folder: Path, size: Size, parts: list[tuple[Size, Size]], change: Callable[[Metadata], Any] = lambda _: None
) -> Any:
    """DCP's metadata of one tensor in `parts` (offsets, sizes), as we read it."""
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
    places = {MetadataIndex("w", chunk.offsets): _StorageInfo("a", 0, 1) for chunk in chunks}
    metadata = Metadata({"w": stored}, storage_data=places)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return read_metadata(folder, {".metadata": 0, "a": 1})


def test_parts_cover_each_element_once(tmp_path: Path) -> None:
    grid = [((row, column), (1, 1)) for row in range(100) for column in range(100)]
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    empty = [((1, 1), (0, 0)), ((0, 0), (3, 3))]
    for size, parts in (((100, 100), grid), ((3, 3), pinwheel), ((3, 3), empty), ((), [((), ())])):
        assert described_as(tmp_path, size, parts).state_dict_metadata["w"].size == size
    twice = [*pinwheel[:-1], ((0, 0), (1, 1))]  # and the middle in none
    for size, parts in (((100, 100), grid[:-1] + grid[:1]), ((3, 3), twice), ((4,), [((0,), (3,)), ((2,), (1,))])):
        with pytest.raises(CheckpointError, match="parts of 'w' overlap"):
            described_as(tmp_path, size, parts)


MALFORMED: dict[str, Callable[[Metadata], Any]] = {
    "a number for a name": lambda m: m.state_dict_metadata.update({1: m.state_dict_metadata["w"]}),
    "a list for tensors": lambda m: setattr(m, "state_dict_metadata", [1]),
    "no place": lambda m: m.storage_data.clear(),
    "a place of another type": lambda m: m.storage_data.update({"w": 1}),  # type: ignore[dict-item]
    "an offset of another type": lambda m: m.storage_data.update({MetadataIndex("w"): _StorageInfo("a", 0.0, 1)}),  # type: ignore[arg-type]
    "a file of another type": lambda m: m.storage_data.update({MetadataIndex("w"): _StorageInfo([], 0, 1)}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_metadata_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        described_as(tmp_path, (2,), [((0,), (2,))], MALFORMED[name])


def test_no_text_of_a_nested_value_is_made(tmp_path: Path) -> None:
    bomb: Any = ()
    for _ in range(60):  # its text has 2^60 brackets, its pickle a few hundred bytes
        bomb = (bomb, bomb)
    for change in (
        lambda m: setattr(m.state_dict_metadata["w"], "size", (bomb,)),
        lambda m: setattr(m.storage_data[MetadataIndex("w", torch.Size([0]))], "transform_descriptors", bomb),
        lambda m: setattr(m.storage_data[MetadataIndex("w", torch.Size([0]))], "offset", [bomb]),
    ):
        with pytest.raises(CheckpointError) as refused:
            described_as(tmp_path, (2,), [((0,), (2,))], change)
        assert len(str(refused.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["MetadataIndex", "Metadata", "StorageMeta", "_MEM_FORMAT_ENCODING"])
def test_a_pickle_changes_no_class(name: str, tmp_path: Path) -> None:
    state = b"N}X\x08\x00\x00\x00__hash__NsX\x08\x00\x00\x00__init__Ns\x86b."  # BUILD with (None, {...})
    order = b"\x80\x02ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n" + state
    (tmp_path / ".metadata").write_bytes(order)
    with pytest.raises(CheckpointError, match="sets '__hash__' of a class"):
        read_metadata(tmp_path, {".metadata": len(order)})
    described_as(tmp_path, (2,), [((0,), (2,))])
