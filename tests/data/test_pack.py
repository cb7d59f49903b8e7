"""Packing: every document comes out whole, no token is padding, equal input gives equal bytes, anyone can read it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.pretrain.data import pack as module
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.pack_worker import Worker
from perilune.pretrain.data.packing import Limits, Piece, best_fit_decreasing, plan
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.spool import Spool
from perilune.pretrain.data.tokenizer import Tokenizer, train_tokenizer
from perilune.pretrain.errors import InputError


def test_stock_webdataset_reads_the_same_rows(packed: Path) -> None:
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    assert len(shards) > 2
    dataset = PackedDataset(packed)
    count = 0
    for i, sample in enumerate(webdataset.WebDataset(shards, shardshuffle=False).decode()):
        row = dataset[i]
        assert sample["__key__"] == row.key
        for name in ("tokens", "cu_seqlens", "loss_mask"):
            ours = getattr(row, name)
            assert sample[f"{name}.npy"].dtype == ours.dtype and np.array_equal(sample[f"{name}.npy"], ours)
        assert sample["docs.json"] == row.docs
        count += 1
    assert count == len(dataset)


def reassembled(path: Path) -> dict[int, list[int]]:
    """The documents of a dataset, put together from their pieces; repeats left out."""
    found: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for row in (dataset := PackedDataset(path)):
        for piece, begin, end in zip(row.docs, row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            assert piece["tokens"] == end - begin
            assert piece["continues"] == (piece["start"] > 0)
            assert piece["continued"] == (piece["start"] + piece["tokens"] < piece["of"])
            assert set(row.loss_mask[begin:end].tolist()) == {0 if piece["repeat"] else 1}
            assert piece["bytes"] == dataset.token_bytes[row.tokens[begin:end]].sum()
            if not piece["repeat"]:
                assert piece["start"] not in found[piece["doc"]], "a token that counts twice"
                found[piece["doc"]][piece["start"]] = row.tokens[begin:end].tolist()
    documents = {}
    for doc, pieces in found.items():
        documents[doc] = []
        for start in sorted(pieces):
            assert start == len(documents[doc])
            documents[doc] += pieces[start]
    return documents


@pytest.mark.parametrize("buffer_tokens", [1 << 25, 500, 0], ids=["one buffer", "many buffers", "globally"])
def test_every_document_comes_back_whole(
    tmp_path: Path, corpus: str, texts: list[str], tokenizer_path: Path, tokenizer: Tokenizer,
    buffer_tokens: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    stats = pack([corpus], tmp_path / "data", tokenizer_path, 48, shuffle_seed=3, buffer_tokens=buffer_tokens)["all"]
    expected = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    found = reassembled(tmp_path / "data")
    assert [found[i] for i in range(len(expected))] == expected
    assert stats["documents"] == len(texts) and stats["raw_bytes"] == sum(len(text.encode()) for text in texts)
    assert stats["tokens"] - stats["repeat_tokens"] == sum(map(len, expected)) and stats["repeat_tokens"] < 48
    dataset = PackedDataset(tmp_path / "data")
    assert len(dataset) * 48 == stats["tokens"]
    assert not any((row.tokens == tokenizer.pad_id).any() for row in dataset)
    pieces = sum(not piece["repeat"] for row in dataset for piece in row.docs)
    assert stats["splits"] == pieces - len(texts) >= stats["forced_splits"]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 200), max_size=80), st.integers(1, 64))
def test_plan_keeps_every_token_once_and_rows_are_full(lengths: list[int], seq_len: int) -> None:
    rows, still_open = plan([Piece(doc, 0, length) for doc, length in enumerate(lengths)], seq_len)
    assert len(still_open) <= 1
    rest = [piece for row in still_open for piece in row]
    assert all(sum(piece.length for piece in row) == seq_len for row in rows)
    assert sum(piece.length for piece in rest) < seq_len
    places = [(p.doc, p.start + i) for row in [*rows, rest] for p in row for i in range(p.length)]
    assert sorted(places) == [(doc, i) for doc, length in enumerate(lengths) for i in range(length)]


def test_few_documents_are_split() -> None:
    """Median 600, lognormal, rows of 8192: whole documents fill nearly everything (a cut at every row: 2407)."""
    lengths = np.random.default_rng(0).lognormal(np.log(600), 1, 20_000).astype(int) + 1
    rows, _ = plan([Piece(doc, 0, int(length)) for doc, length in enumerate(lengths)], 8192)
    splits = sum(piece.start > 0 for row in rows for piece in row)
    forced = int(((lengths - 1) // 8192).sum())
    assert splits - forced <= 0.15 * len(rows), f"{splits - forced} splits in {len(rows)} rows"
    _, still_open = best_fit_decreasing(
        [Piece(doc, 0, int(n % 8192 or 8192)) for doc, n in enumerate(lengths)], Limits(8192)
    )
    assert splits - forced <= len(still_open), "one split a row that best-fit decreasing left open, at most"
    room = sum(row.room for row in still_open[:-1])
    assert room <= 0.001 * lengths.sum(), f"{room} of {lengths.sum()} tokens of room before splitting"


def test_what_fits_is_not_split() -> None:
    lengths = [5, 4, 4, 3, 8, 16]
    rows, rest = plan([Piece(doc, 0, length) for doc, length in enumerate(lengths)], 8)
    assert sorted(sorted(piece.doc for piece in row) for row in rows) == [[0, 3], [1, 2], [4], [5], [5]] and not rest


def test_a_second_run_writes_the_same_bytes_or_nothing(tmp_path: Path, packed: Path, corpus: str, tokenizer_path: Path):
    pack([corpus], tmp_path / "again", tokenizer_path, 64, rows_per_shard=50)
    names = sorted(path.name for path in packed.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes(), name
    before = [path.stat().st_mtime_ns for path in sorted(packed.iterdir())]
    assert pack([corpus], packed, tokenizer_path, 64, rows_per_shard=50)["all"]["already_there"]
    assert [path.stat().st_mtime_ns for path in sorted(packed.iterdir())] == before
    with pytest.raises(InputError, match="with other seq_len; name another --out"):
        pack([corpus], packed, tokenizer_path, 32, rows_per_shard=50)


def test_a_run_cut_short_is_no_dataset_and_starts_again(
    tmp_path: Path, packed: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack([corpus], out, tokenizer_path, 64, rows_per_shard=10)
    with pytest.raises(InputError, match="cut short"):
        PackedDataset(out)
    pack([corpus], out, tokenizer_path, 64, rows_per_shard=50)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-000000.tar").write_text("someone's")
    with pytest.raises(InputError, match="not a packed dataset"):
        pack([corpus], tmp_path / "mine", tokenizer_path, 64)
    assert (tmp_path / "mine" / "shard-000000.tar").read_text() == "someone's"


def test_two_packings_do_not_write_to_one_folder(
    tmp_path: Path, packed: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, said = tmp_path / "data", Worker.write, list[str]()

    def meanwhile(*args: Any) -> dict[str, Any]:
        for seq_len in (32, 64):
            with pytest.raises(InputError) as caught:
                pack([corpus], out, tokenizer_path, seq_len, rows_per_shard=50, workers=1)
            said.append(str(caught.value))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "write", meanwhile)
        pack([corpus], out, tokenizer_path, 64, rows_per_shard=50, workers=1)
    assert set(said) == {f"another `perilune pack` is at work in {out}: wait for it, or name another --out"}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}


def test_a_dataset_inside_its_sources_folder_is_no_source(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    shutil.copy(corpus, tmp_path)
    out = tmp_path / "packed"

    def again() -> bool:
        return pack([str(tmp_path)], out, tokenizer_path, 64, rows_per_shard=50)["all"]["already_there"]

    assert not again()
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again()
    (out / "manifest.json").unlink()  # cut short
    (out / ".packing").mkdir()
    assert not again()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    with pytest.raises(
        InputError, match=r"holds the sources themselves, .*shard-000000\.tar first; name another --out"
    ):
        pack([str(out)], out, tokenizer_path, 64)
    with pytest.raises(InputError, match="give more text, or a larger --valid-fraction and another --out"):
        pack([corpus], tmp_path / "split", tokenizer_path, 64, valid_fraction=1e-9)


def test_a_system_that_does_not_tell_its_usable_cores(
    tmp_path: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert pack([corpus], tmp_path / "data", tokenizer_path, 64)["all"]["rows"] > 1


def test_the_folder_around_datasets_is_told_from_none(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    pack([corpus], tmp_path / "data", tokenizer_path, 64, valid_fraction=0.2)
    with pytest.raises(InputError, match=r"it holds \S*data/train, \S*data/valid: name one"):
        PackedDataset(tmp_path / "data")


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/data cannot be made: Not a directory; name another --out"):
        pack([corpus], tmp_path / "file" / "data", tokenizer_path, 64)
    with pytest.raises(InputError, match="file cannot be made: File exists; name another --out"):
        train_tokenizer([corpus], tmp_path / "file" / "tok", 400)


def test_a_full_disk_is_told_and_packing_goes_on(
    tmp_path: Path, packed: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "save_shard", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(InputError, match=r"data: packing stopped: .*No space left; the same command goes on"):
            pack([corpus], out, tokenizer_path, 64, rows_per_shard=50, workers=1)
    pack([corpus], out, tokenizer_path, 64, rows_per_shard=50)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}


def test_a_place_or_a_row_that_cannot_be(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match="--out s3:/bucket/data: shards are written to a folder here"):
        pack([corpus], Path("s3://bucket/data"), tokenizer_path, 64)
    with pytest.raises(InputError, match="--seq-len 2147483648: the limit is"):
        pack([corpus], tmp_path / "data", tokenizer_path, 1 << 31)


def test_held_out_documents(tmp_path: Path, corpus: str, texts: list[str], tokenizer_path: Path, tokenizer: Tokenizer):
    stats = pack([corpus], tmp_path / "data", tokenizer_path, 64, valid_fraction=0.1)
    assert stats["train"]["documents"] + stats["valid"]["documents"] == len(texts)
    decoded = [[tokenizer.decode(ids[:-1]) for ids in reassembled(tmp_path / "data" / s).values()] for s in stats]
    assert sorted(decoded[0] + decoded[1]) == sorted(texts) and not set(decoded[0]) & set(decoded[1])


def test_less_than_a_row_of_text(tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("orbit")
    (tmp_path / "b.txt").write_text("lune")
    stats = pack([str(tmp_path / "*.txt")], tmp_path / "data", tokenizer_path, 64)["all"]
    row = PackedDataset(tmp_path / "data")[0]
    assert stats["rows"] == 1 and stats["repeat_tokens"] == 64 - int(row.loss_mask.sum())
    assert tokenizer.decode(row.tokens).startswith("orbit<|eos|>lune<|eos|>orbit<|eos|>lune<|eos|>orbit")
    assert [piece["repeat"] for piece in row.docs][:3] == [False, False, True]
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(InputError, match="no document"):
        pack([str(tmp_path / "*.txt")], tmp_path / "none", tokenizer_path, 64)


def test_the_manifest_says_from_what_and_where(packed: Path, corpus: str) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    assert [file["name"] for file in manifest["recipe"]["files"]] == [corpus]
    assert manifest["format_version"] == 2 and manifest["tokens"] == manifest["rows"] * 64
    shard = manifest["shards"][1]
    sample = dict(zip(manifest["sample_fields"], shard["samples"][3], strict=True))
    data = (packed / shard["name"]).read_bytes()
    assert len(data) == shard["bytes"] and data[sample["offset"] :].startswith(f"{sample['key']}.tokens.npy".encode())
