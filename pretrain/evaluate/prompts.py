"""Prompts for `perilune generate`: text to tokens, and images between it as packing writes them.

Torch is imported where images are shown alone: a prompt that cannot be is told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perilune.pretrain.data.encode import image_ids
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.described import Described
from perilune.vision import images
from perilune.vision.image_header import MAX_BYTES, ImageRule

if TYPE_CHECKING:
    from perilune.vision.vlm import Images

PLACE = "<image>"  # where in a prompt an image stands


@dataclass(frozen=True)
class Picture:
    """An image as the tower reads it."""

    patches: np.ndarray  # uint8 [P, 3, 14, 14]
    grid: tuple[int, int]  # patches (down, across)


def read_picture(path: Path, rule: ImageRule) -> Picture:
    """The image in a file. Raises InputError where it cannot be read or is none."""
    try:
        with path.open("rb") as stream:
            _, picture = images.decode(stream.read(MAX_BYTES + 1))
        return Picture(images.cut(picture, rule), rule.grid(*picture.size))
    except OSError as error:
        raise InputError(f"--image {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--image {path}: {error}") from error


def encode_prompts(
    about: Described, prompts: Sequence[str], max_new_tokens: int, pictures: Sequence[Picture] = ()
) -> tuple[list[list[int]], Images | None]:
    """Token ids of each prompt, behind the tokenizer's BOS where it wants one, and the images of all of them.

    Every prompt has all `pictures`, in their order: one for each PLACE in it or, where it has none, all before the
    text. Without pictures PLACE is text. Raises InputError for a prompt that is empty or has not a PLACE for each
    picture, and for one that, continued, is longer than max_position_embeddings.
    """
    text, limit = about.need_text(), about.model.max_position_embeddings
    rows: list[list[int]] = []
    index: list[int] = []
    at = 0
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"--prompt {ascii(prompt)[:40]}: bytes that are not UTF-8 are no text")
        parts = _between(prompt, len(pictures))
        row = list(text.prefix)
        for number, ids in enumerate(text.tokenizer.encode_batch(parts)):
            row += ids.tolist()
            if number < len(pictures):
                held = pictures[number].patches.shape[0] // about.need_tower().merge_size ** 2
                marked, first = image_ids(text.tokenizer, held)
                index += range(at + len(row) + first, at + len(row) + first + held)
                row += marked
        if not row:
            raise InputError("--prompt '': the first token is predicted from nothing; give some text")
        if len(row) + max_new_tokens > limit:
            raise InputError(
                f"--prompt {prompt[:40]!r} has {len(row)} tokens, {_of(pictures)}with --max-new-tokens "
                f"{max_new_tokens} more than the model's max_position_embeddings {limit}; ask for fewer"
            )
        rows.append(row)
        at += len(row)
    return rows, shown(list(pictures) * len(prompts), index, at) if pictures else None


def shown(pictures: Sequence[Picture], index: Sequence[int], tokens: int) -> Images:
    """What the tower is given of `pictures`, whose features stand at `index` of `tokens` tokens."""
    import torch

    from perilune.vision.vlm import images_of

    return images_of(
        torch.from_numpy(np.concatenate([picture.patches for picture in pictures])),
        torch.tensor([picture.grid for picture in pictures]),
        torch.tensor(index, dtype=torch.int64),
        tokens,
    )


def _between(prompt: str, count: int) -> list[str]:
    """The `count` + 1 texts before, between and after the images of a prompt."""
    if not count:
        return [prompt]
    if PLACE not in prompt:
        return [""] * count + [prompt]
    parts = prompt.split(PLACE)
    if len(parts) != count + 1:
        raise InputError(
            f"--prompt {prompt[:40]!r} has {len(parts) - 1} {PLACE} for {count} --image; write one for each, or none "
            "where they stand before the text"
        )
    return parts


def _of(pictures: Sequence[Picture]) -> str:
    return f"{len(pictures)} images among them, " if pictures else ""
