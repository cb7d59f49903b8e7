"""Images into patches: by the arithmetic that Kimi K2.5's processor has in transformers, from files of every kind."""

from __future__ import annotations

import importlib
import io
import math
import struct
import sys
import types
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from perilune.vision.image_header import ImageRule
from perilune.vision.images import cut, decode, join, normalize, verify_image

RULE = ImageRule(placeholder_id=7)


@pytest.fixture(scope="module")
def kimi() -> Iterator[Any]:
    """transformers' image processor of Kimi K2.5, of which we use what needs no torchvision: an empty one stands in."""
    importlib.import_module("transformers.image_processing_backends")  # finds for good that there is no torchvision
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].functional = types.ModuleType("functional")  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield importlib.import_module("transformers.models.kimi_k25.image_processing_kimi_k25")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth enough to survive JPEG, without symmetry."""
    rng = np.random.default_rng(seed + width * 1000 + height)
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), channels), np.uint8)
    parts = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(part) for part in parts], -1)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """[H, W, 3] of the decoded file; what is told of its size is true."""
    ending, picture = decode(data)
    assert picture.mode == "RGB" and verify_image(data) == (ending, *picture.size)
    return np.asarray(picture)


# ---------------------------------------------------------------- against Kimi's arithmetic


@given(st.integers(14, 7140), st.integers(14, 7140), st.sampled_from([64, 4096, 16384]))
def test_sizes_are_kimis(kimi: Any, width: int, height: int, limit: int) -> None:
    """From one patch to 510 a side: at 512 K2.5 scales down once more, where Kimi-VL refuses."""
    rule = ImageRule(placeholder_id=7, patch_limit=limit)
    (new_height, new_width), (padded_height, padded_width) = kimi.navit_resize(height, width, 14, 2, limit, 512)
    assert rule.scaled(width, height) == (new_width, new_height)
    assert rule.grid(width, height) == (padded_height // 14, padded_width // 14)
    assert rule.tokens(rule.grid(width, height)) == padded_height * padded_width // 28**2


@pytest.mark.parametrize("size", [(28, 28), (61, 47), (1, 1), (130, 29), (400, 300)])
def test_patches_are_kimis(kimi: Any, size: tuple[int, int]) -> None:
    """Its resize by Pillow, its padding, rescaling and normalisation by transformers' numpy, its cutting by torch."""
    from transformers import image_transforms

    rule = ImageRule(placeholder_id=7, patch_limit=256)
    picture = Image.fromarray(noise(*size))
    sizes = kimi.navit_resize(size[1], size[0], 14, 2, 256, 512)
    (height, width), (padded_height, padded_width) = sizes
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) if size != (width, height) else None
    array = (resized if resized is not None else np.asarray(picture)).transpose(2, 0, 1)
    array = image_transforms.pad(array, ((0, padded_height - height), (0, padded_width - width)))
    scaled = image_transforms.rescale(array, 1 / 255)
    expected = image_transforms.normalize(scaled, [0.5] * 3, [0.5] * 3)
    theirs, down, across = kimi.Kimi_K25ImageProcessor.patchify(None, torch.from_numpy(expected)[None], 14)

    patches = cut(picture, rule)
    assert patches.dtype == np.uint8 and patches.shape == (down * across, 3, 14, 14)
    assert rule.grid(*size) == (down, across)
    ours = normalize(torch.from_numpy(patches))
    assert ours.dtype == torch.float32 and (ours - theirs[0].float()).abs().max() < 1e-6
    assert ours.min() == -1.0 or (width, height) == (padded_width, padded_height), "filled up with zeros, then mapped"


def test_patches_join_to_the_picture_they_were_cut_from() -> None:
    picture = Image.fromarray(noise(61, 47))
    whole = join(cut(picture, RULE), RULE.grid(61, 47))
    assert whole.shape == (56, 84, 3) and np.array_equal(whole[:47, :61], np.asarray(picture))
    assert not whole[47:].any() and not whole[:, 61:].any(), "right and bottom are black"


