"""The shards: one row as members of a plain USTAR tar, written and read.

    KEY.tokens.npy       uint16 or uint32 [seq_len]: the smaller type that holds the vocabulary
    KEY.cu_seqlens.npy   int32 [pieces + 1]: where pieces of documents begin, 0 first and seq_len last
    KEY.loss_mask.npy    uint8 [seq_len]: 1 where the token may be predicted
    KEY.docs.json        a list: of each piece its document and source, place, tokens, bytes, continuation marks

and, only where the row has images, in the order of their places:

    KEY.images.npy       int32 [images, 4]: place of the first placeholder token, their number, patches down and across
    KEY.0.jpg ...        each image as it was encoded: .jpg, .png or .webp

Owner, time and mode are fixed, so that equal rows are equal bytes. Nothing read here is unpickled, no path in a tar is
ever opened, and no array is larger than the bytes that were read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from perilune.vision.image_header import ENDINGS, ImageRule

BLOCK = 512  # bytes of a tar block
# Of each sample in the manifest; the last two are what its time in training depends on beyond its tokens.
SAMPLE_FIELDS = ("key", "offset", "length", "crc32", "squares", "patches")
# Of one or two dimensions, little-endian integers, in C's order, padded with blanks.
NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][ui][1248])', 'fortran_order': False, 'shape': \((\d{1,12},(?: \d{1,12})?)\), \} *\n"
)


@dataclass(frozen=True)
class RowImage:
    """An image of a row: placeholders stand at tokens[start : start + tokens]."""

    data: bytes  # as it was encoded; nothing of it is decoded here
    ending: str  # of image_header.ENDINGS
    start: int
    tokens: int
    grid: tuple[int, int]  # patches (down, across)


@dataclass(frozen=True)
class Row:
    """One row of `seq_len` tokens."""

    key: str
    tokens: np.ndarray  # [seq_len] uint16 or uint32
    cu_seqlens: np.ndarray  # [pieces + 1] int32
    loss_mask: np.ndarray  # [seq_len] uint8
    docs_json: bytes = b"[]"
    images: tuple[RowImage, ...] = ()

    @property
    def docs(self) -> list[dict[str, Any]]:
        """Of each piece: doc, source, start, tokens, of, bytes, continues, continued, repeat."""
        return json.loads(self.docs_json)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a row's tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def cost_inputs(row: Row) -> tuple[int, int]:
    """(sum of the squared lengths of its pieces, image patches): what batches are balanced by without reading rows."""
    lengths = np.diff(row.cu_seqlens.astype(np.int64))
    return int(np.dot(lengths, lengths)), sum(down * across for down, across in (i.grid for i in row.images))


def encode_row(row: Row) -> bytes:
    """The row's tar members, each padded to whole blocks."""
    members = {
        "tokens.npy": _npy(row.tokens),
        "cu_seqlens.npy": _npy(row.cu_seqlens),
        "loss_mask.npy": _npy(row.loss_mask),
        "docs.json": row.docs_json,
    }
    if row.images:
        table = [[image.start, image.tokens, *image.grid] for image in row.images]
        members["images.npy"] = _npy(np.array(table, "<i4"))
        members |= {f"{i}.{image.ending}": image.data for i, image in enumerate(row.images)}
    out = bytearray()
    for name, data in members.items():
        info = tarfile.TarInfo(f"{row.key}.{name}")
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        out += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
    return bytes(out)


def decode_row(data: bytes, key: str) -> Row:
    """The row back from the bytes of its members. Raises ValueError, saying what is wrong and at which byte."""
    parts: dict[str, memoryview] = {}
    at = 0
    while at < len(data):
        name, size = _tar_header(data, at)
        begin = at + BLOCK
        if begin + size > len(data):
            raise ValueError(f"member {name!r} at byte {at} has {size} bytes, of which {len(data) - begin} are there")
        owner, _, ending = name.partition(".")
        if owner != key or ending in parts:
            raise ValueError(f"member {name!r} at byte {at} does not belong to sample {key}, or is there twice")
        parts[ending] = memoryview(data)[begin : begin + size]
        at = begin + size + -size % BLOCK
    missing = [e for e in ("tokens.npy", "cu_seqlens.npy", "loss_mask.npy", "docs.json") if e not in parts]
    if missing:
        raise ValueError(f"members {', '.join(missing)} are missing")
    arrays = {e: parse_npy(parts.pop(f"{e}.npy"), e) for e in ("tokens", "cu_seqlens", "loss_mask")}
    row = Row(key, **arrays, docs_json=bytes(parts.pop("docs.json")), images=_decode_images(parts))
    if parts:
        raise ValueError(f"members {', '.join(parts):.100} are none of the format")
    return row


def _decode_images(parts: dict[str, memoryview]) -> tuple[RowImage, ...]:
    """The row's images; their members are taken out of `parts`."""
    if "images.npy" not in parts:
        return ()
    images = []
    for i, (start, tokens, *grid) in enumerate(parse_npy(parts.pop("images.npy"), "images", (4,)).tolist()):
        ending = next((e for e in ENDINGS if f"{i}.{e}" in parts), None)
        if ending is None:
            raise ValueError(f"image {i} is missing")
        images.append(RowImage(bytes(parts.pop(f"{i}.{ending}")), ending, start, tokens, (grid[0], grid[1])))
    return tuple(images)


