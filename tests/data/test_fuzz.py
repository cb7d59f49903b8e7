"""Readers of shards, manifests, images and jsonl against mutated input: sound contents or one error of ours, no other.

PERILUNE_FUZZ_INPUTS=N tries N inputs on each; the same N tries the same ones.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import struct
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from fuzzing import INPUTS, inputs, mutated, mutated_json
from PIL import Image

from perilune.pretrain.data import manifest as manifests
from perilune.pretrain.data.inspect_facts import facts
from perilune.pretrain.data.inspect_page import render
from perilune.pretrain.data.inspect_verify import check_docs, verify
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.shard import Row, RowImage, check_row, decode_row, encode_row
from perilune.pretrain.data.source_tar import tar_samples
from perilune.pretrain.data.sources import documents
from perilune.pretrain.data.storage import open_store
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import ImageRule, image_size
from perilune.vision.images import decode, verify_image

SHARD_WORDS = [
    b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"'<u2'", b"'|O' ", b"'<f8'", b"(8,)", b"(9,)", b"(-1)",
    b"(999999999999,)", b"True", b"False", b"fortran_order", b"__import__('os')", b"\x80\x04\x95.", b"ustar\x0000",
    b"ustar  \x00", b"0000644", b"77777777777", b"00000000000", b"-0000000001", b"000000007.", b"../../x", b".pth",
    b".pyd", b"docs.json", b"images.npy", b"0.png", b"[" * 500, b'{"doc":', b"null", b"-1", b"1e999", b"NaN",
    bytes(512), b"\xff" * 8,
]  # fmt: skip
JSON_WORDS = [
    b'{"text": "', b'"}\n', b"\n", b"\r\n", b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\xc3",
    b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b"[" * 2000, b"{" * 2000, b"1" * 5000, b"NaN", b"null", b"text",
    b'"text": 5', b'"text": null', b" ", b"",
]  # fmt: skip
RULE = ImageRule(placeholder_id=7)


def encoded_image(ending: str, size: tuple[int, int] = (28, 28)) -> bytes:
    out = io.BytesIO()
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending]
    Image.effect_noise(size, 64).convert("RGB").save(out, kind)
    return out.getvalue()


def good_rows() -> list[Row]:
    docs = [
        {"doc": n, "source": "a.jsonl:1", "start": 0, "tokens": size, "of": size, "bytes": 9, "continues": False,
         "continued": False, "repeat": False}
        for n, size in enumerate((3, 5))
    ]  # fmt: skip
    plain = Row(
        "000000007",
        np.arange(8, dtype="<u2") % 7,
        np.array([0, 3, 8], "<i4"),
        np.ones(8, "u1"),
        json.dumps(docs).encode(),
    )
    tokens = plain.tokens.copy()
    tokens[[4, 6]] = 7
    pictures = [RowImage(encoded_image(e), e, at, 1, (2, 2)) for e, at in (("png", 4), ("jpg", 6))]
    return [plain, Row(**{**vars(plain), "tokens": tokens, "images": tuple(pictures)})]


def test_shard_reader() -> None:
    """What passes is a row as good as a written one: it encodes, and decodes to itself."""
    good = [(encode_row(row), RULE if row.images else None) for row in good_rows()]
    for data, rule in good:
        check_row(row := decode_row(data, "000000007"), 8, 8, rule)
        check_docs(row)
    outcomes: Counter[str] = Counter()
    for rng in inputs("shard"):
        data, rule = rng.choice(good)
        try:
            row = decode_row(mutated(rng, data, SHARD_WORDS), "000000007")
            check_row(row, 8, 8, rule)
            check_docs(row)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes["passed"] += 1
        again = decode_row(encode_row(row), "000000007")
        assert again.docs_json == row.docs_json and again.images == row.images
        for name in ("tokens", "cu_seqlens", "loss_mask"):
            assert np.array_equal(getattr(again, name), getattr(row, name))
    assert outcomes["refused"] > outcomes["passed"] > 0, outcomes


def signed(manifest: Any) -> bytes:
    """With fingerprint and checksum as a liar would make them."""
    if isinstance(manifest, dict):
        manifest.pop("checksum", None)
        try:
            manifest["fingerprint"] = manifests._fingerprint(manifest)
        except Exception:  # too broken to have one
            manifest["fingerprint"] = "none"
        digest = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        manifest["checksum"] = hashlib.sha256(digest).hexdigest()
    return json.dumps(manifest).encode()


def test_manifest_reader(packed: Path, tmp_path: Path) -> None:
    """Flipped bytes, and lies that carry the right checksum: an InputError, or a dataset that every read can trust."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    path = copy / "manifest.json"
    whole = path.read_bytes()
    good = json.loads(whole)
    for shard in good["shards"]:  # fewer nodes of one kind
        shard["samples"] = shard["samples"][:3]
    good["shards"] = good["shards"][:2]
    good.update(rows=6, tokens=6 * good["seq_len"])
    path.write_bytes(signed(good))
    assert len(PackedDataset(copy)) == 6
    outcomes: Counter[str] = Counter()
    words = [
        b'"rows":',
        b"-1",
        b"null",
        b"[",
        b"{",
        b"1e999",
        b'"shards":[]',
        b"\xff",
        b"\\ud800",
        b'"checksum":',
        b"NaN",
    ]
    for number, rng in enumerate(inputs("manifest")):
        lied = number % 4 != 0
        path.write_bytes(signed(mutated_json(rng, good)) if lied else mutated(rng, signed(good), words))
        try:
            dataset = PackedDataset(copy, whole=bool(number % 2))
        except InputError:
            outcomes["refused"] += 1
            continue
        assert lied or json.loads(path.read_bytes()) == good
        outcomes["opened"] += 1
        for index in range(len(dataset)):
            try:
                assert dataset[index].tokens.size == dataset.seq_len
            except InputError:
                outcomes["row refused"] += 1
        dataset.close()
        verify(read_manifest(copy), open_store(copy))
        if number % 16:
            continue
        try:
            render(facts(str(copy), read_manifest(copy)), good, None)
        except InputError:
            outcomes["not shown"] += 1
    assert outcomes["refused"] > outcomes["opened"] > 0, outcomes


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl_reader(tmp_path: Path, ending: str) -> None:
    """Documents of Unicode text, or an InputError that names the file."""
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[ending]
    good = "".join(
        json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "naïve 漢字 🙂\0", " two\r\n")
    ).encode()
    path = tmp_path / f"x.{ending}"
    outcomes: Counter[str] = Counter()
    for number, rng in enumerate(inputs(ending, INPUTS // 3)):
        inner = number % 2 == 0 or ending == "jsonl"
        path.write_bytes(
            pack(mutated(rng, good, JSON_WORDS)) if inner else mutated(rng, pack(good), [b"\x1f\x8b", b"\0\0"])
        )
        try:
            for document in documents([str(path)]):
                assert document.text and document.text.encode("utf-8")
                assert document.source.startswith(f"{path}:")
            outcomes["read"] += 1
        except InputError as error:
            assert f"x.{ending}" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 0, outcomes


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_image_headers(ending: str) -> None:
    """Kind and size are those that the decoder finds, or a ValueError; the decoder sees nothing beyond the limits."""
    good = encoded_image(ending, (37, 21))
    assert image_size(good) == verify_image(good) == (ending, 37, 21)
    words = [
        good[:12],
        b"IHDR",
        b"VP8X",
        b"VP8L",
        b"VP8 ",
        b"\xff\xc0",
        b"\xff\xd8",
        b"\xff\xff",
        b"\xff\xda",
        b"\xff" * 4,
        b"acTL",
    ]
    outcomes: Counter[str] = Counter()
    for rng in inputs(f"image {ending}", INPUTS // 3):
        data = mutated(rng, good[: rng.choice((64, len(good)))], words)
        try:
            _, width, height = image_size(data)
        except ValueError:
            outcomes["refused"] += 1
            continue
        assert width > 0 and height > 0
        if width * height > 1 << 20:  # allowed, but seconds to decode thousands of
            continue
        try:
            assert verify_image(data)[1:] == (width, height) == decode(data)[1].size
            outcomes["decoded"] += 1
        except ValueError:
            outcomes["damaged"] += 1
    assert outcomes["refused"] and outcomes["damaged"], outcomes


TAR_WORDS = [
    b"ustar\x0000", b"ustar  \x00", b"\x80\x00\x00\x00", b"77777777777", b"00000000000", b"-0000000001", b"x" * 156,
    b"L", b"2", b"5", b"g", b"../../", b"a.txt", b"a.json", b"a.0.jpg", bytes(512), bytes(1024), b"\xff\xfe",
    b'{"texts": [', b"null", b'"images": ', b"[" * 2000, b"30 path=", b"99999999999999999999 path=",
    b"9" * 5000 + b" path=", b"10 size=9\n", b"18 GNU.sparse.\xff=1\n", b"1" * 5000,
]  # fmt: skip


def tar_bytes(pax: bool) -> bytes:
    """A pair, an interleaved document, a text; names beyond 100 characters as pax headers or as GNU's."""
    about = json.dumps({"texts": ["one", None, "two"], "images": [None, "0.jpg", None]}).encode()
    members = {"a.jpg": encoded_image("jpg"), "a.txt": b"caption", "b.json": about, "b.0.jpg": encoded_image("jpg"),
               "c.txt": "naïve\0".encode(), "c.pyd": b"passed over", "d" * 150 + ".txt": b"long name"}  # fmt: skip
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def resummed(rng: random.Random, data: bytes) -> bytes:
    """With every header's checksum made right, as a liar would."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def test_tar_reader() -> None:
    """Texts and encoded images, or an InputError that names the tar."""
    good = [tar_bytes(True), tar_bytes(False)]
    assert [len(list(tar_samples(io.BytesIO(data), "x.tar"))) for data in good] == [4, 4]
    outcomes: Counter[str] = Counter()
    for number, rng in enumerate(inputs("tar")):
        data = mutated(rng, rng.choice(good), TAR_WORDS)
        try:
            for source, parts in tar_samples(io.BytesIO(resummed(rng, data) if number % 4 else data), "x.tar"):
                assert source.startswith("x.tar:")
                assert all(part and (isinstance(part, bytes) or part.encode("utf-8")) for part in parts)
            outcomes["read"] += 1
        except InputError as error:
            assert "x.tar" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 0, outcomes


def test_megatron_reader(tmp_path: Path) -> None:
    """Every document as long as its index says, or an InputError that names a file."""
    ids = np.arange(100, dtype="<u2")
    lengths, bounds = np.array([40, 10, 50], "<i4"), np.array([0, 1, 3], "<i8")
    places = np.array([0, 80, 100], "<i8")
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 3) + lengths.tobytes() + places.tobytes() + bounds.tobytes()
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    path = tmp_path / "x.idx"
    path.write_bytes(index)
    assert [part.size for part in (d.parts[0] for d in documents([str(path)]))] == [40, 60]
    words = [struct.pack("<q", v) for v in (0, 1, -1, 3, 2**31, 2**62, 2**63 - 1, -(2**63))] + [
        b"\xff" * 4,
        b"\x05",
        b"\x08",
    ]
    outcomes: Counter[str] = Counter()
    for rng in inputs("megatron", INPUTS // 3):
        data = bytearray(index)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice((rng.randrange(len(data)), *range(9, 34, 8), *range(34, len(data), 4)))
            word = rng.choice(words)
            data[at : at + len(word)] = word
        path.write_bytes(data[: len(index)] if rng.random() < 0.8 else data[: rng.randrange(len(data) + 1)])
        try:
            found = list(documents([str(path)]))
            outcomes["read"] += 1
        except InputError as error:
            assert "x.idx" in str(error) or "x.bin" in str(error)
            outcomes["refused"] += 1
            continue
        said = np.frombuffer(path.read_bytes(), "<i4", 3, 34)
        assert sum(part.size for d in found for part in d.parts) == said.sum(), "a token lost in silence"
    assert min(outcomes["read"], outcomes["refused"]) > 0, outcomes
