"""`demo:glyphs`: what it draws, what it holds out, and that the same name gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from perilune.pretrain.data import demo_glyphs
from perilune.pretrain.data.demo_glyphs import Picture, classes, contrast, draw, held_out
from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.sources import Document, describe, documents, find_files, has_held_out_files, read_placed
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError

SPEC = "demo:glyphs:documents=1000"
MARKS_NAMED_OTHERWISE = {
    "LINE BELOW": "COMBINING MACRON BELOW",
}


@pytest.fixture(scope="module")
def train() -> list[Document]:
    return list(documents([SPEC], "train"))


@pytest.fixture(scope="module")
def valid() -> list[Document]:
    return list(documents([SPEC], "valid"))


def drawn(caption: str) -> str:
    """What a caption says is drawn: the word, or the character of that name."""
    word = re.fullmatch(r'The word "(\w+)"\.', caption)
    return word[1] if word else named(caption)


def named(caption: str) -> str:
    """The character of that name, or the letter and the mark that have none for both."""
    try:
        return unicodedata.lookup(caption)
    except KeyError:
        letter, _, mark = caption.partition(" WITH ")
        for name in (f"COMBINING {mark} ACCENT", f"COMBINING {mark}", MARKS_NAMED_OTHERWISE.get(mark, "")):
            try:
                return unicodedata.lookup(letter) + unicodedata.lookup(name)
            except KeyError:
                continue
        raise


def pairs(document: Document) -> list[tuple[bytes, str]]:
    images, captions = document.parts[::2], document.parts[1::2]
    assert len(images) == len(captions)
    out = []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        assert isinstance(image, bytes) and isinstance(caption, str)
        assert caption.endswith("\n") == (i < len(captions) - 1)
        out.append((image, caption.removesuffix("\n")))
    return out


def taken_apart(text: str) -> set[tuple[str, str]]:
    """(base letter in lower case, mark) of every letter with a mark."""
    parts = unicodedata.normalize("NFD", text)
    return {(a.lower(), b) for a, b in pairwise(parts) if unicodedata.combining(b)}


def test_no_held_out_combination_stands_in_training(train: list[Document], valid: list[Document]) -> None:
    """In neither case and in no word, while its letter and its mark do, with others."""
    seen = {pair for document in train for _, caption in pairs(document) for pair in taken_apart(drawn(caption))}
    unseen = {pair for document in valid for _, caption in pairs(document) for pair in taken_apart(drawn(caption))}
    assert seen and unseen and not seen & unseen
    assert {base for base, _ in unseen} <= {base for base, _ in seen}
    assert {mark for _, mark in unseen} <= {mark for _, mark in seen}
    assert 0.08 < len(unseen) / len(seen | unseen) < 0.12
    assert all(len(pairs(document)) == 1 for document in valid)
    words = {drawn(caption) for document in train for _, caption in pairs(document) if caption.startswith("The word")}
    left_out = {word for word in demo_glyphs.WORDS if taken_apart(word) & unseen}
    assert left_out and words <= set(demo_glyphs.WORDS) - left_out and any(map(taken_apart, words))


def test_every_character_is_seen(train: list[Document]) -> None:
    """From the least number of documents on, and none much more often than another."""
    often = Counter(drawn(caption) for document in train for _, caption in pairs(document))
    single = {text: n for text, n in often.items() if text not in demo_glyphs.WORDS}
    unseen = {c for c in map(named, classes()) if c not in single}
    assert unseen == {one.character for one in held_out("demo:glyphs:documents=4000")}
    assert max(single.values()) <= min(single.values()) + 1
    assert 0.1 < sum(n for text, n in often.items() if text in demo_glyphs.WORDS) / sum(often.values()) < 0.25
    several = [len(pairs(document)) for document in train if len(document.parts) > 2]
    assert set(several) == {2, 3} and 0.1 < len(several) / len(train) < 0.25


def test_the_rule_of_what_is_held_out() -> None:
    """As it is told: in the order of SHA-256, a tenth, letters and marks keeping two others each."""
    every = {pair for name in classes() for pair in taken_apart(named(name))}
    order = sorted(every, key=lambda pair: hashlib.sha256("".join(pair).encode()).hexdigest())
    out: list[tuple[str, str]] = []
    for base, mark in order:
        rest = every - set(out) - {(base, mark)}
        enough = sum(b == base for b, _ in rest) >= 2 and sum(m == mark for _, m in rest) >= 2
        if enough and len(out) < 0.1 * len(every):
            out.append((base, mark))
    assert demo_glyphs.held_out_combinations() == set(out)


def test_evaluation_sees_what_is_packed(valid: list[Document]) -> None:
    ones = list(held_out(SPEC))
    assert [(one.source, (one.image, one.caption)) for one in ones] == [(d.source, d.parts) for d in valid]
    for one in ones:
        assert one.character == named(one.caption) and {one.combination} == taken_apart(one.character)
        assert one.caption in classes() and one.combination in demo_glyphs.held_out_combinations()
    assert len(set(classes())) == len(classes()) > 300


def test_fonts_have_what_they_draw() -> None:
    """By fontTools' reading of their cmap: of all pictures of a run, words letter by letter."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    has = {name: set(TTFont(folder / f"{name}.ttf", lazy=True).getBestCmap()) for name in demo_glyphs.FONTS}
    used = set()
    for file in find_files([SPEC]):
        for plan in demo_glyphs._plans(file):
            for picture in plan:
                if isinstance(picture, Picture):
                    assert set(map(ord, picture.text)) <= has[picture.font], picture
                    used.add(picture.font)
    assert used == set(demo_glyphs.FONTS)


