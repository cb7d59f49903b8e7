"""The page on a row with images in a real browser: pictures, patches and merge cells stand where they say."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import needs_browser, open_browser, requests, show
from PIL import Image

from perilune.pretrain.data import inspect_pictures
from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.shard import Row, RowImage
from perilune.vision.image_header import ImageRule

RULE = ImageRule(placeholder_id=7, patch_limit=4096)
RED, BLUE = (210, 30, 30), (20, 40, 220)


def two_colours(width: int, height: int, kind: str, orientation: int = 1) -> bytes:
    """Left half red, right half blue, as stored."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    return out.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """One row: an image of 56 x 30 pixels, and one of 70 x 30 that EXIF turns right once."""
    folder = tmp_path_factory.mktemp("pictures")
    members = {
        "a.json": json.dumps(
            {"texts": ["one ", None, " two ", None], "images": [None, "0.png", None, "1.jpg"]}
        ).encode(),
        "a.0.png": two_colours(56, 30, "PNG"),
        "a.1.jpg": two_colours(70, 30, "JPEG", orientation=6),
    }
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pack([str(folder / "a.tar")], folder / "data", tokenizer_path, 64)
    return folder / "data"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def page_of(dataset: Path, file: Path) -> Path:
    inspect_command(str(dataset), sample=0, html=True, out=file, as_json=True)
    return file


@needs_browser
def test_pictures_patches_and_cells_are_drawn(browser: Any, dataset: Path, tmp_path: Path) -> None:
    file = page_of(dataset, tmp_path / "page.html")
    show(browser, file)
    row = PackedDataset(dataset)[0]
    assert [image.grid for image in row.images] == [(4, 4), (6, 4)]
    captions = [each.text for each in browser.find_elements("css selector", ".picture figcaption")]
    assert "image 0: 4 x 4 patches; 56 x 30 pixels, png" in captions[0]
    assert "image 1: 6 x 4 patches; 70 x 30 pixels, jpg, turned to 30 x 70" in captions[1]
    size = row.tokens.size
    places = browser.find_elements("css selector", ".places i")
    strip = browser.find_element("css selector", ".places").rect
    for image, caption, place in zip(row.images, captions, places, strict=True):
        assert f"tokens [{image.start}, {image.start + image.tokens}) in piece 1 of" in caption
        assert place.rect["x"] - strip["x"] == pytest.approx(strip["width"] * image.start / size, abs=1.5)
        assert place.rect["width"] == pytest.approx(strip["width"] * image.tokens / size, abs=1.5)
    for number, (figure, image) in enumerate(
        zip(browser.find_elements("css selector", ".picture"), row.images, strict=True)
    ):
        cells = figure.find_elements("css selector", ".cell")
        told = [cell.find_element("css selector", "title").get_attribute("textContent") for cell in cells]
        assert told == [f"token {image.start + n}" for n in range(image.tokens)]
        drawing = figure.find_element("css selector", "svg")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawing)
        unit = drawing.rect["width"] / (image.grid[1] / 2)
        assert [cells[-1].rect[side] for side in ("width", "height")] == pytest.approx([unit, unit], abs=0.5)
        shot = np.asarray(Image.open(io.BytesIO(drawing.screenshot_as_png)).convert("RGB")).astype(int)
        assert shot.shape[0] / shot.shape[1] == pytest.approx(image.grid[0] / image.grid[1], rel=0.02)

        def at(
            x: float, y: float, shot: np.ndarray = shot, scale: float = shot.shape[1] / image.grid[1] / 14
        ) -> list[int]:
            return shot[round(y * scale), round(x * scale)].tolist()

        if number == 0:
            spots = {(7, 7): RED, (49, 7): BLUE, (7, 50): (0, 0, 0)}
        else:  # the stored left is up, once turned
            spots = {(7, 7): RED, (7, 63): BLUE, (50, 7): (0, 0, 0), (7, 80): (0, 0, 0)}
        for (x, y), colour in spots.items():
            assert at(x, y) == pytest.approx(colour, abs=6), (number, x, y)
        assert np.abs(np.subtract(at(28, 7), at(24, 7))).sum() > 40, "a line between merge cells"
        assert np.abs(np.subtract(at(14, 7), at(10, 7))).sum() > 40, "a line between patches"
    assert browser.get_log("browser") == [] and requests(browser) == {file.as_uri()}


@needs_browser
def test_the_page_lets_nothing_else_in(browser: Any, dataset: Path, tmp_path: Path) -> None:
    """Images as data: are allowed, and that is all: by its own policy the browser asks for nothing and runs nothing."""
    file = page_of(dataset, tmp_path / "page.html")
    inside = '<img src="http://127.0.0.1:9/x.png"><img src="other.png"><script>document.title = "ran"</script>'
    inside += '<svg><image href="http://127.0.0.1:9/y.png"/></svg><img src="x" onerror="document.title = 1">'
    file.write_text(file.read_text(encoding="utf-8").replace("<main>", f"<main>{inside}"), encoding="utf-8")
    show(browser, file)
    assert "ran" not in browser.title and browser.title.endswith("Perilune")
    refused = [line["message"] for line in browser.get_log("browser")]
    assert sum("violates the following Content Security Policy" in line for line in refused) >= 4, refused
    assert requests(browser) == {file.as_uri()}
    assert len(browser.find_elements("css selector", ".picture image")) == 2


def row_of(*held: RowImage) -> Row:
    size = sum(image.tokens for image in held)
    tokens = np.full(size, 7, "<u2")
    return Row("0", tokens, np.array([0, size], "<i4"), np.zeros(size, "u1"), b"[]", held)


def image_of(data: bytes, start: int, size: tuple[int, int]) -> RowImage:
    grid = RULE.grid(*size)
    return RowImage(data, "png", start, RULE.tokens(grid), grid)


def test_a_page_is_limited_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures shrink, all together stay within the limit, and none is dropped without a word."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1400, 3), np.uint8))
    out = io.BytesIO()
    noise.save(out, "PNG")
    first = image_of(out.getvalue(), 0, noise.size)
    row = row_of(first, image_of(out.getvalue(), first.tokens, noise.size))
    one, _ = inspect_pictures.pictures(row, RULE)
    kind, _, data = one.source.partition(";base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg" and max(shown.size) == 1024 and "scaled down to" in one.about
    assert len(one.cells) == first.tokens
    monkeypatch.setattr(inspect_pictures, "MAX_BYTES", len(base64.b64decode(data)) + 9)
    monkeypatch.setattr(inspect_pictures, "MAX_CELLS", first.tokens - 5)
    one, two = inspect_pictures.pictures(row, RULE)
    assert one.source and len(one.cells) == first.tokens - 5
    assert not two.source and not two.cells and "a page holds at most" in two.about


def test_a_damaged_image_is_told_in_words() -> None:
    data = two_colours(56, 56, "PNG")
    good = image_of(data, 4, (56, 56))
    bad, fine = inspect_pictures.pictures(row_of(image_of(data[:99], 0, (56, 56)), good), RULE)
    assert not bad.source and "cannot be decoded" in bad.about
    assert fine.source and fine.place == "tokens [4, 8) in piece 1 of 1"
