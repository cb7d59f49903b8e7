"""`perilune inspect --verify`: every byte of a packed dataset against its manifest, everything wrong named.

A shard is read once, from its beginning to its end, a sample at a time: SHA-256 of the whole, CRC-32 and contents of
each sample. Reading goes on after damage, so that one pass tells all of it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from perilune.pretrain.data.images import check_images
from perilune.pretrain.data.manifest import image_rule
from perilune.pretrain.data.mixture import source_of
from perilune.pretrain.data.shard import Row, check_row, cost_inputs, decode_row
from perilune.pretrain.data.storage import Store

CHUNK = 1 << 22  # bytes read at once: nothing a manifest says makes us ask for more memory than the shard fills


@dataclass(frozen=True)
class Damage:
    """What is not as the manifest says: in which shard, from which byte on, in which sample (None: in none)."""

    shard: str
    sample: str | None
    offset: int
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.sample is None else f'/{self.sample}'} at byte {self.offset}: {self.what}"


@dataclass
class Verified:
    """What one pass over the shards found and counted."""

    damage: list[Damage] = field(default_factory=list)
    bytes: int = 0  # hashed
    rows: int = 0  # whole
    lost_rows: int = 0  # damaged, or not there
    counts: Counter[str] = field(default_factory=Counter)  # of whole rows: documents, pieces, splits, ..., by name
    sources: dict[str, Counter[str]] = field(default_factory=dict)  # of whole rows: source -> documents, tokens, bytes


def verify(
    manifest: dict[str, Any],
    store: Store,
    progress: Callable[[int], None] = lambda size: None,
) -> Verified:
    """Read every shard of `manifest` from `store`; `progress` is told the bytes read since it was last told.

    What is stored never makes it raise: it becomes a finding, and so does what a local disk cannot read. A remote store
    that gives no answer says nothing about the data and raises StoreError.
    """
    found = Verified()
    names = {shard["sha256"]: shard["name"] for shard in manifest["shards"]}
    for shard in manifest["shards"]:
        before = len(found.damage)
        try:
            digest = _verify_shard(manifest, shard, _Shard(store, shard["name"], found, progress), found)
        except FileNotFoundError:
            _lose(found, shard, 0, f"this shard is missing, and its {len(shard['samples']):,} samples with it")
            continue
        except OSError as error:
            _lose(found, shard, 0, f"this shard cannot be read: {error}")
            continue
        mine = found.damage[before:]
        if digest != shard["sha256"] and digest in names:
            found.damage[before:] = [Damage(shard["name"], None, 0, f"these are the bytes of {names[digest]}")]
        elif digest != shard["sha256"] and not mine:
            what = f"SHA-256 is {digest}, the manifest says {shard['sha256']}, though every sample is as it says"
            found.damage.append(Damage(shard["name"], None, 0, what))
    if not found.damage:
        found.damage += _compare(manifest, found.counts)
    return found


class _Shard:
    """A shard from its beginning to its end, hashed on the way."""

    def __init__(self, store: Store, name: str, found: Verified, progress: Callable[[int], None]) -> None:
        self._store, self._name, self._found, self._progress = store, name, found, progress
        self._digest = hashlib.sha256()
        self._block, self._used = b"", 0  # what was read, and how much of it is taken
        self._read = 0  # bytes asked of the store
        self.at = 0  # bytes taken

    def take(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        parts = []
        while size:
            if self._used == len(self._block) and not self._next_block():
                break
            part = self._block[self._used : self._used + size]
            self._used += len(part)
            self.at += len(part)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _next_block(self) -> bool:
        self._block, self._used = self._store.read_range(self._name, self._read, CHUNK), 0
        self._digest.update(self._block)
        self._progress(len(self._block))
        self._found.bytes += len(self._block)
        self._read += len(self._block)
        return bool(self._block)

    def finish(self) -> str:
        """SHA-256 of the whole shard, read to its end."""
        while self.take(CHUNK):
            pass
        return self._digest.hexdigest()


def _verify_shard(manifest: dict[str, Any], shard: dict[str, Any], stream: _Shard, found: Verified) -> str:
    """SHA-256 of the shard as it is; findings and counts go to `found`."""
    rule = image_rule(manifest)
    for number, (key, offset, length, crc, *cost) in enumerate(shard["samples"]):
        _between(stream, offset, shard, found)
        data = stream.take(length)
        if len(data) < length:
            left = len(shard["samples"]) - number
            what = f"{len(data)} of {length} bytes are there: the shard ends here, and {left:,} samples are not whole"
            _lose(found, shard, number, what)
            return stream.finish()
        try:
            if zlib.crc32(data) != crc:
                raise ValueError(f"CRC-32 is {zlib.crc32(data):08x}, the manifest says {crc:08x}{_where(data, key)}")
            row = decode_row(data, key)
            check_row(row, manifest["seq_len"], manifest["tokenizer"]["vocab_size"], rule)
            pieces = check_docs(row)
            check_images(row, rule)
            if list(cost_inputs(row)) != cost:
                raise ValueError(f"squares and patches are {cost_inputs(row)}, the manifest says {cost}")
        except ValueError as error:
            found.damage.append(Damage(shard["name"], key, offset, str(error)))
            found.lost_rows += 1
            continue
        found.rows += 1
        found.counts["images"] += len(row.images)
        _count(pieces, found)
    _between(stream, shard["bytes"], shard, found)
    if stream.at < shard["bytes"]:
        what = f"the shard ends here; the manifest says {shard['bytes']} bytes. No sample is lost"
        found.damage.append(Damage(shard["name"], None, stream.at, what))
    digest = stream.finish()
    if stream.at > shard["bytes"]:
        what = f"{stream.at - shard['bytes']} bytes more than the manifest says"
        found.damage.append(Damage(shard["name"], None, shard["bytes"], what))
    return digest


def _between(stream: _Shard, end: int, shard: dict[str, Any], found: Verified) -> None:
    """The bytes before `end` that belong to no sample: the end of the tar, which is all zero."""
    while stream.at < end and (data := stream.take(min(end - stream.at, CHUNK))):
        if stray := data.strip(b"\0"):
            where = stream.at - len(data) + data.index(stray[:1])
            found.damage.append(Damage(shard["name"], None, where, "a byte between samples is not zero"))


def _where(data: bytes, key: str) -> str:
    """Where the tar itself broke, if it did: a CRC-32 says only that something did."""
    try:
        decode_row(data, key)
    except ValueError as error:
        return f" ({error}; bytes are counted from the sample's first)"
    return ""


def _lose(found: Verified, shard: dict[str, Any], first: int, what: str) -> None:
    """The samples from number `first` on are not there."""
    key, offset = shard["samples"][first][:2] if first < len(shard["samples"]) else (None, 0)
    found.damage.append(Damage(shard["name"], key, offset, what))
    found.lost_rows += len(shard["samples"]) - first


# ---------------------------------------------------------------- what rows say of their documents


def check_docs(row: Row) -> list[dict[str, Any]]:
    """The row's pieces; ValueError where docs.json does not fit the tokens, the boundaries or itself."""
    try:
        pieces = row.docs
    except (ValueError, RecursionError) as error:
        raise ValueError(f"docs.json is not JSON: {error}") from error
    lengths = (row.cu_seqlens[1:] - row.cu_seqlens[:-1]).tolist()
    if not isinstance(pieces, list) or len(pieces) != len(lengths):
        what = f"{len(pieces)} pieces" if isinstance(pieces, list) else f"a {type(pieces).__name__}"
        raise ValueError(f"docs.json tells of {what}, cu_seqlens of {len(lengths)} pieces")
    for number, (piece, length, begin) in enumerate(zip(pieces, lengths, row.cu_seqlens.tolist(), strict=False)):
        try:
            start, tokens, of = (_natural(piece, name) for name in ("start", "tokens", "of"))
            _natural(piece, "doc"), _natural(piece, "bytes")
            sound = (
                isinstance(piece["source"], str)
                and tokens == length
                and start + tokens <= of
                and piece["continues"] is (start > 0)
                and piece["continued"] is (start + tokens < of)
                and not (piece["repeat"] is True and row.loss_mask[begin : begin + length].any())
            )
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"docs.json: piece {number} lacks or misspells a field: {error!r}") from error
        if not sound:
            raise ValueError(f"docs.json: piece {number} of {length} tokens does not fit: {piece!s:.300}")
    return pieces


def _natural(piece: dict[str, Any], name: str) -> int:
    value = piece[name]
    if type(value) is not int or value < 0:
        raise TypeError(f"{name} is {value!r}")
    return value


def _count(pieces: list[dict[str, Any]], found: Verified) -> None:
    """What is repeated to fill the last row counts as repeat_tokens only."""
    for piece in pieces:
        if piece["repeat"]:
            found.counts["repeat_tokens"] += piece["tokens"]
            continue
        first = piece["start"] == 0
        found.counts["documents"] += first
        found.counts["splits"] += not first
        found.counts["document_tokens"] += piece["tokens"]
        source = found.sources.setdefault(source_of(piece["source"]), Counter())
        source.update(documents=int(first), tokens=piece["tokens"], bytes=piece["bytes"])


def _compare(manifest: dict[str, Any], counts: Counter[str]) -> list[Damage]:
    """Where whole rows do not add up to what packing counted: a document lost or told twice."""
    said = manifest.get("packing", {})
    return [
        Damage("manifest.json", None, 0, f"packing.{name} is {said[name]:,}, the rows hold {counts[name]:,}")
        for name in ("documents", "document_tokens", "splits", "repeat_tokens")
        if isinstance(said.get(name), int) and said[name] != counts[name]
    ]
