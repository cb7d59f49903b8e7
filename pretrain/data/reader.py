"""A packed dataset by index: one ranged read a row, verified before anything believes it."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.manifest import read_manifest, read_token_bytes
from perilune.pretrain.data.shard import Row, check_row, decode_row
from perilune.pretrain.errors import InputError

OPEN_SHARDS = 64  # file descriptors kept


class DamageError(InputError):
    """Stored data is not what the manifest says; the message names shard, sample and offset."""


class PackedDataset:
    """Rows of a packed dataset, `dataset[i]` for 0 <= i < len(dataset); safe to read from several threads.

    Opening it verifies the manifest and that every shard is there in its full size; each read verifies CRC-32, shapes,
    ids and boundaries. Raises InputError where the folder is no dataset, and DamageError where it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.manifest: dict[str, Any] = {key: value for key, value in manifest.items() if key != "shards"}
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.fingerprint: str = manifest["fingerprint"]
        self.token_bytes: np.ndarray = read_token_bytes(self.path, manifest)  # uint16 [vocab_size]
        shards = manifest["shards"]
        self._names = [shard["name"] for shard in shards]
        self._first = np.cumsum([0, *(len(shard["samples"]) for shard in shards)])  # of each shard: its first row
        samples = [sample for shard in shards for sample in shard["samples"]]
        self._keys = [sample[0] for sample in samples]
        self._places = np.array([sample[1:] for sample in samples], dtype=np.int64)  # [rows, (offset, length, crc32)]
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._lock = threading.Lock()
        for number, shard in enumerate(shards):
            self._check_size(number, shard["bytes"])

    def __len__(self) -> int:
        return len(self._keys)

    def sample_id(self, index: int) -> str:
        """`shard/key` of a row, for messages and logs."""
        return f"{self._names[self._shard_of(index)]}/{self._keys[index]}"

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        offset, length, crc = (int(value) for value in self._places[index])
        try:
            data = self._read(self._shard_of(index), offset, length)
            if len(data) != length:
                raise ValueError(f"{len(data)} of {length} bytes are there")
            if zlib.crc32(data) != crc:
                raise ValueError(f"CRC-32 is {zlib.crc32(data):08x}, the manifest says {crc:08x}")
            row = decode_row(data, self._keys[index])
            check_row(row, self.seq_len, self.vocab_size)
        except (OSError, ValueError) as error:
            raise DamageError(
                f"{self.path}: {self.sample_id(index)} at byte {offset}: {error}. "
                "Copy the shard again from where it came, or pack the dataset again"
            ) from error
        return row

    def close(self) -> None:
        """Close the shards."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        # Under the lock, so that no other thread closes the descriptor while it is read from.
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
            else:
                if len(self._open) >= OPEN_SHARDS:
                    os.close(self._open.popitem(last=False)[1])
                self._open[shard] = os.open(self.path / self._names[shard], os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._open[shard], length, offset)

    def _check_size(self, shard: int, size: int) -> None:
        path = self.path / self._names[shard]
        if not path.is_file():
            raise DamageError(f"{path}: this shard is missing; copy it again, or pack the dataset again")
        found = path.stat().st_size
        if found != size:
            first, last = self._first[shard], self._first[shard + 1]
            ends = self._places[first:last, 0] + self._places[first:last, 1]
            cut = first + int(np.searchsorted(ends, found, side="right"))  # the first sample that is not whole
            lost = f"; lost from {self.sample_id(cut)} at byte {self._places[cut, 0]} on" if cut < last else ""
            raise DamageError(
                f"{path}: {found} bytes, the manifest says {size}{lost}. "
                "Copy the shard again from where it came, or pack the dataset again"
            )