def check_row(row: Row, seq_len: int, vocab_size: int, rule: ImageRule | None = None) -> None:
    """Raise ValueError where the row breaks a promise of the format; `rule` is the manifest's, None without images."""
    expected = {"tokens": token_dtype(vocab_size), "cu_seqlens": np.dtype("<i4"), "loss_mask": np.dtype("u1")}
    for name, dtype in expected.items():
        array = getattr(row, name)
        if array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}; it must be {dtype}")
        if name != "cu_seqlens" and array.shape != (seq_len,):
            raise ValueError(f"{name} has {array.size} values; a row has {seq_len}")
    if int(row.tokens.max()) >= vocab_size:
        raise ValueError(f"token id {int(row.tokens.max())} lies outside the vocabulary of {vocab_size}")
    cu = row.cu_seqlens
    if cu.size < 2 or cu[0] != 0 or cu[-1] != seq_len or bool((cu[1:] <= cu[:-1]).any()):
        raise ValueError(f"cu_seqlens {cu[:8].tolist()}... must rise from 0 to {seq_len}")
    if int(row.loss_mask.max()) > 1:
        raise ValueError(f"loss_mask holds {int(row.loss_mask.max())}; it must be 0 or 1")
    if rule is None:
        if row.images:
            raise ValueError(f"{len(row.images)} images, of which the manifest knows nothing")
        return
    end = 0
    for i, image in enumerate(row.images):
        if not end <= image.start < image.start + image.tokens <= seq_len or image.tokens != rule.tokens(image.grid):
            raise ValueError(f"image {i}: {image.tokens} tokens at {image.start} for {image.grid} patches")
        end = image.start + image.tokens
        if bool((row.tokens[image.start : end] != rule.placeholder_id).any()):
            raise ValueError(f"image {i}: tokens {image.start} to {end} are not all {rule.placeholder_id}")
    held = sum(image.tokens for image in row.images)
    if (found := int((row.tokens == rule.placeholder_id).sum())) != held:
        raise ValueError(f"{found} placeholder tokens for {held} of images")


def shard_name(number: int) -> str:
    """The file of a dataset's shard."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes rows into `shard-000000.tar`, ... of `folder`; a shard has its name only once it is whole.

    `first` is the number of the first shard.
    """

    def __init__(self, folder: Path, rows_per_shard: int, first: int = 0) -> None:
        self.folder, self.first = folder, first
        self.rows_per_shard = rows_per_shard
        self.shards: list[dict[str, Any]] = []  # as the manifest lists them
        self._stream: io.BufferedWriter | None = None
        self._samples: list[list[Any]] = []
        self._tokens = 0

    def write(self, row: Row) -> None:
        """Append one row, beginning a new shard where the last is full."""
        if self._stream is None:
            self._stream = self._path(".tmp").open("wb")
            self._digest = hashlib.sha256()
            self._offset = 0
        data = encode_row(row)
        self._samples.append([row.key, self._offset, len(data), zlib.crc32(data), *cost_inputs(row)])
        self._tokens += row.tokens.size
        self._append(data)
        if len(self._samples) == self.rows_per_shard:
            self.close()

    def close(self) -> None:
        """Finish the shard begun, if any."""
        if self._stream is None:
            return
        # A tar ends with two zero blocks, filled up to a record of 20 blocks as tar does.
        self._append(bytes(2 * BLOCK + -(self._offset + 2 * BLOCK) % tarfile.RECORDSIZE))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        os.replace(self._path(".tmp"), self._path(""))
        self.shards.append(
            {
                "name": self._path("").name,
                "sha256": self._digest.hexdigest(),
                "bytes": self._offset,
                "tokens": self._tokens,
                "samples": self._samples,
            }
        )
        self._samples, self._tokens = [], 0

    def _append(self, data: bytes) -> None:
        assert self._stream is not None
        self._stream.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _path(self, ending: str) -> Path:
        return self.folder / (shard_name(self.first + len(self.shards)) + ending)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def parse_npy(data: memoryview, name: str, inner: tuple[int, ...] = ()) -> np.ndarray:
    """A view of an array [count, *inner] of integers; anything else, above all objects (pickles), is refused."""
    if bytes(data[:8]) != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{name} is not a .npy file of version 1.0")
    begin = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _npy_header(bytes(data[:begin]))
    if len(shape) != 1 + len(inner) or shape[1:] != inner:
        raise ValueError(f"{name} has the shape {shape}; it must be {('n', *inner)}")
    count = math.prod(shape)
    if len(data) != begin + count * dtype.itemsize:
        raise ValueError(f"{name} says {count} values of {dtype} and holds {len(data) - begin} bytes")
    return np.frombuffer(data, dtype=dtype, count=count, offset=begin).reshape(shape)


@lru_cache(maxsize=4096)
def _npy_header(head: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """(type, shape); cached because all rows of a dataset share a few headers.

    Read as `_npy` writes it and no other way: NumPy's own parser evaluates Python literals, and raises whatever the
    tokenizer and the compiler of Python do.
    """
    found = NPY_HEADER.fullmatch(head, 10)
    if found is None:
        raise ValueError(f"an array's header is {head[10:90]!r}, not one of plain integers")
    return np.dtype(found[1].decode()), tuple(int(size) for size in found[2].split(b",") if size)


def _tar_header(data: bytes, at: int) -> tuple[str, int]:
    """(name, size) of the regular member at byte `at`; links, folders and extensions are refused."""
    head = data[at : at + BLOCK]
    if len(head) < BLOCK or head[257:262] != b"ustar" or head[156:157] not in (b"0", b"\0"):
        raise ValueError(f"no regular tar member at byte {at}")
    try:
        return head[:100].rstrip(b"\0").decode("ascii"), int(head[124:136].rstrip(b" \0"), 8)
    except ValueError as error:
        raise ValueError(f"a tar header at byte {at} that cannot be read: {error}") from error
