"""Tensors streamed into safetensors files of bounded size, without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.checkpoint_tensor import DTYPES
from perilune.pretrain.disk import SyncedFile
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.folder import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_PIECE = 1 << 18  # elements that are converted and written at once: few enough for a core's cache


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

    def __init__(self, folder: Path, plan: Sequence[tuple[str, tuple[int, ...], str]], max_bytes: int) -> None:
        self._folder = folder
        self._sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape, dtype in plan}
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

    def put(self, name: str, tensor: np.ndarray) -> None:
        """Write the next tensors, shard after shard, in the types announced; within a shard in any order."""
        shape, dtype = self._plan[name]
        if tensor.shape != shape or name in self._written:
            raise ValueError(f"{name}: {list(tensor.shape)} where {list(shape)} was announced, once")
        file, start = self._to(self._file_of[name]), self._starts[name]
        flat = tensor.reshape(-1)
        for at in range(0, flat.size, _PIECE):
            with np.errstate(all="ignore"):  # what is not finite stays so, without a word
                piece = flat[at : at + _PIECE].astype(DTYPES[dtype], copy=False)  # to the nearest, ties to even
            file.write_at(piece.view(np.uint8), start + at * piece.itemsize)
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
            names.sort(key=lambda name: -DTYPES[self._plan[name][1]].itemsize)
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
