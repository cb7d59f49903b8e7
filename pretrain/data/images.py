"""The images of a row: each decoded and held against what the row says of it, then cut into patches."""

from __future__ import annotations

import numpy as np
from PIL import Image

from perilune.pretrain.data.manifest import image_rule
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row, RowImage
from perilune.vision import images
from perilune.vision.image_header import ImageRule


def check_images(row: Row, rule: ImageRule | None) -> None:
    """Decode every image within the limits; ValueError where one is damaged or not of the grid that the row says."""
    for number, image in enumerate(row.images):
        try:
            ending, width, height = images.verify_image(image.data)
            _agree(image, ending, width, height, rule)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error


def upright(image: RowImage, rule: ImageRule) -> Image.Image:
    """One image decoded, in RGB; ValueError as of `check_images`."""
    ending, picture = images.decode(image.data)
    _agree(image, ending, *picture.size, rule)
    return picture


def read_decoded(dataset: PackedDataset, index: int) -> tuple[Row, list[np.ndarray]]:
    """(row, patches of each of its images). Raises as `dataset[index]` does, and DamageError for an image as well."""
    row = dataset[index]
    rule = image_rule(dataset.manifest)
    patches = []
    for number, image in enumerate(row.images):
        assert rule is not None  # else the row would not have been read
        try:
            patches.append(images.cut(upright(image, rule), rule))
        except ValueError as error:
            raise DamageError(
                f"{dataset.where}: {dataset.sample_id(index)}: image {number}: {error}. The row is as it was packed, "
                "by another version or from another decoder: pack the dataset again"
            ) from error
    return row, patches


def _agree(image: RowImage, ending: str, width: int, height: int, rule: ImageRule | None) -> None:
    """Raise ValueError where the upright image is not of the kind and grid that the row says."""
    if ending != image.ending or rule is None or rule.grid(width, height) != image.grid:
        raise ValueError(
            f"a {ending} of {width} x {height} pixels once upright, kept as .{image.ending} with "
            f"{image.grid[0]} x {image.grid[1]} patches"
        )
