"""`demo:glyphs`: images of single characters and short words with their names, made on the fly without a network.

    demo:glyphs                         20,000 documents
    demo:glyphs:documents=5000          so many

One document in VALID_EVERY is held out. Training documents are pairs (image, caption) and, one in INTERLEAVED_EVERY,
two or three such pairs in one document. A character's caption is its Unicode name, a word's is `The word "moon".`

Every letter stands with every mark, if Unicode has a character for the two or not: one without is drawn from its parts,
and named as Unicode names the others, by letter and mark.

Held out by *combination*: a letter with a diacritic is its base letter, whichever case, and its combining mark (NFD).
Some of these pairs stand in no training document, in neither case and in no word, while their letter and their mark
each do with others; held-out documents show these alone. Whoever names them has put together what was never seen
together.

A document depends on nothing but its number and split, and on Pillow and matplotlib, whose fonts and rasteriser draw:
their versions stand in the dataset's recipe. Images are PNGs that are stored, not deflated, since libraries that
deflate agree neither between versions nor between processors.
"""

from __future__ import annotations

import hashlib
import random
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data.order import permute
from perilune.pretrain.data.source_file import SourceFile, Split
from perilune.pretrain.errors import InputError

GLYPHS = "demo:glyphs"
DOCUMENTS = 20_000
MIN_DOCUMENTS = 1_000  # every character is dealt at least once
VALID_EVERY = 20
INTERLEAVED_EVERY = 6
WORD_EVERY = 6
HELD_OUT_PART = 0.1  # of the combinations
KEPT_PARTNERS = 2  # combinations of each base and each mark that training keeps at least

SIDES = (56, 84)  # pixels: 4 to 9 tokens of 28 x 28
WORD_WIDTH = 16  # pixels a letter, at least
MARGIN = 2  # pixels of paper on each side
FILL = (0.85, 1.0)  # of the largest size that fits
INK, PAPER = (0, 110), (150, 255)  # of each of red, green and blue: any dark colour on any light one
CONTRAST = 4.5  # what WCAG 2.2 (1.4.3) asks of text
LEVELS = 16  # from paper to ink: four bits a pixel

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta",
)  # fmt: skip

# Drawn alone at an unknown size, c is C, and l is I: small letters are left to words, and zero for O, and the Greek and
# Cyrillic letters that look like Latin ones or like each other.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHERS = "23456789" + "ΓΔΘΛΞΠΣΦΨΩαβδζθλμξφψω" + "БДЖИЦШЭЮЯ" + "!?&@#%+=→←↑↓√∞∫♠♥♦♣£€§¶"
MARKS = (
    "\N{COMBINING GRAVE ACCENT}\N{COMBINING ACUTE ACCENT}\N{COMBINING CIRCUMFLEX ACCENT}\N{COMBINING TILDE}"
    "\N{COMBINING DIAERESIS}\N{COMBINING MACRON}\N{COMBINING CARON}\N{COMBINING RING ABOVE}\N{COMBINING DOT ABOVE}"
    "\N{COMBINING DOT BELOW}\N{COMBINING MACRON BELOW}\N{COMBINING OGONEK}"
)
_ABOVE, _BELOW = 230, 220  # combining classes (Unicode 4.3)
_GAP = 12  # of a font's size: between a letter and a mark that it is set with
UNLIKE_THEIR_NAME = "Ľ"  # fonts draw this caron as an apostrophe
WORDS = tuple(
    """moon sun star orbit comet earth mars night day sky light dark lamp fire ice snow rain wind cloud storm tree leaf
    root seed stone sand hill lake river ocean wave boat ship bird fish wolf bear horse sheep goat cat dog frog bee ant
    fox hen owl bread milk salt sugar rice soup apple plum pear grape lemon melon olive onion bean corn house door roof
    wall floor table chair bed book page word ink pen map road bridge gate wheel cart train plane hand foot head eye ear
    nose mouth heart blood bone skin red green blue black white brown grey pink one two three four five six seven ten
    north south east west up down left right café thé père mère fête rôle forêt île naïve déjà où ça señor niño año
    mañana über für grün schön hören Äpfel Öl Übung får på ål vår žena čaj šest ruža mąka ręka łódź źle być dům kůň můj
    ősz fű però vŕba
    """.split()
)


@dataclass(frozen=True)
class Picture:
    """What is drawn, before it is."""

    text: str  # NFC; a letter and a mark that have no character of their own are two
    caption: str
    font: str  # one of FONTS
    width: int  # pixels
    height: int
    fill: float  # of the largest size of the font that fits
    across: float  # place in the room that is left: 0 at the left, 1 at the right
    down: float
    ink: tuple[int, int, int]  # sRGB
    paper: tuple[int, int, int]


