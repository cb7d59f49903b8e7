"""Images in rows: headers read as Pillow reads them, Kimi-VL's patch counts, members that stock webdataset decodes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from perilune.pretrain.data.shard import Row, RowImage, ShardWriter, check_row, decode_row, encode_row
from perilune.vision.image_header import ImageRule, image_size
from perilune.vision.images import verify_image

RULE = ImageRule(placeholder_id=7)


def encoded(kind: str, width: int, height: int, **options: object) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


SAMPLES = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": b"Exif\0\0" + bytes(400)}), ("PNG", {}),
    ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), SAMPLES)
def test_the_size_in_the_header_is_the_decoders(kind: str, options: dict[str, object]) -> None:
    data = encoded(kind, 61, 47, **options)
    assert image_size(data) == ({"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], 61, 47) == verify_image(data)
    with pytest.raises(ValueError, match="cannot be decoded"):
        verify_image(data[: len(data) * 2 // 3])
    for cut in range(0, 20):
        with pytest.raises(ValueError, match=r"not JPEG, PNG|ends inside its header"):
            image_size(data[:cut])


def test_a_pixel_bomb_is_refused_before_it_is_decoded() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match="60000 x 60000 pixels; at least 1 and at most"):
        verify_image(bomb)
    with pytest.raises(ValueError, match="not JPEG, PNG or WebP"):
        verify_image(b"GIF89a" + bytes(64))


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(28, 28, (2, 2)), (29, 28, (2, 4)), (1, 1, (2, 2)), (448, 300, (22, 32)), (896, 896, (64, 64)),
     (2000, 1000, (46, 92)), (4000, 4000, (66, 66))],
)  # fmt: skip
def test_patches_are_kimi_vls(width: int, height: int, grid: tuple[int, int]) -> None:
    """Worked out by hand from its processor: 2000 x 1000 has 142 x 71 patches, scaled by 0.6374 to 1274 x 637."""
    assert RULE.grid(width, height) == grid and RULE.tokens(grid) == grid[0] * grid[1] // 4


def test_an_image_too_long_for_the_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="a side must have fewer than 512"):
        RULE.grid(14 * 600, 14)


def row_with_images() -> Row:
    images = [encoded("JPEG", 56, 28), encoded("PNG", 28, 28), encoded("WEBP", 30, 20)]
    tokens = np.array([1, 7, 7, 2, 7, 7, 7, 3], "<u2")
    placed = [
        RowImage(images[0], "jpg", 1, 2, (2, 4)),
        RowImage(images[1], "png", 4, 1, (2, 2)),
        RowImage(images[2], "webp", 5, 2, (2, 4)),
    ]
    return Row("000000005", tokens, np.array([0, 4, 8], "<i4"), np.ones(8, "u1"), b"[]", tuple(placed))


def test_a_row_with_images_comes_back_and_stock_webdataset_reads_it(tmp_path: Path) -> None:
    row = row_with_images()
    back = decode_row(encode_row(row), row.key)
    check_row(back, 8, 100, RULE)
    assert back.images == row.images and np.array_equal(back.tokens, row.tokens)
    writer = ShardWriter(tmp_path, 10)
    writer.write(row)
    writer.close()
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode("pil")))
    assert sample["images.npy"].tolist() == [[1, 2, 2, 4], [4, 1, 2, 2], [5, 2, 2, 4]]
    assert sample["0.jpg"].size == (56, 28) and sample["1.png"].size == (28, 28) and sample["2.webp"].size == (30, 20)


def test_images_that_do_not_fit_their_tokens_are_damage() -> None:
    row = row_with_images()
    tokens = row.tokens.copy()
    tokens[5] = 9
    with pytest.raises(ValueError, match=r"image 2: tokens 5 to 7 are not all 7"):
        check_row(Row(row.key, tokens, row.cu_seqlens, row.loss_mask, b"[]", row.images), 8, 100, RULE)
    with pytest.raises(ValueError, match="5 placeholder tokens for 4 of images"):
        images = (row.images[0], row.images[2])
        check_row(Row(row.key, row.tokens, row.cu_seqlens, row.loss_mask, b"[]", images), 8, 100, RULE)
    with pytest.raises(ValueError, match="of which the manifest knows nothing"):
        check_row(row, 8, 100)
    with pytest.raises(ValueError, match="image 1: 1 tokens at 2"):
        moved = (row.images[0], RowImage(b"", "png", 2, 1, (2, 2)), row.images[2])
        check_row(Row(row.key, row.tokens, row.cu_seqlens, row.loss_mask, b"[]", moved), 8, 100, RULE)
    data = encode_row(row)
    cut = data.index(b"000000005.2.webp")
    with pytest.raises(ValueError, match="image 2 is missing"):
        decode_row(data[:cut], row.key)
