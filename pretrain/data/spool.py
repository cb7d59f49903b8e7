"""What a packing run keeps until it is done, in the folder `.packing`: encoded batches, and a record of each shard.

    recipe.json            of which run this is
    batch-000000.bin       tokens, then image bytes; removed once all of it stands in shards
    batch-000000.json      its documents, and how far the sources were read
    shard-000000.json      a finished shard, as the manifest lists it

Each .json begins with the SHA-256 of the rest and appears by rename; the bytes it vouches for are hashed before they
are believed. So a run that was killed goes on where it stood, and a half-written file is only work lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.encode import EncodedBatch, EncodedDocument, EncodedImage
from perilune.pretrain.data.shard import shard_name

FOLDER = ".packing"
MAPS = 512  # of batch files kept open


@dataclass(frozen=True)
class SpooledBatch:
    """A batch that is on disk."""

    number: int
    documents: list[EncodedDocument]
    place: tuple[int, int]  # in the sources, after its last document
    there: bool  # its tokens are still kept


class Spool:
    """The folder `.packing` of a dataset being made."""

    def __init__(self, dataset: Path) -> None:
        self.dataset, self.folder = dataset, dataset / FOLDER
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def begin(self, recipe: dict[str, Any]) -> bool:
        """Continue the run of this recipe, or clear what another left; returns whether there was one."""
        if self._load("recipe.json") == recipe:
            return True
        self.clear()
        self.folder.mkdir()
        self._save("recipe.json", recipe)
        return False

    def clear(self) -> None:
        """Remove everything that an unfinished run left in the dataset's folder."""
        for leftover in self.dataset.glob("shard-*.tar*"):
            leftover.unlink()
        self.clear_scratch()

    def clear_scratch(self) -> None:
        """Remove `.packing`, once the dataset is whole."""
        self._maps.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def save_batch(self, number: int, batch: EncodedBatch, place: tuple[int, int]) -> SpooledBatch:
        """Write an encoded batch."""
        data = b"".join([batch.tokens.tobytes(), *batch.images])
        scratch = self._bin(number).with_suffix(".tmp")
        scratch.write_bytes(data)
        os.replace(scratch, self._bin(number))
        digest = hashlib.sha256(data).hexdigest()
        self._save(f"batch-{number:06d}.json", {"sha256": digest, "place": place, "documents": batch.documents})
        return SpooledBatch(number, batch.documents, place, True)

    def load_batch(self, number: int) -> SpooledBatch | None:
        """A batch from before; None where it is not there whole."""
        saved = self._load(f"batch-{number:06d}.json")
        if saved is None:
            return None
        there = self._bin(number).exists()
        if there and _sha256(self._bin(number)) != saved["sha256"]:
            return None
        documents = [
            EncodedDocument(source, offset, size, raw_bytes, fim, tuple(EncodedImage(*image) for image in images))
            for source, offset, size, raw_bytes, fim, images in saved["documents"]
        ]
        return SpooledBatch(number, documents, tuple(saved["place"]), there)

    def drop_batch(self, number: int) -> None:
        """Remove a batch's tokens, all of which stand in finished shards."""
        self._bin(number).unlink(missing_ok=True)

    def bytes_of(self, number: int, begin: int, size: int) -> np.ndarray:
        """uint8 [size], a view of the batch's file."""
        if number in self._maps:
            self._maps.move_to_end(number)
        else:
            if len(self._maps) >= MAPS:
                self._maps.popitem(last=False)
            self._maps[number] = np.memmap(self._bin(number), np.uint8, "r")
        return self._maps[number][begin : begin + size]

    def save_shard(self, number: int, entry: dict[str, Any]) -> None:
        """Record a finished shard."""
        self._save(f"shard-{number:06d}.json", entry)

    def load_shard(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that is there and whole; None where it is not."""
        entry = self._load(f"shard-{number:06d}.json")
        path = self.dataset / shard_name(number)
        return entry if entry and path.is_file() and _sha256(path) == entry["sha256"] else None

    def _bin(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.bin"

    def _save(self, name: str, value: Any) -> None:
        body = json.dumps(value, separators=(",", ":")).encode()
        scratch = self.folder / f".{name}.tmp"
        scratch.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(scratch, self.folder / name)

    def _load(self, name: str) -> Any:
        try:
            digest, _, body = (self.folder / name).read_bytes().partition(b"\n")
        except OSError:
            return None
        return json.loads(body) if digest.decode("ascii", "replace") == hashlib.sha256(body).hexdigest() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