def test_pictures_are_sound(train: list[Document]) -> None:
    """Their sides, ink that contrasts with the paper, stands free of the edge, and fills what it may."""
    sides, colours, corners = set(), set(), set()
    for data, _ in [pair for document in train[:300] for pair in pairs(document)]:
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG"
            paper, *_, ink = np.array(image.getpalette("RGB")).reshape(-1, 3)[:16].tolist()
            levels = np.asarray(image)
            width, height = image.size
        assert 56 <= width <= 84 and 56 <= height <= 84
        down, across = np.nonzero(levels)
        box = down.min(), height - 1 - down.max(), across.min(), width - 1 - across.max()
        assert min(box) >= 1 and levels.max() >= 12, "whole and visible"
        filled = max((down.max() + 1 - down.min()) / (height - 4), (across.max() + 1 - across.min()) / (width - 4))
        assert filled > 0.4, "a letter's own room on its sides counts as the letter"
        assert contrast(tuple(ink), tuple(paper)) >= 4.5
        sides.add((width, height))
        colours.add(tuple(ink))
        corners.add((box[0] > box[1], box[2] > box[3]))
    assert len(sides) > 200 and len(colours) > 250 and len(corners) == 4


def test_contrast_of_published_examples() -> None:
    """Of WCAG: black on white is 21; #767676 is the lightest grey on white that reaches 4.5."""
    white = (255, 255, 255)
    assert contrast((0, 0, 0), white) == pytest.approx(21)
    assert contrast((0x76,) * 3, white) >= 4.5 > contrast((0x77,) * 3, white)


@pytest.mark.parametrize("width", [28, 29, 111, 112])
def test_the_png_is_what_pillow_draws(width: int) -> None:
    """Any width, read by Pillow, beside the same letter drawn in grey without ours."""
    from PIL import ImageDraw, ImageFont

    picture = Picture("é", "", "DejaVuSans", width, 50, 1.0, 0.0, 0.0, (0, 0, 0), (255, 255, 255))
    with Image.open(io.BytesIO(draw(picture))) as image:
        found = np.asarray(image.convert("L")).astype(int)
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    sizes = []
    for size in range(8, 80):
        font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = font.getbbox("é")
        if right - left > width - 4 or bottom - top > 46:
            continue
        wanted = Image.new("L", (width, 50), 255)
        ImageDraw.Draw(wanted).text((2 - left, 2 - top), "é", 0, font)
        if np.abs(np.asarray(wanted).astype(int) - found).max() <= 9:  # sixteen levels of grey
            sizes.append(size)
        largest = size
    assert sizes and sizes[-1] >= largest - 1


def test_the_same_name_gives_the_same_bytes(train: list[Document]) -> None:
    """In another process too; the length of all of it is told beforehand, and a place gives the rest."""
    code = (
        "import hashlib; from perilune.pretrain.data.sources import documents; digest = hashlib.sha256()\n"
        f"for d in documents(['{SPEC}'], 'train'):\n"
        "    for part in d.parts: digest.update(part.encode() if isinstance(part, str) else part)\n"
        "print(digest.hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = [part.encode() if isinstance(part, str) else part for d in train for part in d.parts]
    assert isinstance(parts[0], bytes) and hashlib.sha256(b"".join(parts)).hexdigest() == other.stdout.strip()
    files = find_files([SPEC])
    assert describe(files[0])["bytes"] == sum(map(len, parts))
    placed = list(read_placed(files, "train", 0.0, (0, 940)))
    assert [d for _, _, d in placed] == train[940:] and placed[0][1] == 941


def test_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.name for f in find_files(["demo:glyphs", "demo:glyphs:documents=20000"])] == [
        "demo:glyphs:documents=20000/train",
        "demo:glyphs:documents=20000/valid",
    ]
    assert has_held_out_files(["x.txt", SPEC]) and not has_held_out_files(["x.txt"])
    for spec in ("demo:glyphs?documents=5", "demo:glyphs:documents=-1", "demo:glyphs:seed=1", "demo:glyphs2"):
        with pytest.raises(InputError, match="write demo:glyphs or demo:glyphs:documents=N"):
            find_files([spec])
    with pytest.raises(InputError, match="999 documents; ask for 1000 or more"):
        find_files(["demo:glyphs:documents=999"])
    demo_glyphs._fonts.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[glyphs\]'"):
        find_files([SPEC])


def test_packed_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same shards by one worker and by two; every image in them once, of the size it says, and inspect agrees."""
    tokenizer = train_tokenizer([SPEC], tmp_path / "tok", 700)
    for workers in (1, 2):
        done = pack([SPEC], tmp_path / f"{workers}", tokenizer, 256, rows_per_shard=40, workers=workers)
        assert set(done) == {"train", "valid"} and done["valid"]["documents"] == 50
    one, two = (
        {p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()}
        for r in (tmp_path / "1", tmp_path / "2")
    )
    assert len(one) > 6 and one == two
    for split in ("train", "valid"):
        folder = tmp_path / "1" / split
        wanted = [part for d in documents([SPEC], split) for part in d.parts if isinstance(part, bytes)]
        dataset = PackedDataset(folder)
        found = [image for row in dataset for image in row.images]
        dataset.close()
        assert Counter(image.data for image in found) == Counter(wanted)
        for image in found:
            width, height = Image.open(io.BytesIO(image.data)).size
            assert image.grid == (2 * -(-height // 28), 2 * -(-width // 28)) and 1 <= image.tokens <= 16
        assert inspect_command(str(folder), check=True, as_json=True) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["verified"]["damage"] == [] and told["packing"]["images"] == len(wanted)
