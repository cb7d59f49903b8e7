"""Encoded images before anyone decodes them: their kind and size from the header, and how many patches they become.

Patches follow Kimi-VL's image processor (MoonViT: patches of 14 pixels, 2 x 2 of them merged into one token). An image
of more patches than the limit is scaled down, keeping its shape; then its right and lower edge are filled up to
multiples of 28 pixels. Nothing here needs more than Python: whoever only reads manifests pays for no decoder.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from typing import Any

ENDINGS = ("jpg", "png", "webp")
MAX_BYTES = 1 << 26  # of one encoded image
MAX_PIXELS = 1 << 26  # of one decoded image; 200 MB as RGB
MAX_SIDE_PATCHES = 512  # MoonViT's table of 2-D rotary positions ends there


@dataclass(frozen=True)
class ImageRule:
    """How an image becomes patches and placeholder tokens; stands in the manifest of a dataset with images."""

    placeholder_id: int  # the token that stands in the row once for each 2 x 2 patches
    patch_size: int = 14  # pixels
    merge_size: int = 2  # patches a side that become one token
    patch_limit: int = 4096  # Kimi-VL's `in_token_limit`, which counts patches before merging

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after scaling down to about the limit; the same where it is within the limit."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches <= self.patch_limit:
            return width, height
        scale = math.sqrt(self.patch_limit / patches)
        return max(1, int(width * scale)), max(1, int(height * scale))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Patches (down, across) of an upright image of width x height pixels, both multiples of the merge size.

        Raises ValueError for an image so long that a side would not fit the tower's positions.
        """
        width, height = self.scaled(width, height)
        unit = self.patch_size * self.merge_size
        down, across = (-(-side // unit) * self.merge_size for side in (height, width))
        if max(down, across) >= MAX_SIDE_PATCHES:
            raise ValueError(f"{across} x {down} patches; a side must have fewer than {MAX_SIDE_PATCHES}")
        return down, across

    def tokens(self, grid: tuple[int, int]) -> int:
        """Placeholder tokens of an image of that many patches."""
        return grid[0] * grid[1] // self.merge_size**2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `ImageRule(**saved)` gives it back."""
        return asdict(self)


def image_size(data: bytes) -> tuple[str, int, int]:
    """(ending, width, height) in pixels as the header says, without decoding, before EXIF may turn the image.

    Raises ValueError where it is no JPEG, PNG or WebP, or breaks MAX_BYTES or MAX_PIXELS.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"an image of {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            ending, (width, height) = "png", struct.unpack_from(">II", data, 16)
        elif data[:2] == b"\xff\xd8":
            ending, (width, height) = "jpg", _jpeg_size(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            ending, (width, height) = "webp", _webp_size(data)
        else:
            raise ValueError(f"begins with {data[:8]!r}: not JPEG, PNG or WebP")
    except (struct.error, IndexError) as error:
        raise ValueError(f"an image of {len(data)} bytes ends inside its header") from error
    if not width or not height or width * height > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels; at least 1 and at most {MAX_PIXELS} in all")
    return ending, width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError(f"byte {at} of a JPEG is {data[at]:#04x}, not the beginning of a segment")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame; not DHT, JPG, DAC
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        elif marker in (0xD9, 0xDA):
            raise ValueError("a JPEG without a frame header")
        else:
            at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if len(data) < 30:
        raise IndexError
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"a WebP that begins with {kind!r}")