@pytest.mark.parametrize("size", [(1, 20_000), (60_000, 28), (14 * 511, 1)])
def test_images_too_long_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a side must have fewer than 512"):
        cut(Image.new("RGB", size), RULE)


def test_long_images_within_the_towers_positions() -> None:
    picture = Image.fromarray(noise(14 * 500, 20))
    assert cut(picture, RULE).shape[0] == 2 * 500
    assert RULE.grid(14 * 500, 14 * 20) == (14, 320), "10,000 patches, scaled by 0.64 to 4480 x 179 pixels"


# ---------------------------------------------------------------- files of every kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientations(kind: str, order: str) -> None:
    """All eight, however EXIF is written, equal Pillow's upright picture and, made from it, the same picture."""
    upright = Image.fromarray(noise(61, 40))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how to turn the upright one for it to be turned back
    for orientation, turn in undo.items():
        exif = Image.Exif()
        exif.endian = order
        exif[0x010F] = "a maker"
        exif[0x0112] = orientation
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        data = saved(stored, kind, exif=exif.tobytes(), **({} if kind == "PNG" else {"quality": 95}))
        found = pixels(data)
        assert found.shape == (40, 61, 3), orientation
        assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
        assert np.abs(found.astype(int) - np.asarray(upright)).mean() < (0.1 if kind == "PNG" else 6), orientation
        assert RULE.grid(*verify_image(data)[1:]) == (4, 6), "the grid that packing keeps"


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\x02\x01\x12"]),
)
def test_exif_that_cannot_be_read_turns_nothing_or_as_it_says(tail: bytes, head: bytes) -> None:
    data = saved(Image.fromarray(noise(33, 20)), "PNG", exif=b"Exif\0\0" + head + tail)
    assert sorted(verify_image(data)[1:]) == [20, 33]
    assert sorted(decode(data)[1].size) == [20, 33]


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return colour * share + 255 * (1 - share)


def test_alpha_lies_over_white() -> None:
    four = noise(40, 30, 4)
    four[:9, :9, 3], four[-9:, -9:, 3] = 0, 255
    for kind in ("PNG", "WEBP"):
        data = saved(Image.fromarray(four), kind, **({} if kind == "PNG" else {"lossless": True, "exact": True}))
        found = pixels(data)
        assert np.abs(found - over_white(four[..., :3], four[..., 3])).max() <= 1
        assert (found[:9, :9] == 255).all() and np.array_equal(found[-9:, -9:], four[-9:, -9:, :3])
    two = noise(40, 30, 2)
    found = pixels(saved(Image.fromarray(two, "LA"), "PNG"))
    assert np.abs(found - over_white(two[..., :1].repeat(3, -1), two[..., 1])).max() <= 1


def test_palettes() -> None:
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    index = np.arange(32 * 40, dtype=np.uint8).reshape(32, 40)
    image = Image.fromarray(index, "L")
    image = Image.frombytes("P", image.size, index.tobytes())
    image.putpalette(colours.tobytes())
    assert np.array_equal(pixels(saved(image, "PNG")), colours[index])
    alpha = np.random.default_rng(2).integers(0, 256, 256, np.uint8)
    found = pixels(saved(image, "PNG", transparency=alpha.tobytes()))
    assert np.abs(found - over_white(colours[index], alpha[index])).max() <= 1
    found = pixels(saved(image, "PNG", transparency=5))
    assert (found[index == 5] == 255).all() and np.array_equal(found[index != 5], colours[index][index != 5])


def test_grey_and_black_and_white() -> None:
    grey = noise(40, 30, 1)[..., 0]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(pixels(saved(Image.fromarray(grey), kind, **options)), grey[..., None].repeat(3, -1))
    jpeg = saved(Image.fromarray(grey), "JPEG", quality=95)
    assert np.array_equal(pixels(jpeg), np.asarray(Image.open(io.BytesIO(jpeg)))[..., None].repeat(3, -1))
    bits = pixels(saved(Image.fromarray(grey > 127), "PNG"))
    assert np.array_equal(bits, (255 * (grey > 127)).astype(np.uint8)[..., None].repeat(3, -1))


