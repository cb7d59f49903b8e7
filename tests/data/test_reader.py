"""Damage is found, and named with shard, sample and offset; nothing of it reaches the model."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perilune.pretrain.data.manifest import read_manifest, write_manifest
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row, check_row, decode_row, encode_row
from perilune.pretrain.errors import InputError

SHARD = "shard-000001.tar"


@pytest.fixture
def copy(tmp_path: Path, packed: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def place(path: Path, shard: int, sample: int) -> tuple[str, int, int]:
    """(key, offset, length) of a sample."""
    key, offset, length, *_ = read_manifest(path)["shards"][shard]["samples"][sample]
    return key, offset, length


def read_all(path: Path) -> None:
    dataset = PackedDataset(path)
    for i in range(len(dataset)):
        dataset[i]


@pytest.mark.parametrize("where", ["tar header", "npy header", "payload", "last byte"])
def test_one_flipped_bit(copy: Path, where: str) -> None:
    key, offset, length = place(copy, 1, 3)
    at = offset + {"tar header": 3, "npy header": 515, "payload": 700, "last byte": length - 1}[where]
    data = bytearray((copy / SHARD).read_bytes())
    data[at] ^= 4
    (copy / SHARD).write_bytes(data)
    dataset = PackedDataset(copy)
    assert dataset[52].tokens.size == 64, "its neighbour is whole"
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}: CRC-32"):
        dataset[53]


def test_zeroed_swapped_and_missing(copy: Path) -> None:
    key, offset, length = place(copy, 1, 3)
    data = bytearray((copy / SHARD).read_bytes())
    data[offset : offset + length] = bytes(length)
    (copy / SHARD).write_bytes(data)
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}"):
        PackedDataset(copy)[53]
    shutil.copy(copy / "shard-000000.tar", copy / SHARD)
    with pytest.raises(DamageError, match=SHARD):
        read_all(copy)
    (copy / SHARD).unlink()
    with pytest.raises(DamageError, match=f"{SHARD}: this shard is missing"):
        PackedDataset(copy)


@pytest.mark.parametrize("part", ["member boundary", "mid-header", "mid-payload"])
def test_truncated(copy: Path, part: str) -> None:
    key, offset, _ = place(copy, 1, 3)
    end = offset + {"member boundary": 0, "mid-header": 100, "mid-payload": 600}[part]
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:end])
    with pytest.raises(DamageError, match=rf"{SHARD}: {end} bytes.*lost from {SHARD}/{key} at byte {offset} on"):
        PackedDataset(copy)


def test_truncated_while_it_is_read(copy: Path) -> None:
    dataset = PackedDataset(copy)
    key, offset, length = place(copy, 1, 3)
    with (copy / SHARD).open("r+b") as stream:
        stream.truncate(offset + 10)
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}: 10 of {length} bytes"):
        dataset[53]


def test_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    good = path.read_text()
    for bad, says in [
        (good[: len(good) // 2], "not JSON"),
        (good.replace('"rows":', '"rows" :').replace("64", "65", 1), "checksum"),
        (good.replace('"format_version":2', '"format_version":1'), "version 1; this Perilune reads 2"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not the manifest"),
    ]:
        path.write_text(bad)
        with pytest.raises(InputError, match=says):
            PackedDataset(copy)
    path.write_text(good)
    (copy / "token_bytes.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="SHA-256"):
        PackedDataset(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(name="../shard-000000.tar"),
        lambda m: m["shards"][0]["samples"][0].__setitem__(1, -512),
        lambda m: m["shards"][0]["samples"][0].__setitem__(2, 1 << 40),
        lambda m: m["shards"][0]["samples"][0].__setitem__(3, 1 << 99),
        lambda m: m["shards"][0]["samples"][0].__setitem__(4, 64 * 64 + 1),
        lambda m: m["shards"][0]["samples"].pop(),
        lambda m: m["shards"][0].pop("samples"),
        lambda m: m.update(seq_len="64"),
        lambda m: m["tokenizer"].update(vocab_size=-1),
    ],
    ids=["path", "offset", "length", "crc", "squares", "fewer", "none", "type", "vocabulary"],
)
def test_a_manifest_that_lies(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = read_manifest(copy)
    change(manifest)
    write_manifest(copy, {k: v for k, v in manifest.items() if k not in ("format", "format_version", "fingerprint")})
    with pytest.raises(InputError, match="breaks the format"):
        PackedDataset(copy)


def good_row() -> Row:
    return Row("000000007", np.arange(8, dtype="<u2"), np.array([0, 3, 8], "<i4"), np.ones(8, "u1"), b"[]")


def test_rows_that_break_a_promise() -> None:
    check_row(good_row(), 8, 8)
    for change, says in [
        ({"tokens": np.arange(1, 9, dtype="<u2")}, "token id 8 lies outside the vocabulary of 8"),
        ({"tokens": np.arange(7, dtype="<u2")}, "7 values; a row has 8"),
        ({"tokens": np.arange(8, dtype="<u4")}, "uint32"),
        ({"cu_seqlens": np.array([0, 5, 5, 8], "<i4")}, "must rise"),
        ({"cu_seqlens": np.array([0, 3, 9], "<i4")}, "must rise"),
        ({"loss_mask": np.full(8, 2, "u1")}, "0 or 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            check_row(Row(**{**vars(good_row()), **change}), 8, 8)


def test_no_pickle_and_no_foreign_member_is_read() -> None:
    good = encode_row(good_row())
    assert decode_row(good, "000000007").docs == []
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}] * 3, dtype=object))
    link = bytearray(good)
    link[156] = ord("2")
    for data, says in [
        (good.replace(b"'<u2'", b"'|O' "), "not one of plain integers"),
        (good.replace(b"(8,)", b"(9,)", 1), "9 values"),
        (good.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x03", 1), "version 1.0"),
        (good.replace(b"\x93NUMPY", b"\x80\x04evil", 1), "not a .npy"),
        (good[: len(good) // 2], "missing|are there"),
        (good + good, "there twice"),
        (bytes(link), "no regular tar member at byte 0"),
        (b"", "missing"),
    ]:
        with pytest.raises(ValueError, match=says):
            decode_row(data, "000000007")
    with pytest.raises(ValueError, match="does not belong"):
        decode_row(good, "000000008")


def test_a_shard_is_what_its_manifest_hash_says(packed: Path) -> None:
    for shard in json.loads((packed / "manifest.json").read_text())["shards"]:
        assert hashlib.sha256((packed / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
