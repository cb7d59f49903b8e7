"""`manifest.json` of a packed dataset: what it holds, from what it was made, and where every sample lies.

Written last and atomically: a folder without it is not a dataset yet. It carries a checksum of itself, and beside it
`token_bytes.npy` (uint16 [vocab_size]) says how many bytes of text each token stands for, for bits per byte. `images`
is None, or the `ImageRule` of a dataset with images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.shard import SAMPLE_FIELDS, parse_npy
from perilune.pretrain.data.storage import LocalStore, Store, join, open_store
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import ImageRule

NAME = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
FORMAT = "perilune-packed"
VERSION = 2
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.tar")  # a plain file of the dataset, whatever the store
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_PATCH_SIZE, MAX_MERGE_SIZE = 64, 8
SAMPLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Add format, fingerprint and checksum to `contents`, and write them as the dataset's manifest."""
    manifest = {"format": FORMAT, "format_version": VERSION, **contents, "sample_fields": list(SAMPLE_FIELDS)}
    manifest["fingerprint"] = _fingerprint(manifest)
    manifest["checksum"] = _digest(manifest)
    write_atomically(folder / NAME, (json.dumps(manifest, indent=None, separators=(",", ":")) + "\n").encode())


def read_manifest(place: Path | str | Store) -> dict[str, Any]:
    """The manifest of the dataset at `place` (a folder, a prefix, or an open store), verified.

    Raises InputError where it is missing, damaged, or of another format version.
    """
    store = open_store(place) if isinstance(place, str | Path) else place
    path = join(store.where, NAME)
    try:
        data = store.read(NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(store, LocalStore) and (inside := sorted(Path(store.where).glob(f"*/{NAME}"))):
            held = ", ".join(str(path.parent) for path in inside[:4])
            raise InputError(
                f"{store.where}: no {NAME}: not a packed dataset itself; it holds {held}: name one"
            ) from error
        raise InputError(
            f"{store.where}: no {NAME}: not a packed dataset, or packing was cut short; run `perilune pack` (again)"
        ) from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}. Pack or copy the dataset again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a packed dataset")
    if manifest.get("format_version") != VERSION:
        raise InputError(f"{path}: format version {manifest.get('format_version')}; this Perilune reads {VERSION}")
    stored = manifest.pop("checksum", None)
    if stored != _digest(manifest):
        raise InputError(f"{path}: its checksum does not fit its contents: edited or damaged. Pack or copy it again")
    try:
        _check(manifest)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: breaks the format: {error!r}. Pack it again") from error
    return manifest


def read_token_bytes(place: Path | str | Store, manifest: dict[str, Any]) -> np.ndarray:
    """uint16 [vocab_size]: bytes of text each token stands for; InputError where the file is not the manifest's."""
    store = open_store(place) if isinstance(place, str | Path) else place
    path = join(store.where, TOKEN_BYTES)
    try:
        data = store.read(TOKEN_BYTES)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; pack or copy the dataset again") from error
    if hashlib.sha256(data).hexdigest() != manifest["token_bytes"]["sha256"]:
        raise InputError(f"{path}: damaged (its SHA-256 is not the manifest's); pack or copy the dataset again")
    try:
        table = parse_npy(memoryview(data), TOKEN_BYTES)
    except ValueError as error:
        raise InputError(f"{path}: {error}; pack the dataset again") from error
    if table.dtype != np.uint16 or table.shape != (manifest["tokenizer"]["vocab_size"],):
        raise InputError(f"{path}: {table.dtype} of shape {table.shape}, not the vocabulary's; pack the dataset again")
    return table


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: it holds the old bytes or all the new ones."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fingerprint(manifest: dict[str, Any]) -> str:
    """Of what a model would see: independent of where the dataset, its sources and its tokenizer lie."""
    shards = [shard["sha256"] for shard in manifest["shards"]]
    return _digest([VERSION, manifest["tokenizer"]["fingerprint"], manifest["seq_len"], manifest["images"], shards])


def image_rule(manifest: dict[str, Any]) -> ImageRule | None:
    """How the dataset's images became tokens; None where it has none."""
    return ImageRule(**manifest["images"]) if manifest["images"] else None


def _sound(rule: ImageRule) -> bool:
    """Whether an image can become so many patches: sizes that no tower has would ask for gigabytes of padding."""
    sizes = (rule.placeholder_id, rule.patch_size, rule.merge_size, rule.patch_limit)
    if any(type(size) is not int for size in sizes):
        return False
    return 1 <= rule.patch_size <= MAX_PATCH_SIZE and 1 <= rule.merge_size <= MAX_MERGE_SIZE and rule.patch_limit >= 1


def _check(manifest: dict[str, Any]) -> None:
    """Raise an error of Python's for wrong types, keys or values where a reader could not rely on the contents."""
    for name in ("seq_len", "rows", "tokens"):
        if type(manifest[name]) is not int or not 0 < manifest[name] < 1 << 62:
            raise ValueError(f"{name} is {manifest[name]!r}, not a positive number")
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if type(vocab_size) is not int or not 0 < vocab_size < 1 << 32:
        raise ValueError(f"vocab_size is {vocab_size!r}")
    for value in (manifest["tokenizer"]["fingerprint"], manifest["token_bytes"]["sha256"]):
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no fingerprint")
    rule = image_rule(manifest)
    if rule and not (0 <= rule.placeholder_id < vocab_size and _sound(rule)):
        raise ValueError(f"images are {manifest['images']}, for a vocabulary of {vocab_size}")
    if manifest["fingerprint"] != _fingerprint(manifest):
        raise ValueError("the fingerprint is not that of the shards")
    rows = 0
    for shard in manifest["shards"]:
        name, size = shard["name"], shard["bytes"]
        if not SHA256.fullmatch(shard["sha256"]):
            raise ValueError(f"{name}: SHA-256 is {shard['sha256']!r}")
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"shard name {name!r} is not the plain name of a .tar file")
        end = 0
        for key, offset, length, crc, squares, patches in shard["samples"]:
            numbers = all(type(number) is int for number in (offset, length, crc, size, squares, patches))
            if not (SAMPLE_KEY.fullmatch(key) and numbers and end <= offset < offset + length <= size < 1 << 62):
                raise ValueError(f"{name}, sample {key!r}: offset {offset!r}, length {length!r} of {size!r} bytes")
            if crc >> 32:
                raise ValueError(f"{name}, sample {key!r}: CRC-32 {crc}")
            if not (0 <= squares <= manifest["seq_len"] ** 2 and 0 <= patches < 1 << 40):
                raise ValueError(f"{name}, sample {key!r}: sum of squared lengths {squares}, patches {patches}")
            end = offset + length
        rows += len(shard["samples"])
    if rows != manifest["rows"] or rows * manifest["seq_len"] != manifest["tokens"]:
        raise ValueError(
            f"{rows} samples of {manifest['seq_len']} tokens, but rows {manifest['rows']}, tokens {manifest['tokens']}"
        )