def test_cmyk() -> None:
    four = noise(40, 30, 4)
    data = saved(Image.fromarray(four, "CMYK"), "JPEG", quality=100, subsampling=0)
    ink = four.astype(np.float64) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(pixels(data) - expected).mean() < 4


def png(width: int, height: int, depth: int, kind: int, rows: bytes, key: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow writes no 16-bit colour, and no transparent colour of few bits."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    keyed = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + head + keyed + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_keep_their_upper_eight() -> None:
    """In grey as in colour; so a picture saved both ways stays one picture."""
    values = np.random.default_rng(3).integers(0, 1 << 16, (20, 30), np.uint16)
    upper = (values >> 8).astype(np.uint8)[..., None].repeat(3, -1)
    grey = saved(Image.fromarray(values), "PNG")
    assert Image.open(io.BytesIO(grey)).mode == "I;16" and np.array_equal(pixels(grey), upper)
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    assert np.array_equal(pixels(png(30, 20, 16, 2, rows)), upper)
    keyed = png(
        30, 20, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values), values[3, 4].tobytes()[::-1]
    )
    found = pixels(keyed)
    clear = values == values[3, 4]
    assert (found[clear] == 255).all() and np.array_equal(found[~clear], upper[~clear])


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key", "expected"),
    [
        (1, 0, b"\x40", (1,), [0, 255]),
        (2, 0, b"\x60", (1,), [255, 170]),
        (2, 0, b"\x60", (2,), [85, 255]),
        (4, 0, b"\x4f", (4,), [255, 255]),
        (4, 0, b"\x4e", (5,), [68, 238]),
        (8, 0, b"\x05\x07", (5,), [255, 7]),
        (8, 0, b"\x05\x07", (0x0105,), [255, 7]),
        (8, 2, b"\x05\x05\x05\x07\x07\x07", (5, 5, 5), [255, 7]),
        (16, 2, b"\x12\x34" * 3 + b"\xff\x00" * 3, (0x1234,) * 3, [255, 255]),
        (16, 2, b"\x12\x34" * 3 + b"\x20\x00" * 3, (0x2000,) * 3, [0x12, 255]),
    ],
)
def test_a_transparent_colour_of_any_depth(
    depth: int, kind: int, row: bytes, key: tuple[int, ...], expected: list[int]
) -> None:
    data = png(2, 1, depth, kind, b"\0" + row, struct.pack(f">{len(key)}H", *key))
    assert pixels(data)[0].tolist() == [[value] * 3 for value in expected]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(noise(40, 30, seed=i)) for i in range(3)]
    first = np.asarray(frames[0])
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        assert np.array_equal(pixels(data), first)
    with pytest.raises(ValueError, match=r"begins with b'GIF8.*not JPEG, PNG or WebP"):
        decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    colour = noise(40, 30)
    assert np.array_equal(pixels(saved(Image.fromarray(colour), "PNG", icc_profile=profile)), colour)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_what_ends_early_is_an_error(kind: str, options: dict[str, Any]) -> None:
    data = saved(Image.fromarray(noise(90, 70)), kind, **options)
    for part in (0.3, 0.6, 0.9):
        for look in (decode, verify_image):
            with pytest.raises(ValueError, match=r"cannot be decoded|ends inside its header"):
                look(data[: int(len(data) * part)])


def test_a_bomb_is_refused_by_its_header() -> None:
    side = 23_000
    bomb = png(side, side, 1, 0, bytes(21_000))
    bomb = bomb[: bomb.index(b"IDAT") - 4] + bytes(21_000)
    assert len(bomb) < 22_000 and math.prod((side, side)) > 500 << 20
    for look in (decode, verify_image):
        with pytest.raises(ValueError, match=f"{side} x {side} pixels; at least 1 and at most"):
            look(bomb)