@dataclass(frozen=True)
class HeldOut:
    """A held-out document, for evaluation."""

    source: str
    image: bytes  # PNG
    caption: str  # expected
    character: str
    combination: tuple[str, str]  # small base letter, combining mark


def is_glyph_spec(spec: str) -> bool:
    """Whether a SRC means `demo:glyphs`, rightly written or not."""
    return spec.startswith(GLYPHS)


def parse_spec(spec: str) -> int:
    """Documents that a SRC `demo:glyphs[:documents=N]` asks for.

    Options stand after a colon, as `demo:` itself does: a `?` as in a URL's query is a pattern to a shell. Raises
    InputError for any other option, and for fewer than MIN_DOCUMENTS.
    """
    match = re.fullmatch(rf"{GLYPHS}(?::documents=([0-9]{{1,9}}))?", spec, re.ASCII)
    if not match:
        raise InputError(f"{spec}: write {GLYPHS} or {GLYPHS}:documents=N, as in {GLYPHS}:documents={DOCUMENTS}")
    documents = int(match[1] or DOCUMENTS)
    if documents < MIN_DOCUMENTS:
        raise InputError(
            f"{spec}: {documents} documents; ask for {MIN_DOCUMENTS} or more, so that each character is seen"
        )
    return documents


def glyph_files(spec: str) -> list[SourceFile]:
    """Two files that exist nowhere, one of each split, whose records `glyph_records` makes."""
    name = f"{GLYPHS}:documents={parse_spec(spec)}"
    _fonts()  # tells what is missing before any work
    splits: tuple[Split, ...] = ("train", "valid")
    return [SourceFile(f"{name}/{split}", f"{name}/{split}", split, spec) for split in splits]


def is_glyphs(file: SourceFile) -> bool:
    """Whether `glyph_files` made it."""
    return file.path.startswith(f"{GLYPHS}:")


def describe_glyphs(file: SourceFile) -> dict[str, Any]:
    """For a manifest: name, bytes of all images and captions, and the versions that decide what they are."""
    import matplotlib
    import PIL

    size = sum(len(part.encode()) if isinstance(part, str) else _png_bytes(part) for d in _plans(file) for part in d)
    version = {"matplotlib": matplotlib.__version__, "pillow": PIL.__version__}
    return {"name": file.name, "bytes": size, "version": version}


def glyph_records(file: SourceFile) -> Iterator[tuple[str, tuple[str | bytes, ...]]]:
    """(document id, its images and captions in order) of each document."""
    for number, plan in enumerate(_plans(file)):
        yield f"{file.name}:{number}", tuple(part if isinstance(part, str) else draw(part) for part in plan)


def held_out(spec: str = GLYPHS) -> Iterator[HeldOut]:
    """The held-out documents of `spec`, as packing puts them in `valid`."""
    file = glyph_files(spec)[1]
    for number, (picture, caption) in enumerate(_plans(file)):
        assert isinstance(picture, Picture) and isinstance(caption, str)
        pair = combination(picture.text)
        assert pair is not None
        yield HeldOut(f"{file.name}:{number}", draw(picture), caption, picture.text, pair)


def classes() -> list[str]:
    """The names of all characters that are drawn, held-out ones included, in one fixed order: for zero-shot
    classification. A class's name is the caption of its images."""
    return [name_of(character) for character in characters()]


def name_of(character: str) -> str:
    """Its Unicode name, or what Unicode would call a letter with a mark that has no character of its own."""
    if len(character) == 1:
        return unicodedata.name(character)
    letter, mark = tuple(character)
    return f"{unicodedata.name(letter)} WITH {_mark_names()[mark]}"


@cache
def _mark_names() -> dict[str, str]:
    """What stands after WITH in the names of letters with each of MARKS: not always the mark's own name."""
    found = {}
    for mark in MARKS:
        composed = (unicodedata.normalize("NFC", letter + mark) for letter in LETTERS)
        found[mark] = next(unicodedata.name(c).partition(" WITH ")[2] for c in composed if len(c) == 1)
    return found


@cache
def characters() -> tuple[str, ...]:
    """All characters that are drawn alone, in the order of their code points."""
    composed = {unicodedata.normalize("NFC", letter + mark) for letter in LETTERS for mark in MARKS}
    return tuple(sorted((composed - set(UNLIKE_THEIR_NAME)) | set(LETTERS + OTHERS)))


def combination(character: str) -> tuple[str, str] | None:
    """(small base letter, combining mark) of a letter with one diacritic; None for anything else."""
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isalpha() and unicodedata.combining(parts[1]):
        return parts[0].lower(), parts[1]
    return None


