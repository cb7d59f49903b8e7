"""A packed dataset by index: one ranged read a row, verified before anything believes it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.manifest import image_rule, read_manifest, read_token_bytes
from perilune.pretrain.data.shard import Row, check_row, decode_row
from perilune.pretrain.data.storage import LocalStore, Remote, open_store
from perilune.pretrain.errors import InputError


class DamageError(InputError):
    """Stored data is not what the manifest says; the message names shard, sample and offset."""


class PackedDataset:
    """Rows of a packed dataset, `dataset[i]` for 0 <= i < len(dataset); safe to read from several threads.

    `path` is a folder or a prefix that `storage.open_store` takes. Opening it verifies the manifest and, in a folder
    and unless `whole` is False, that every shard is there in its full size; each read verifies CRC-32, shapes, ids and
    boundaries. Raises InputError where there is no dataset, DamageError where it is damaged, and StoreError (an
    InputError too) where a remote store cannot be read.
    """

    def __init__(self, path: Path | str, remote: Remote | None = None, *, whole: bool = True) -> None:
        self._store = open_store(path, remote)
        self.where = self._store.where
        manifest = read_manifest(self._store)
        self.manifest: dict[str, Any] = {key: value for key, value in manifest.items() if key != "shards"}
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.fingerprint: str = manifest["fingerprint"]
        self.token_bytes: np.ndarray = read_token_bytes(self._store, manifest)  # uint16 [vocab_size]
        self._images = image_rule(manifest)
        shards = manifest["shards"]
        self._names = [shard["name"] for shard in shards]
        self._first = np.cumsum([0, *(len(shard["samples"]) for shard in shards)])  # of each shard: its first row
        samples = [sample for shard in shards for sample in shard["samples"]]
        self._keys = [sample[0] for sample in samples]
        self._places = np.array([sample[1:4] for sample in samples], dtype=np.int64)  # [rows, (offset, length, crc32)]
        self.squares, self.patches = np.array([sample[4:] for sample in samples], dtype=np.int64).T  # [rows]
        if whole and isinstance(self._store, LocalStore):  # a remote shard is missed when it is read
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
        try:
            return self._verified(index)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            self._refuse_replaced()
            raise DamageError(
                f"{self.where}: {self.sample_id(index)} at byte {self._places[index, 0]}: {error}. "
                "Copy the shard again from where it came, or pack the dataset again"
            ) from error

    def refuse_other(self, fingerprint: str) -> None:
        """Raise InputError where `fingerprint`, of what a run reads, is not this dataset's: no damage that could be
        quarantined, but other data."""
        if self.fingerprint != fingerprint:
            raise _replaced(self.where, fingerprint, self.fingerprint)

    def close(self) -> None:
        """Close the shards."""
        self._store.close()

    def _refuse_replaced(self) -> None:
        """Raise InputError where the manifest is not the one that was opened any more."""
        try:
            now: str = read_manifest(self._store)["fingerprint"]
        except InputError:  # then nothing says that it is another dataset
            return
        if now != self.fingerprint:
            raise _replaced(self.where, self.fingerprint, now)

    def _verified(self, index: int) -> Row:
        """The row; ValueError or OSError where anything about its bytes is wrong."""
        offset, length, crc = self._places[index].tolist()
        name = self._names[self._shard_of(index)]
        data = self._store.read_range(name, offset, length)
        if (found := zlib.crc32(data)) != crc:  # what a cache held may be what is damaged
            self._store.forget(name, offset)
            data = self._store.read_range(name, offset, length)
            found = zlib.crc32(data)
        if len(data) != length:
            raise ValueError(f"{len(data)} of {length} bytes are there")
        if found != crc:
            raise ValueError(f"CRC-32 is {found:08x}, the manifest says {crc:08x}")
        row = decode_row(data, self._keys[index])
        check_row(row, self.seq_len, self.vocab_size, self._images)
        return row

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _check_size(self, shard: int, size: int) -> None:
        path = f"{self.where}/{self._names[shard]}"
        try:
            found = self._store.size(self._names[shard])
        except FileNotFoundError as error:
            raise DamageError(f"{path}: this shard is missing; copy it again, or pack the dataset again") from error
        if found is not None and found != size:
            first, last = self._first[shard], self._first[shard + 1]
            ends = self._places[first:last, 0] + self._places[first:last, 1]
            cut = first + int(np.searchsorted(ends, found, side="right"))  # the first sample that is not whole
            lost = f"; lost from {self.sample_id(cut)} at byte {self._places[cut, 0]} on" if cut < last else ""
            raise DamageError(
                f"{path}: {found} bytes, the manifest says {size}{lost}. "
                "Copy the shard again from where it came, or pack the dataset again"
            )


def _replaced(where: str, was: str, now: str) -> InputError:
    return InputError(
        f"{where}: replaced by another dataset while it was read (fingerprint {was}, now {now}). Put the first one "
        "back and continue from the last checkpoint, or start a new run on the new one, under another path"
    )
