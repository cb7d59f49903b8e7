"""SRC to documents: every kind of file gives the same text, and what cannot be read says why."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from perilune.pretrain.data import source_jsonl
from perilune.pretrain.data.source_zstd import Zstd
from perilune.pretrain.data.sources import documents, find_files, held_out_bytes
from perilune.pretrain.errors import InputError

TEXTS = ["one\r\ntwo\n", "naïve 漢字 🙂\x00 NUL", " lead and trail "]


def lines() -> bytes:
    return "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)).encode() + b"\n\n"


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines()))
    two_frames = zstandard.compress(lines()[:40]) + zstandard.compress(lines()[40:])
    (tmp_path / "c.jsonl.zst").write_bytes(two_frames)
    table = pyarrow.table({"n": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"e{i}.txt").write_bytes(text.encode())
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    (tmp_path / "f-empty.md").write_bytes(b"")
    found = list(documents([str(tmp_path)]))
    assert [d.text for d in found] == TEXTS * 5
    assert len({d.source for d in found}) == len(found)
    assert [d.text for d in documents([str(tmp_path / "e*.txt")])] == TEXTS
    assert len(find_files([str(tmp_path), str(tmp_path / "a.jsonl")])) == len(find_files([str(tmp_path)])), "each once"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.txt", b"caf\xe9", "not UTF-8.*0xe9 at offset 3.*iconv"),
        ("x.jsonl", b'{"text": "ok"}\n{"text": 5}\n', r"x\.jsonl:2.*string `text`"),
        ("x.jsonl", b'{"body": "ok"}\n', r"\['body'\]"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
        ("x.jsonl", b"[" * 200_000, r"x\.jsonl:1: not a line of JSON"),
        ("x.jsonl.gz", gzip.compress(lines())[:-12], "cannot be unpacked"),
        ("x.jsonl.zst", b"not zstd", "cannot be unpacked"),
        ("x.jsonl.zst", zstandard.compress(lines())[:-3], "cannot be unpacked.*ends inside a zstd frame"),
        ("x.parquet", b"PAR1 no", "not a Parquet file"),
        ("x.docx", b"?", r"unknown ending; known are \.txt"),
    ],
)
def test_bad_input_names_the_file_and_the_rule(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        list(documents([str(tmp_path / name)]))


@pytest.mark.parametrize("spec", ["missing.txt", "none*.txt", "demo:other"])
def test_a_source_that_finds_nothing_is_an_error(tmp_path: Path, spec: str) -> None:
    with pytest.raises(InputError, match=r"no such file|no file matches|the demo sources are"):
        find_files([spec if ":" in spec else str(tmp_path / spec)])
    with pytest.raises(InputError, match="no file below"):
        find_files([str(tmp_path)])


def test_nothing_below_a_folder_is_left_out_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, away = tmp_path / "corpus", tmp_path / "away"
    for path in (folder / "own", away / "web", folder / "closed"):
        path.mkdir(parents=True)
    (folder / "own" / "a.txt").write_text("moon")
    (away / "web" / "b.txt").write_text("orbit")
    (folder / "web").symlink_to(away / "web")
    (folder / "web2").symlink_to(away / "web")
    found = list(documents([str(folder)]))
    assert [(document.source, document.text) for document in found] == [
        (f"{folder}/own/a.txt", "moon"),
        (f"{folder}/web/b.txt", "orbit"),
    ]
    scandir = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        with pytest.raises(InputError, match="corpus/closed: cannot be read: Permission denied"):
            list(documents([str(folder)]))
    (folder / "own" / "c.txt").symlink_to(tmp_path / "gone.txt")
    for spec in (folder, folder / "*" / "*.txt"):
        with pytest.raises(InputError, match=r"own/c.txt: a link that leads nowhere"):
            list(documents([str(spec)]))


def test_a_decompression_bomb_is_refused_before_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_jsonl, "MAX_DOCUMENT_BYTES", 1 << 16)
    bomb = b'{"text": "' + b"a" * (1 << 24) + b'"}\n'
    for name, data in {"x.jsonl.gz": gzip.compress(bomb), "x.jsonl.zst": zstandard.compress(bomb)}.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 1 << 16, "the packed file is within the limit"
        with pytest.raises(InputError, match=r"x\.jsonl.*:1: a line beyond the limit"):
            list(documents([str(tmp_path / name)]))


def test_zstd_cut_anywhere_is_never_a_shorter_file() -> None:
    """What `zstd` writes, with a checksum and without; whole frames end to end, one to be skipped among them."""
    text = lines() * 300
    for checksum in (False, True):
        frame = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=False).compress(text)
        for size in {*range(1, 20), *range(20, len(frame), 37), *range(len(frame) - 8, len(frame))}:
            with pytest.raises(EOFError):
                io.BufferedReader(Zstd(io.BytesIO(frame[:size]))).read()
        skipped = struct.pack("<II", 0x184D2A50, 5) + b"skip."
        assert io.BufferedReader(Zstd(io.BytesIO(frame + skipped + frame))).read() == text * 2


def test_the_standard_library_is_split_by_file() -> None:
    train = {d.source: d.text for d in documents(["demo:stdlib"], "train")}
    valid = {d.source: d.text for d in documents(["demo:stdlib"], "valid")}
    assert not train.keys() & valid.keys()
    assert {d.source for d in documents(["demo:stdlib"])} == train.keys() | valid.keys()
    assert 0.01 < len(valid) / len(train) < 0.12
    assert not any("/test/" in name or "site-packages" in name for name in train | valid)
    assert "stdlib/json/decoder.py" in train | valid
    assert held_out_bytes("demo:stdlib") == "".join(valid.values()).encode()


def test_valid_fraction_splits_by_text(corpus: str, texts: list[str]) -> None:
    train = [d.text for d in documents([corpus], "train", 0.2)]
    valid = [d.text for d in documents([corpus], "valid", 0.2)]
    assert sorted(train + valid) == sorted(texts) and not set(train) & set(valid)
    assert 0.12 < len(valid) / len(texts) < 0.28
