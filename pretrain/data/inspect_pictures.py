"""The images of a row as the page shows them: what the tower reads, its patches and merge cells drawn over it.

Pictures are encoded anew from the decoded pixels: no byte of a dataset reaches the decoder of a browser.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from PIL import Image

from perilune.pretrain.data.images import upright
from perilune.pretrain.data.shard import Row, RowImage
from perilune.vision import images
from perilune.vision.image_header import ImageRule, image_size

MAX_BYTES = 1 << 23  # of all pictures of a page, before base64
MAX_PNG = 1 << 18  # bytes above which a picture becomes JPEG
MAX_SIDE = 1024  # pixels of the longer side; the drawing keeps the patches' own scale
MAX_CELLS = 4096  # of a page that tell their token


class Cell(NamedTuple):
    x: int  # pixels of its left upper corner
    y: int
    token: int  # of the row


@dataclass
class Picture:
    """An image for the template; lengths in pixels of the scaled image, edges filled up."""

    about: str
    place: str  # in the row, in words
    left: float  # percent of the row before its first token
    part: float  # percent of the row that its tokens are
    source: str = ""  # data: URI; empty where it cannot be shown
    width: int = 0
    height: int = 0
    seen: tuple[int, int] = (0, 0)  # width and height without what was filled up
    unit: int = 0  # side of a merge cell
    patches: str = ""  # paths of the lines between patches, and between merge cells
    merged: str = ""
    cells: list[Cell] = field(default_factory=list)


def pictures(row: Row | None, rule: ImageRule | None) -> list[Picture]:
    """The row's images; where one is damaged or the page is full, in words alone."""
    shown: list[Picture] = []
    room, cells = MAX_BYTES, MAX_CELLS
    for number, image in enumerate(row.images if row is not None else ()):
        assert row is not None and rule is not None  # a row with images without a rule is damaged, and was not read
        picture = _in_words(number, image, row)
        shown.append(picture)
        try:
            room -= _draw(picture, image, rule, room)
        except ValueError as error:
            picture.about += f": {error}"
            continue
        picture.cells = list(islice(picture.cells, cells))
        cells -= len(picture.cells)
    return shown


def _in_words(number: int, image: RowImage, row: Row) -> Picture:
    end, size = image.start + image.tokens, row.tokens.size
    piece = int((row.cu_seqlens <= image.start).sum())  # counted from 1
    return Picture(
        about=f"image {number}: {image.grid[0]} x {image.grid[1]} patches",
        place=f"tokens [{image.start:,}, {end:,}) in piece {piece:,} of {row.cu_seqlens.size - 1:,}",
        left=100 * image.start / size,
        part=100 * image.tokens / size,
    )


def _draw(picture: Picture, image: RowImage, rule: ImageRule, room: int) -> int:
    """Fill in what is seen, and return the picture's bytes; ValueError where the image is damaged."""
    whole = upright(image, rule)
    pixels_HWC = images.join(images.cut(whole, rule), image.grid)
    picture.about += "; {1} x {2} pixels, {0}".format(*image_size(image.data))
    if whole.size != image_size(image.data)[1:]:
        picture.about += ", turned to {} x {}".format(*whole.size)
    picture.seen = rule.scaled(*whole.size)
    if picture.seen != whole.size:
        picture.about += ", scaled down to {} x {}".format(*picture.seen)
    picture.height, picture.width = pixels_HWC.shape[:2]
    data, kind = _encoded(Image.fromarray(pixels_HWC))
    if len(data) > room:
        picture.about += f"; not shown: a page holds at most {MAX_BYTES:,} bytes of pictures"
        return 0
    picture.source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    picture.unit = rule.patch_size * rule.merge_size
    picture.patches = _lines(picture.width, picture.height, rule.patch_size)
    picture.merged = _lines(picture.width, picture.height, picture.unit)
    across = picture.width // picture.unit
    picture.cells = [
        Cell(n % across * picture.unit, n // across * picture.unit, image.start + n) for n in range(image.tokens)
    ]
    return len(data)


def _encoded(picture: Image.Image) -> tuple[bytes, str]:
    """(bytes, kind): exact where that is small enough."""
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    picture.save(out, "PNG")
    if out.tell() <= MAX_PNG:
        return out.getvalue(), "png"
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return out.getvalue(), "jpeg"


def _lines(width: int, height: int, step: int) -> str:
    """An SVG path of a grid of squares, without its frame."""
    down = "".join(f"M{x} 0V{height}" for x in range(step, width, step))
    return down + "".join(f"M0 {y}H{width}" for y in range(step, height, step))
