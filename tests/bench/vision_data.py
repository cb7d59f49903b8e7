"""Images a second from encoded bytes to patches, beside bare Pillow on the same bytes, in one run.

    .venv/bin/python tests/bench/vision_data.py [--images 48] [--rounds 5] [--json FILE]

Images are made here, smooth with some noise, of a photograph's size on the web (640 x 480) and above the patch limit
(1600 x 1200), as JPEG of quality 90, PNG and WebP. One thread. Rounds alternate between the two, so that a machine
whose speed drifts is fair to both; the figure is the median of the rounds, the ratio that of the rounds' ratios. Bare
Pillow opens, decodes, converts to RGB and scales to the same size: what any loader has to do. Perilune besides reads
header and EXIF, fills the edges up and cuts patches, a copy of every byte in strides.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perilune.vision.image_header import ImageRule
from perilune.vision.images import cut, decode

RULE = ImageRule(placeholder_id=0)
SIZES = {"640 x 480": (640, 480), "1600 x 1200": (1600, 1200)}
KINDS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="of each size and kind; a quarter of them when large")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the ratios there")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, one used; Pillow {Image.__version__}")
    print(f"{'':24}{'patches, images/s':>20}{'bare Pillow, images/s':>24}{'ratio':>8}")
    found = []
    for size_name, size in SIZES.items():
        for kind, how in KINDS.items():
            count = options.images if size[0] < 1000 else max(1, options.images // 4)
            files = [encoded(size, kind, how, seed) for seed in range(min(4, count))]
            mine, bare, ratio = compare((files * count)[:count], options.rounds)
            print(f"{kind + ', ' + size_name:24}{mine:20,.1f}{bare:24,.1f}{ratio:8.2f}")
            name = f"patches_vs_pillow_{kind.lower()}_{size[0]}"
            found.append({"name": name, "ours": mine, "rival": bare, "ratio": ratio, "unit": "images/s"})
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def encoded(size: tuple[int, int], kind: str, how: dict[str, Any], seed: int) -> bytes:
    """A picture with large shapes and fine grain, which compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (size[1] // 40, size[0] // 40, 3), np.uint8))
    pixels = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)) + rng.normal(0, 4, (size[1], size[0], 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, kind, **how)
    return out.getvalue()


def compare(files: list[bytes], rounds: int) -> tuple[float, float, float]:
    """(our images/s, Pillow's, the ratio)."""

    def ours() -> None:
        for data in files:
            cut(decode(data)[1], RULE)

    def pillow() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            size = RULE.scaled(*image.size)
            if size != image.size:
                image = image.resize(size, Image.Resampling.BICUBIC)
            np.asarray(image)

    ways: dict[str, Callable[[], None]] = {"ours": ours, "pillow": pillow}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:  # the first warms up
                rates[name].append(len(files) / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(rates["ours"], rates["pillow"], strict=True)]
    return statistics.median(rates["ours"]), statistics.median(rates["pillow"]), statistics.median(ratios)


if __name__ == "__main__":
    main()
