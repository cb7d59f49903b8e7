"""Tensors in safetensors files: a folder's read one by one, an export's streamed into shards of bounded size.

Only safetensors: a pickle runs code, and is never opened. FP8 blocks as of the published DeepSeek-V3 (E4M3 with one
fp32 scale for 128 x 128 weights, arXiv 2412.19437 section 3.3) are dequantised here, whatever their number of rows.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from perilune.pretrain.disk import SyncedFile
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.folder import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"  # behind the name of an FP8 weight: the name of its scales
FP8_BLOCK = 128
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """A tensor as a safetensors header has it; `dtype` in safetensors' words (F32, BF16, F8_E4M3...)."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class WeightFolder:
    """The tensors of a folder in the hub's layout: `model.safetensors`, or shards with their index.

    Headers are read and held against the index at once; a tensor's bytes are read when it is asked for. Raises
    InputError for a folder without them, a truncated or damaged file, and an index that does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as it is stored."""
        entry = self.entries[name]
        try:
            return self._files[entry.file].get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.folder / entry.file}: {name} cannot be read: {error}") from error

    def _open(self) -> None:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file() and index.is_file():
            raise InputError(f"{self.folder} holds {SINGLE} and {INDEX}: which of the two counts? Remove one")
        if single.is_file():
            self._add(SINGLE)
            return
        if not index.is_file():
            pickles = sorted(file.name for kind in _PICKLES for file in self.folder.glob(kind))
            why = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
            raise InputError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{why}")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise InputError(f"{index} has no weight_map from names to files")
        for file in sorted(set(places.values())):
            if file != os.path.basename(file) or not file.endswith(".safetensors"):
                raise InputError(f"{index} names {file!r}, which is not the plain name of a safetensors file")
            if not (self.folder / file).is_file():
                raise InputError(f"{self.folder / file} is missing; {index.name} names it")
            self._add(file)
        for name in self.entries.keys() | places.keys():
            if name not in self.entries:
                raise InputError(f"{self.folder / places[name]} lacks {name}, which {index.name} says it holds")
            if places.get(name) != self.entries[name].file:
                raise InputError(
                    f"{self.folder / self.entries[name].file} holds {name}, which {index.name} "
                    + (f"says is in {places[name]}" if name in places else "does not list")
                )

    def _add(self, file: str) -> None:
        path = self.folder / file
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or damaged: {error}. Copy it again from its source") from error
        self._files[file] = handle
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if name in self.entries:
                raise InputError(f"{name} is in {self.entries[name].file} and again in {file}")
            part = handle.get_slice(name)
            self.entries[name] = Entry(tuple(part.get_shape()), part.get_dtype(), file)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [R, C] of E4M3 `weight` [R, C] times `scale` [ceil(R/128), ceil(C/128)], the last blocks cut short."""
    rows, columns = weight.shape
    full = weight.float()
    for at in range(0, rows, FP8_BLOCK):
        line = scale[at // FP8_BLOCK].float().repeat_interleave(FP8_BLOCK)[:columns]
        full[at : at + FP8_BLOCK] *= line
    return full


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of an FP8 weight of `shape`."""
    return tuple(math.ceil(size / FP8_BLOCK) for size in shape)


# ---------------------------------------------------------------- writing


def parse_size(text: str) -> int:
    """Bytes: `5GB`, `500MB` (10^9, 10^6, as in transformers), `4GiB`. Raises InputError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in units or not (size := int(float(match[1]) * units[match[2].upper()])):
        raise InputError(f"--max-shard-size {text!r}: give a number and one of KB, MB, GB, KiB, MiB, GiB, as in 5GB")
    return size


class ShardWriter:
    """Writes tensors, announced beforehand in their order, into safetensors files of at most `max_bytes`.

    Headers are written first and each tensor at its place when it comes, so that none has to be held. A tensor larger
    than `max_bytes` has a file of its own.
    """

    def __init__(self, folder: Path, plan: Sequence[tuple[str, tuple[int, ...], torch.dtype]], max_bytes: int) -> None:
        self._folder = folder
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, shape, dtype in plan}
        self._plan = {name: (shape, dtype) for name, shape, dtype in plan}
        if len(self._plan) != len(plan):
            raise ValueError("a tensor is announced twice")
        self._shards: list[list[str]] = [[]]
        room = max_bytes
        for name, size in self._sizes.items():
            if size > room and self._shards[-1]:
                self._shards.append([])
                room = max_bytes
            self._shards[-1].append(name)
            room -= size
        self._file_of = {
            name: SINGLE if len(self._shards) == 1 else f"model-{at:05d}-of-{len(self._shards):05d}.safetensors"
            for at, names in enumerate(self._shards, 1)
            for name in names
        }
        self._written: set[str] = set()
        self._open_name: str | None = None
        self._file: SyncedFile | None = None
        self._starts: dict[str, int] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensors, shard after shard; within a shard in any order."""
        shape, dtype = self._plan[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or name in self._written:
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} where {list(shape)} {dtype} was announced")
        file = self._to(self._file_of[name])
        file.write_at(tensor.contiguous().view(torch.uint8).reshape(-1).numpy(), self._starts[name])
        self._written.add(name)

    def finish(self) -> int:
        """Close the last file and write the index if there are several. Returns the bytes of all tensors."""
        self._close()
        if missing := self._plan.keys() - self._written:
            raise ValueError(f"{len(missing)} tensors were announced and never written: {sorted(missing)[:3]}")
        total = sum(self._sizes.values())
        if len(self._shards) > 1:
            write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": self._file_of})
        return total

    def close(self) -> None:
        """Give the open file back without finishing."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def _to(self, file: str) -> SyncedFile:
        if self._file is None or file != self._open_name:
            self._close()
            # Larger items first: each tensor then lies at a multiple of its item's size.
            names = [name for name, where in self._file_of.items() if where == file]
            names.sort(key=lambda name: -self._plan[name][1].itemsize)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at = 0
            for name in names:
                shape, dtype = self._plan[name]
                header[name] = {
                    "dtype": _NAMES[dtype],
                    "shape": list(shape),
                    "data_offsets": [at, at + self._sizes[name]],
                }
                at += self._sizes[name]
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}
            self._file = SyncedFile(self._folder / file, hashed=False)
            self._open_name = file
            self._file.write(len(text).to_bytes(8, "little") + text)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
