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

from perilune.pretrain.checkpoint_files import CheckpointError
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
