"""Packing of images, of given tokens and for filling in the middle: every part of every document, once, in order."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perilune.pretrain.data import pack as packing
from perilune.pretrain.data.inspect_verify import verify
from perilune.pretrain.data.manifest import image_rule, read_manifest
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.packing import Piece, Span, chunks, plan
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.storage import open_store
from perilune.pretrain.data.tokenizer import FIM, MEDIA, Tokenizer
from perilune.pretrain.errors import InputError

SIZES = [(28, 28), (60, 40), (200, 100), (90, 300), (30, 30)]


def image(number: int, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(out, ["PNG", "JPEG", "WEBP"][number % 3])
    return out.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[list[str], list[list[str | bytes]]]:
    """Sources of pairs, interleaved documents and text, and what their documents hold."""
    folder = tmp_path_factory.mktemp("mixed")
    expected: list[list[str | bytes]] = []
    with tarfile.open(folder / "a.tar", "w") as out:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))

        for i in range(60):
            text = texts[i]
            if i % 3:
                add(f"{i:03d}.png", image(i, SIZES[i % 5]))
                add(f"{i:03d}.txt", text.encode())
                expected.append([image(i, SIZES[i % 5]), text])
            else:
                images = [image(1000 + i + j, SIZES[(i + j) % 5]) for j in range(1 + i % 4)]
                for j, data in enumerate(images):
                    add(f"{i:03d}.{j}.png", data)
                places = [f"{j}.png" for j in range(len(images))]
                lists = {"texts": [text, *[None] * len(images)], "images": [None, *places]}
                add(f"{i:03d}.json", json.dumps(lists).encode())
                expected.append([text, *images])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:300]))
    expected += [[text] for text in texts[60:300]]
    return [str(folder / "a.tar"), str(folder / "b.jsonl")], expected


def parts_of(dataset: PackedDataset, coder: Tokenizer) -> dict[int, list[str | bytes]]:
    """The documents again, from the rows alone: their texts and the bytes of their images in order."""
    start, content, end, pad = (coder.inner.token_to_id(name) for name in MEDIA)
    word = coder.encode_batch(["image"])[0].tolist()
    found: dict[int, dict[int, list[str | bytes]]] = defaultdict(dict)
    for row in dataset:
        at = {i.start: i for i in row.images}
        for piece, begin, stop in zip(row.docs, row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
            out: list[str | bytes] = []
            place = begin
            run: list[int] = []
            while place < stop:
                if row.tokens[place] == start:
                    out += [coder.decode(run)] if run else []
                    run = []
                    head = [start, *word, content]
                    assert row.tokens[place : place + len(head)].tolist() == head
                    held = at.pop(place + len(head))
                    after = place + len(head) + held.tokens
                    assert (row.tokens[after - held.tokens : after] == pad).all() and row.tokens[after] == end
                    assert not row.loss_mask[place : after + 1].any(), "an image is not predicted"
                    out.append(held.data)
                    place = after + 1
                else:
                    assert row.loss_mask[place] == (not piece["repeat"])
                    run.append(int(row.tokens[place]))
                    place += 1
            out += [coder.decode(run)] if run else []
            if not piece["repeat"]:
                found[piece["doc"]][piece["start"]] = out
        assert not at, "an image without its marks"
    documents = {}
    for doc, pieces in found.items():
        joined: list[str | bytes] = []
        for start_at in sorted(pieces):
            for part in pieces[start_at]:
                if joined and isinstance(part, str) and isinstance(joined[-1], str):
                    joined[-1] += part
                else:
                    joined.append(part)
        documents[doc] = joined
    return documents


@pytest.mark.parametrize(("max_patches", "buffer_tokens"), [(None, 0), (400, 0), (250, 2000)])
def test_documents_with_images_come_back_whole(
    tmp_path: Path, mixed: tuple[list[str], list[list[str | bytes]]], tokenizer_path: Path, tokenizer: Tokenizer,
    max_patches: int | None, buffer_tokens: int,
) -> None:  # fmt: skip
    specs, expected = mixed
    options = {"max_patches": max_patches, "buffer_tokens": buffer_tokens, "patch_limit": 240, "shuffle_seed": 5}
    stats = pack(specs, tmp_path / "data", tokenizer_path, 256, rows_per_shard=9, **options)["all"]  # type: ignore
    dataset = PackedDataset(tmp_path / "data")
    found = parts_of(dataset, tokenizer)
    ending = "<|eos|>"
    for doc, parts in enumerate(expected):
        closed = [*parts[:-1], parts[-1] + ending] if isinstance(parts[-1], str) else [*parts, ending]
        assert found[doc] == closed, f"document {doc}"
    assert len(found) == len(expected) == stats["documents"]
    patches = [sum(i.grid[0] * i.grid[1] for i in row.images) for row in dataset]
    assert sum(patches) == stats["patches"] and max(patches) <= (max_patches or max(patches))
    images = [part for parts in expected for part in parts if isinstance(part, bytes)]
    assert stats["images"] == len(images) and stats["image_bytes"] == sum(map(len, images))
    assert stats["raw_bytes"] == sum(
        len(part.encode()) for parts in expected for part in parts if isinstance(part, str)
    )
    rule = image_rule(read_manifest(tmp_path / "data"))
    assert rule is not None and rule.patch_limit == 240
    assert {spec: counts["documents"] for spec, counts in stats["sources"].items()} == {specs[0]: 60, specs[1]: 240}


def test_images_alone_fill_rows_too(tmp_path: Path, tokenizer_path: Path) -> None:
    """No text but EOS: what room images leave is filled by repeats of it, masked."""
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for i in range(5):
            for ending, data in (("png", image(i, (100, 100))), ("txt", b"")):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    stats = pack([str(tmp_path / "x.tar")], tmp_path / "data", tokenizer_path, 48)["all"]
    dataset = PackedDataset(tmp_path / "data")
    assert stats["images"] == 5 == sum(len(row.images) for row in dataset)
    assert sum(int(row.loss_mask.sum()) for row in dataset) == 5, "the five EOS"


def test_rows_whose_patches_run_out_do_not_fill_the_buffer(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs alone, a row takes one image: open rows wait for text that never comes, and each plan sees new ones."""
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for i in range(60):
            for ending, data in (("png", image(i, (100, 100))), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{i:02d}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    planned = []
    monkeypatch.setattr(packing, "plan", lambda *given: planned.append(len(given[0])) or plan(*given))
    spec, out = [str(tmp_path / "x.tar")], tmp_path / "data"
    stats = pack(spec, out, tokenizer_path, 64, max_patches=80, buffer_tokens=500)["all"]
    assert len(planned) <= stats["document_tokens"] // 250 + 2 and max(planned) < 30, planned
    assert stats["images"] == 60 == sum(len(row.images) for row in PackedDataset(out))
    assert not verify(read_manifest(out), open_store(out)).damage, "no token lost, none counted twice"


def test_an_image_that_fits_no_row_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        info = tarfile.TarInfo("k.png")
        data = image(0, (280, 280))
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
        out.addfile(tarfile.TarInfo("k.txt"))
    spec = [str(tmp_path / "x.tar")]
    with pytest.raises(InputError, match=r"x\.tar:k: an image of 280 x 280 pixels takes 1\d\d tokens and 400 patches"):
        pack(spec, tmp_path / "data", tokenizer_path, 64)
    with pytest.raises(InputError, match=r"a row has 512 tokens and 300 patches\. Raise --seq-len or"):
        pack(spec, tmp_path / "data", tokenizer_path, 512, max_patches=300)
    assert pack(spec, tmp_path / "data", tokenizer_path, 64, patch_limit=100)["all"]["images"] == 1


def test_the_room_that_images_leave_is_below_a_thousandth() -> None:
    """Lognormal lengths, median 600, rows of 8192, every third document with an image of 64 to 1100 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(600), 1, 20_000).astype(int) + 1
    spans = {}
    for doc in range(0, len(lengths), 3):
        size = int(rng.integers(64, 1100))
        start = int(rng.integers(0, lengths[doc]))
        spans[doc] = [Span(start, start + size, 4 * size)]
        lengths[doc] += size
    rows, still_open = plan([Piece(doc, 0, int(n)) for doc, n in enumerate(lengths)], 8192, spans, 16384)
    room = sum(8192 - sum(piece.length for piece in row) for row in still_open)
    assert room <= 0.001 * lengths.sum()
    forced = sum(len(chunks(Piece(doc, 0, int(n)), 8192, spans, 16384)) - 1 for doc, n in enumerate(lengths))
    splits = sum(piece.start > 0 for row in [*rows, *still_open] for piece in row) - forced
    assert splits <= 0.25 * len(rows), f"{splits} splits in {len(rows)} rows"


@st.composite
def documents_with_images(draw: st.DrawFn) -> tuple[list[int], dict[int, list[Span]]]:
    lengths, spans = [], {}
    for doc in range(draw(st.integers(0, 30))):
        at, held = 0, []
        for _ in range(draw(st.integers(0, 4))):
            at += draw(st.integers(0, 20))
            size = draw(st.integers(1, 16))
            held.append(Span(at, at + size, draw(st.integers(1, 8))))
            at += size
        lengths.append(at + draw(st.integers(1, 40)))
        if held:
            spans[doc] = held
    return lengths, spans


@settings(deadline=None, max_examples=200)
@given(documents_with_images(), st.integers(16, 40), st.one_of(st.none(), st.integers(8, 20)))
def test_plan_cuts_no_image_and_keeps_every_token(
    documents: tuple[list[int], dict[int, list[Span]]], seq_len: int, max_patches: int | None
) -> None:
    lengths, spans = documents
    rows, still_open = plan([Piece(d, 0, n) for d, n in enumerate(lengths)], seq_len, spans, max_patches)
    assert all(sum(piece.length for piece in row) == seq_len for row in rows)
    assert all(0 < sum(piece.length for piece in row) < seq_len for row in still_open)
    places = sorted(piece for row in [*rows, *still_open] for piece in row)
    ends = {doc: 0 for doc in range(len(lengths))}
    for doc, start, length in places:
        assert start == ends[doc] and length > 0
        ends[doc] = start + length
    assert list(ends.values()) == lengths
    for row in [*rows, *still_open]:
        patches = 0
        for doc, start, length in row:
            for span in spans.get(doc, []):
                inside = start <= span.start and span.end <= start + length
                assert inside or span.end <= start or start + length <= span.start, "an image is cut"
                patches += span.patches if inside else 0
        assert max_patches is None or patches <= max_patches


def test_fill_in_the_middle(
    tmp_path: Path, corpus: str, texts: list[str], tokenizer_path: Path, tokenizer: Tokenizer
) -> None:
    stats = pack([corpus], tmp_path / "data", tokenizer_path, 64, fim_rate=0.3, valid_fraction=0.2)
    assert stats["valid"]["fim_documents"] == 0
    rearranged = 0
    found = parts_of(PackedDataset(tmp_path / "data" / "train"), tokenizer)
    left = sorted(texts)
    prefix, middle, suffix = FIM
    for parts in found.values():
        text = str(parts[0]).removesuffix("<|eos|>")
        if text.startswith(prefix):
            rearranged += 1
            before, _, rest = text.removeprefix(prefix).partition(suffix)
            after, _, between = rest.partition(middle)
            text = before + between + after
        left.remove(text)
    assert rearranged == stats["train"]["fim_documents"]
    assert 0.2 < rearranged / stats["train"]["documents"] < 0.4
    again = pack([corpus], tmp_path / "again", tokenizer_path, 64, fim_rate=0.3, valid_fraction=0.2)
    assert again["train"]["fim_documents"] == rearranged
    shards = [(tmp_path / name / "train" / "shard-000000.tar").read_bytes() for name in ("data", "again")]
    assert shards[0] == shards[1]


def test_marks_that_the_vocabulary_lacks(
    tmp_path: Path, corpus: str, mixed: tuple[list[str], list[list[str | bytes]]], tokenizer_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tokenizer_path / name).read_text()
        for mark in (*FIM, *MEDIA):
            text = text.replace(mark, mark.replace("|", "!"))
        (bare / name).write_text(text)
    with pytest.raises(InputError, match=r"fim_prefix\|>.*which this vocabulary lacks; use --fim-rate 0"):
        pack([corpus], tmp_path / "data", bare, 64, fim_rate=0.1)
    with pytest.raises(InputError, match=r"images need the tokens <\|media_start\|>"):
        pack(mixed[0], tmp_path / "data", bare, 256)
    deepseek = (tokenizer_path / "tokenizer.json").read_text()
    for ours, theirs in zip(FIM, ("begin", "end", "hole"), strict=True):
        deepseek = deepseek.replace(ours, f"<｜fim▁{theirs}｜>")
    (bare / "tokenizer.json").write_text(deepseek)
    assert pack([corpus], tmp_path / "data", bare, 64, fim_rate=0.1)["all"]["fim_documents"] > 10


def test_given_tokens_stay_as_they_are(tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    from perilune.pretrain.data.source_tokens import MAGIC

    def write(docs: list[list[int]]) -> str:
        ids = np.array([i for doc in docs for i in doc], "<u2")
        lengths = np.array([len(doc) for doc in docs], "<i4")
        places = np.cumsum([0, *lengths[:-1]]) * 2
        head = MAGIC + (1).to_bytes(8, "little") + bytes([8])
        head += len(docs).to_bytes(8, "little") + (len(docs) + 1).to_bytes(8, "little")
        bounds = np.arange(len(docs) + 1, dtype="<i8")
        (tmp_path / "x.idx").write_bytes(head + lengths.tobytes() + places.astype("<i8").tobytes() + bounds.tobytes())
        (tmp_path / "x.bin").write_bytes(ids.tobytes())
        return str(tmp_path / "x.idx")

    docs = [tokenizer.encode_batch([f"lunar orbit {i}"])[0].tolist() for i in range(20)]
    docs[3].append(tokenizer.eos_id)
    pack([write([*docs, []])], tmp_path / "data", tokenizer_path, 32)
    found = parts_of(PackedDataset(tmp_path / "data"), tokenizer)
    assert [parts[0] for _, parts in sorted(found.items())] == [f"lunar orbit {i}<|eos|>" for i in range(20)]
    with pytest.raises(InputError, match=r"x\.idx:1: ids from 5 to 400; the vocabulary .* has 400"):
        pack([write([[5], [5, 400]])], tmp_path / "other", tokenizer_path, 32)
    with pytest.raises(InputError, match="stands for an image, without one"):
        pack([write([[5, tokenizer.media_ids()[3]]])], tmp_path / "other", tokenizer_path, 32)
