"""Images from encoded bytes to the patches that MoonViT reads, by Pillow and numpy alone.

The rule is that of Kimi-VL's image processor (arXiv 2504.07491, section 2.1; the published `preprocessor_config.json`):
scale down by bicubic interpolation where there are more patches than the limit, fill the right and lower edge with
zeros up to whole 2 x 2 patches, cut into patches row by row, and map [0, 255] to [-1, 1].

What Kimi-VL leaves to the caller is settled here, before anything is scaled:

- JPEG, PNG and WebP only; of an animated image the first frame.
- Turned upright as EXIF says. EXIF that cannot be read says nothing; XMP is not asked.
- Transparency, of an alpha channel, a palette or a single colour, is laid over white. (Kimi-VL's own processor drops
  alpha, and shows whatever colour hides below it.)
- Of 16 bits a channel the upper 8 count, in grey as in colour. (Pillow alone makes all grey above 255 white.)
- CMYK becomes RGB by Pillow's formula; ICC profiles are not applied.
- An image that ends early or is otherwise broken is an error, never half a picture.

Legend: P patches, H and W pixels down and across, C = 3 colours.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from perilune.vision.image_header import ImageRule, image_size

if TYPE_CHECKING:  # processes that decode start without the seconds that importing torch takes
    import torch

PAPER = 255  # what shines through transparency: white
MEAN = STD = 0.5  # of every colour, on the scale [0, 1]
_ORIENTATION = 0x0112  # EXIF 2.32, table 4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def verify_image(data: bytes) -> tuple[str, int, int]:
    """(ending, width, height) of the upright image in pixels, after decoding the whole of it within the limits.

    Raises ValueError where it is damaged, or as `image_size` does.
    """
    ending, image = _load(data)
    width, height = image.size
    return (ending, height, width) if _orientation(image) >= 5 else (ending, width, height)


def decode(data: bytes) -> tuple[str, Image.Image]:
    """(ending, picture): the image upright in RGB, in its own size. Raises ValueError as `verify_image` does."""
    ending, image = _load(data)
    turn = _TURNS.get(_orientation(image))
    picture = _rgb(image, data)
    return ending, picture if turn is None else picture.transpose(turn)


def cut(picture: Image.Image, rule: ImageRule) -> np.ndarray:
    """uint8 [P, 3, 14, 14] of an RGB picture, scaled and filled up, in row-major order of `rule.grid(*picture.size)`.

    Raises ValueError for a picture too long for the tower.
    """
    down, across = rule.grid(*picture.size)
    size = rule.scaled(*picture.size)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    side = rule.patch_size
    pixels_HWC = np.zeros((down * side, across * side, 3), np.uint8)
    pixels_HWC[: size[1], : size[0]] = np.asarray(picture)
    cells = pixels_HWC.reshape(down, side, across, side, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cells).reshape(down * across, 3, side, side)


def join(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], the picture that `cut` cut into `patches` [P, 3, 14, 14] of `grid` (down, across)."""
    down, across = grid
    side = patches.shape[-1]
    cells = patches.reshape(down, across, 3, side, side).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(cells).reshape(down * side, across * side, 3)


def normalize(patches: torch.Tensor) -> torch.Tensor:
    """[..., 14, 14] uint8 -> float32 in [-1, 1], on the patches' device: a quarter of the bytes has to get there."""
    return (patches.float() / 255 - MEAN) / STD


def _load(data: bytes) -> tuple[str, Image.Image]:
    """The image decoded in its own mode, not yet turned."""
    ending, width, height = image_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.size != (width, height):
                raise ValueError(f"the decoder sees {image.size}, the header says {(width, height)}")
            image.load()
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"a {ending} image that cannot be decoded: {error}") from error
    return ending, image


def _orientation(image: Image.Image) -> int:
    """1 to 8, what EXIF says of how to turn the image; 1, upright, where it says nothing that can be read.

    Read here, since what Pillow makes of damaged EXIF and of XMP changes with its versions: packing and training must
    agree on the sides.
    """
    block = image.info.get("exif")
    if not isinstance(block, bytes):
        return 1
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, at)
        for place in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, place)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), block, place + 8)  # LONG or SHORT
                return value if value in _TURNS else 1
    except struct.error:  # cut off: it says nothing
        pass
    return 1


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    """The decoded `image` of the file `data` in RGB, transparency laid over PAPER."""
    key = _key(image, data)
    if image.mode.startswith("I"):
        grey_HW = np.asarray(image)
        upper_HW = (grey_HW >> 8).astype(np.uint8)
        upper_HW[grey_HW == key] = PAPER  # no value where the key is None
        return Image.fromarray(upper_HW).convert("RGB")
    if image.has_transparency_data:
        if key is not None:
            image.info["transparency"] = key
        paper = Image.new("RGBA", image.size, (PAPER, PAPER, PAPER, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _key(image: Image.Image, data: bytes) -> int | tuple[int, ...] | None:
    """The colour that a PNG calls transparent, in the range of the decoded values: Pillow leaves it in the file's.

    None where there is none, or where it is the index of a palette.
    """
    key = image.info.get("transparency")
    if image.mode not in ("L", "RGB", "I", "I;16") or not isinstance(key, int | tuple):
        return None
    depth = data[24]  # bits a channel, in the IHDR chunk
    top = (1 << depth) - 1  # of a key only the depth's bits count (PNG, section 11.3.2.1)
    if image.mode.startswith("I"):
        return key & top if isinstance(key, int) else None
    values = [key] if isinstance(key, int) else key
    eight = tuple((value & top) * 255 // top if depth < 8 else (value & top) >> depth - 8 for value in values)
    return eight[0] if isinstance(key, int) else eight