@cache
def held_out_combinations() -> frozenset[tuple[str, str]]:
    """The pairs that training never shows: in the order of their SHA-256, until they are HELD_OUT_PART of all, those
    whose base and whose mark each keep KEPT_PARTNERS other combinations."""
    pairs = {pair for pair in map(combination, characters()) if pair}
    kept = Counter(part for pair in pairs for part in pair)
    out: set[tuple[str, str]] = set()
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256("".join(pair).encode()).digest()):
        if len(out) < HELD_OUT_PART * len(pairs) and min(kept[part] for part in pair) > KEPT_PARTNERS:
            out.add(pair)
            kept.subtract(pair)
    return frozenset(out)


def is_held_out(text: str) -> bool:
    """Whether a letter of `text` with its mark is a held-out combination."""
    parts = unicodedata.normalize("NFD", text)
    return any((base.lower(), mark) in held_out_combinations() for base, mark in pairwise(parts))


def draw(picture: Picture) -> bytes:
    """The picture as a PNG of LEVELS colours between paper and ink."""
    from PIL import Image, ImageDraw

    room = picture.width - 2 * MARGIN, picture.height - 2 * MARGIN
    size = _largest(picture.text, picture.font, room) * picture.fill
    font = _font(picture.font, max(1, int(size)))
    strokes = _strokes(picture.text, font)
    left, top, right, bottom = _box(strokes, font)
    x = MARGIN + picture.across * max(0, room[0] - (right - left)) - left
    y = MARGIN + picture.down * max(0, room[1] - (bottom - top)) - top
    image = Image.new("L", (picture.width, picture.height))
    for text, dx, dy in strokes:
        ImageDraw.Draw(image).text((int(x) + dx, int(y) + dy), text, 255, font)
    return _png((np.asarray(image, np.uint16) * (LEVELS - 1) + 127) // 255, picture.paper, picture.ink)


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _plans(file: SourceFile) -> Iterator[list[Picture | str]]:
    """The documents of a file, their images not yet drawn."""
    name, _, split = file.path.rpartition("/")
    documents = parse_spec(name)
    held_out_ones = documents // VALID_EVERY
    shown = [c for c in characters() if is_held_out(c) == (split == "valid")]
    words = [word for word in WORDS if not is_held_out(word)]
    cards = _dealt(tuple(shown), split)
    for number in range(held_out_ones if split == "valid" else documents - held_out_ones):
        draws = _Draws(f"{split}/{number}")
        pictures: list[Picture] = []
        several = split == "train" and draws.one_in(INTERLEAVED_EVERY)
        for _ in range(draws.whole(2, 3) if several else 1):
            if split == "train" and draws.one_in(WORD_EVERY):
                text = draws.choice(words)
                pictures.append(_picture(draws, text, f'The word "{text}".'))
            else:
                text = next(cards)
                pictures.append(_picture(draws, text, name_of(text)))
        parts: list[Picture | str] = []
        for picture in pictures:
            parts += [picture, picture.caption if picture is pictures[-1] else picture.caption + "\n"]
        yield parts


def _dealt(shown: tuple[str, ...], split: str) -> Iterator[str]:
    """Characters without end, dealt like cards, a shuffled pack after the other, so that none is rare."""
    for deal in count():
        yield from (shown[card] for card in permute(np.arange(len(shown)), len(shown), GLYPHS, split, deal).tolist())


def _picture(draws: _Draws, text: str, caption: str) -> Picture:
    font = draws.choice(_fonts_of(text))
    least = SIDES[0] if text in characters() else max(SIDES[0], min(SIDES[1], WORD_WIDTH * len(text)))
    width, height = draws.whole(least, SIDES[1]), draws.whole(*SIDES)
    fill = FILL[0] + (FILL[1] - FILL[0]) * draws.part()
    across, down = draws.part(), draws.part()
    while True:
        ink, paper = draws.colour(*INK), draws.colour(*PAPER)
        if contrast(ink, paper) >= CONTRAST:
            return Picture(text, caption, font, width, height, fill, across, down, ink, paper)


class _Draws:
    """Draws that depend on `seed` alone; of `random`, only `random()` promises that in every version of Python."""

    def __init__(self, seed: str) -> None:
        self.part = random.Random(int.from_bytes(hashlib.sha256(f"{GLYPHS}/{seed}".encode()).digest())).random

    def whole(self, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int(self.part() * (high + 1 - low))

    def one_in(self, n: int) -> bool:
        return self.whole(1, n) == 1

    def choice[T](self, items: tuple[T, ...] | list[T]) -> T:
        return items[self.whole(0, len(items) - 1)]

    def colour(self, low: int, high: int) -> tuple[int, int, int]:
        return self.whole(low, high), self.whole(low, high), self.whole(low, high)


@cache
def _fonts() -> dict[str, tuple[Path, frozenset[int]]]:
    """Of each of FONTS: where it lies, and the code points that its cmap holds."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise InputError(
            f"{GLYPHS} draws with matplotlib's fonts: pip install -e '.[glyphs]' in the checkout"
        ) from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = {name: folder / f"{name}.ttf" for name in FONTS}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise InputError(f"{GLYPHS}: {folder} lacks {', '.join(missing)}; install matplotlib from its wheel")
    return {name: (path, frozenset(FT2Font(str(path)).get_charmap())) for name, path in paths.items()}


@cache
def _fonts_of(text: str) -> tuple[str, ...]:
    """The fonts that have every character of `text`."""
    needed = set(map(ord, text))
    return tuple(name for name, (_, has) in _fonts().items() if needed <= has)


@lru_cache(256)  # a face holds its file open
def _font(name: str, size: int) -> Any:
    from PIL import ImageFont

    # Pillow's own layout: Raqm, where it is installed, would place letters otherwise.
    return ImageFont.truetype(_fonts()[name][0], size, layout_engine=ImageFont.Layout.BASIC)


def _strokes(text: str, font: Any) -> list[tuple[str, int, int]]:
    """What is drawn for `text`: strings with their places, in pixels right and down of the text's own.

    A mark without a character of its own is set in the middle above or below its letter, an ogonek at the right end of
    its foot: as fonts draw the others. Layout engines would do it too, each in its way.
    """
    if len(text) != 2 or not (where := unicodedata.combining(text[1])):
        return [(text, 0, 0)]
    letter, mark = tuple(text)
    left, top, right, bottom = _ink(letter, font)
    mark_left, mark_top, mark_right, mark_bottom = _ink(mark, font)
    gap = font.size // _GAP
    across = (left + right - mark_left - mark_right) // 2
    if where == _ABOVE:
        return [(letter, 0, 0), (mark, across, top - gap - mark_bottom)]
    if where == _BELOW:
        return [(letter, 0, 0), (mark, across, bottom + gap - mark_top)]
    return [(letter, 0, 0), (mark, right - mark_right, bottom - mark_top)]  # an ogonek hangs on the letter


def _ink(text: str, font: Any) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the ink itself: `getbbox` reaches to the base line, which a mark does not."""
    mask, (dx, dy) = font.getmask2(text, "L")
    left, top, right, bottom = mask.getbbox()
    return left + dx, top + dy, right + dx, bottom + dy


def _box(strokes: list[tuple[str, int, int]], font: Any) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of their ink, in pixels."""
    if len(strokes) == 1:
        box: tuple[int, int, int, int] = font.getbbox(strokes[0][0])
        return box
    boxes = [(_ink(text, font), dx, dy) for text, dx, dy in strokes]
    return (
        min(box[0] + dx for box, dx, _ in boxes),
        min(box[1] + dy for box, _, dy in boxes),
        max(box[2] + dx for box, dx, _ in boxes),
        max(box[3] + dy for box, _, dy in boxes),
    )


def _largest(text: str, font: str, room: tuple[int, int]) -> int:
    """The largest size of the font at which `text` fits into `room` pixels (across, down)."""
    left, top, right, bottom = _box(_strokes(text, _font(font, 100)), _font(font, 100))
    size = max(1, int(min(room[0] / (right - left), room[1] / (bottom - top)) * 100))
    while size > 1:  # hinting rounds each letter to whole pixels
        left, top, right, bottom = _box(_strokes(text, _font(font, size)), _font(font, size))
        if right - left <= room[0] and bottom - top <= room[1]:
            break
        size -= 1
    return size


def _luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance, 0 to 1, of an sRGB colour (WCAG 2.2)."""
    red, green, blue = (_linear(value) for value in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@cache
def _linear(value: int) -> float:
    part = value / 255
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def _png(levels: np.ndarray, paper: tuple[int, int, int], ink: tuple[int, int, int]) -> bytes:
    """A PNG of a palette from paper (level 0) to ink; levels [height, width]."""
    height, width = levels.shape
    even = np.pad(levels, ((0, 0), (0, width % 2))).astype(np.uint8)
    rows = np.zeros((height, 1 + even.shape[1] // 2), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = even[:, ::2] << 4 | even[:, 1::2]
    raw, last = rows.tobytes(), LEVELS - 1
    palette = bytes((p * (last - i) + k * i) // last for i in range(LEVELS) for p, k in zip(paper, ink, strict=True))
    stored = struct.pack("<HBHH", 0x0178, 1, len(raw), len(raw) ^ 0xFFFF) + raw + struct.pack(">I", zlib.adler32(raw))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"IDAT", stored),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _png_bytes(picture: Picture) -> int:
    """The length of what `draw` gives."""
    raw = picture.height * (1 + (picture.width + 1) // 2)
    return 8 + 4 * 12 + 13 + 3 * LEVELS + raw + 11
