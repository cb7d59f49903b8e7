"""`manifest.json` of a packed dataset: what it holds, from what it was made, and where every sample lies.

Written last and atomically: a folder without it is not a dataset yet. It carries a checksum of itself, and beside it
`token_bytes.npy` (uint16 [vocab_size]) says how many bytes of text each token stands for, for bits per byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.shard import SAMPLE_FIELDS
from perilune.pretrain.errors import InputError

NAME = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
FORMAT = "perilune-packed"
VERSION = 1


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Add format, fingerprint and checksum to `contents`, and write them as the dataset's manifest."""
    manifest = {"format": FORMAT, "format_version": VERSION, **contents, "sample_fields": list(SAMPLE_FIELDS)}
    manifest["fingerprint"] = _fingerprint(manifest)
    manifest["checksum"] = _digest(manifest)
    write_atomically(folder / NAME, (json.dumps(manifest, indent=None, separators=(",", ":")) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, verified. Raises InputError where it is missing, damaged, or of another format version."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no {NAME}: not a packed dataset, or packing was cut short; run `perilune pack` (again)"
        ) from error
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
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: breaks the format: {error!r}. Pack it again") from error
    return manifest


def read_token_bytes(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """uint16 [vocab_size]: bytes of text each token stands for; InputError where the file is not the manifest's."""
    path = folder / TOKEN_BYTES
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; pack or copy the dataset again") from error
    if hashlib.sha256(data).hexdigest() != manifest["token_bytes"]["sha256"]:
        raise InputError(f"{path}: damaged (its SHA-256 is not the manifest's); pack or copy the dataset again")
    table = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
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
    return _digest([VERSION, manifest["tokenizer"]["fingerprint"], manifest["seq_len"], shards])


def _check(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError where a reader could not rely on the contents."""
    for name in ("seq_len", "rows", "tokens"):
        if not isinstance(manifest[name], int) or manifest[name] <= 0:
            raise ValueError(f"{name} is {manifest[name]!r}, not a positive number")
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if not isinstance(vocab_size, int) or not 0 < vocab_size < 1 << 32:
        raise ValueError(f"vocab_size is {vocab_size!r}")
    if manifest["fingerprint"] != _fingerprint(manifest):
        raise ValueError("the fingerprint is not that of the shards")
    rows = 0
    for shard in manifest["shards"]:
        name, size = shard["name"], shard["bytes"]
        if not name.endswith(".tar") or os.path.basename(name) != name or name.startswith("."):
            raise ValueError(f"shard name {name!r} is not the plain name of a .tar file")
        end = 0
        for key, offset, length, crc in shard["samples"]:
            numbers = all(isinstance(number, int) for number in (offset, length, crc, size))
            if not (isinstance(key, str) and numbers and end <= offset < offset + length <= size < 1 << 62):
                raise ValueError(f"{name}, sample {key!r}: offset {offset!r}, length {length!r} of {size!r} bytes")
            if crc >> 32:
                raise ValueError(f"{name}, sample {key!r}: CRC-32 {crc}")
            end = offset + length
        rows += len(shard["samples"])
    if rows != manifest["rows"] or rows * manifest["seq_len"] != manifest["tokens"]:
        raise ValueError(
            f"{rows} samples of {manifest['seq_len']} tokens, but rows {manifest['rows']}, tokens {manifest['tokens']}"
        )
