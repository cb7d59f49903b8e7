"""Tensors in the safetensors files of a folder, read one by one; hf/shards.py writes such files.

Only safetensors: a pickle runs code, and is never opened. FP8 blocks as of the published DeepSeek-V3 (E4M3 with one
fp32 scale for 128 x 128 weights, arXiv 2412.19437 section 3.3) are dequantised here, whatever their number of rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from perilune.pretrain.checkpoint_tensor import DTYPES
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.folder import read_json
from perilune.pretrain.hf.shards import INDEX, SINGLE

SCALE = "_scale_inv"  # behind the name of an FP8 weight: the name of its scales
FP8_BLOCK = 128
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


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The same memory as torch's tensor; bfloat16, which numpy has from another library, too."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


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
