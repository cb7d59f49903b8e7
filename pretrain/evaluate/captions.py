"""Captions by greedy decoding: for each image of a packed dataset, is what the model says the text that follows it?

A caption is the text after an image, up to the next image or the end of the document; one that the row cuts off, or
that bears no loss, is not asked for. The model is given all that stands before the text in its document, images too.
It is right where its text is the caption, white space at both ends aside. What it writes beyond the length of a caption
that another image follows does not count: the marks of images bear no loss, so that it never learns to begin one. Each
is asked once more with every image mid-grey, in its own size: what is still right then was in the text, or guessed.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from perilune.parallel import mesh as meshes
from perilune.pretrain.data.images import upright
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.tokenizer import Tokenizer
from perilune.pretrain.evaluate.generate import generate
from perilune.pretrain.evaluate.likelihood import FORWARD_TOKENS
from perilune.pretrain.evaluate.load import Loaded
from perilune.pretrain.evaluate.prompts import Picture, shown
from perilune.vision.image_header import ImageRule
from perilune.vision.images import cut

GREY = (128, 128, 128)
AT_ONCE = 64  # captions
MORE = 8  # tokens that an answer may have beyond the longest caption beside it
SHOWN_SIDE = 128  # pixels of the longer side of a picture kept for the report


@dataclass(frozen=True)
class Caption:
    """A text after an image; places are those in the row."""

    row: int  # of the dataset
    image: int  # of the row: the one that is captioned
    first: int  # image of the row that the document begins with
    begin: int  # of the document
    start: int  # of the text
    tokens: int  # of the text, without the document's end
    end: int  # of the text, with it
    text: str


@dataclass(frozen=True)
class Answer:
    """What the model said to an image, and to the same with every image grey."""

    sample: str  # shard/key
    image: int  # of the row
    expected: str
    said: str
    blanked: str
    png: bytes | None  # the image, made small

    @property
    def right(self) -> bool:
        return self.said == self.expected

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        png = None if self.png is None else base64.b64encode(self.png).decode()
        return {**vars(self), "right": self.right, "png": png}


def find(dataset: PackedDataset, tokenizer: Tokenizer, limit: int | None = None, max_rows: int = 0) -> list[Caption]:
    """The first `limit` captions of the first `max_rows` rows (0: all) in the order in which training validates."""
    count = min(max_rows, len(dataset)) if max_rows else len(dataset)
    order = permute(np.arange(count), len(dataset), "valid", dataset.fingerprint).tolist()
    found = (caption for index in order for caption in _of_row(dataset[index], index, tokenizer))
    return list(islice(found, limit))


def _of_row(row: Row, index: int, tokenizer: Tokenizer) -> Iterator[Caption]:
    bounds, docs = row.cu_seqlens.tolist(), row.docs
    for number, image in enumerate(row.images):
        after = image.start + image.tokens
        piece = int(np.searchsorted(row.cu_seqlens, image.start, side="right")) - 1
        begin, end = bounds[piece : piece + 2]
        following = row.images[number + 1].start if number + 1 < len(row.images) else end
        places = after + np.flatnonzero(row.loss_mask[after : min(following, end)])
        if not places.size or (docs[piece]["continued"] and following >= end):
            continue
        ids = row.tokens[places]
        if int(places[-1]) + 1 == end and int(ids[-1]) == tokenizer.eos_id:
            ids = ids[:-1]
        text = tokenizer.decode(ids.tolist()).strip()
        if text:
            first = next(n for n, other in enumerate(row.images) if other.start >= begin)
            yield Caption(index, number, first, begin, int(places[0]), ids.size, int(places[-1]) + 1, text)


def ask(
    loaded: Loaded,
    dataset: PackedDataset,
    captions: Sequence[Caption],
    rule: ImageRule,
    pictures: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Answer]:
    """The model's answers, in the order of `captions`, with a picture of the first `pictures` right and wrong ones.

    `rule` is the dataset's. `progress` is told captions done and to do. Raises DamageError for an image that is not as
    it was packed.
    """
    room, done = {True: pictures, False: pictures}, 0
    for group in _groups(captions):
        rows = [dataset[caption.row] for caption in group]
        prompts = [row.tokens[caption.begin : caption.start].tolist() for row, caption in zip(rows, group, strict=True)]
        index: list[int] = []
        images: list[Image.Image] = []
        at = 0
        for row, caption, prompt in zip(rows, group, prompts, strict=True):
            for number in range(caption.first, caption.image + 1):
                image = row.images[number]
                place = at + image.start - caption.begin
                index += range(place, place + image.tokens)
                images.append(picture_of(dataset, row, caption.row, number, rule))
            at += len(prompt)
        grey = [Image.new("RGB", image.size, GREY) for image in images]
        said, blanked = (_said(loaded, group, prompts, some, rule, index) for some in (images, grey))
        last = np.cumsum([caption.image + 1 - caption.first for caption in group]) - 1
        for caption, answer, other, which in zip(group, said, blanked, last.tolist(), strict=True):
            right = answer == caption.text
            png = _small(images[which]) if room[right] > 0 else None
            room[right] -= 1
            yield Answer(dataset.sample_id(caption.row), caption.image, caption.text, answer, other, png)
        done += len(group)
        progress(done, len(captions))


def picture_of(dataset: PackedDataset, row: Row, index: int, number: int, rule: ImageRule) -> Image.Image:
    """An image of row `index`, upright. Raises DamageError where it is not as it was packed."""
    try:
        return upright(row.images[number], rule)
    except ValueError as error:
        name = dataset.sample_id(index)
        raise DamageError(f"{dataset.where}: {name}: image {number}: {error}; pack the dataset again") from error


def _groups(captions: Sequence[Caption]) -> Iterator[list[Caption]]:
    """As many at once as one forward pass takes."""
    group: list[Caption] = []
    held = 0
    for caption in captions:
        size = caption.start - caption.begin
        if group and (len(group) == AT_ONCE or held + size > FORWARD_TOKENS):
            yield group
            group, held = [], 0
        group.append(caption)
        held += size
    if group:
        yield group


def _said(
    loaded: Loaded,
    group: Sequence[Caption],
    prompts: list[list[int]],
    images: Sequence[Image.Image],
    rule: ImageRule,
    index: list[int],
) -> list[str]:
    text = loaded.need_text()
    seen = [Picture(cut(image, rule), rule.grid(*image.size)) for image in images]
    ends = loaded.ends()
    found = generate(
        loaded.net,
        prompts,
        max(caption.tokens for caption in group) + MORE,
        images=shown(seen, index, sum(map(len, prompts))).to(meshes.device()),
        eos_ids=ends,
    )
    kept = [
        one.tokens[: caption.tokens] if caption.end == caption.start + caption.tokens else one.tokens
        for one, caption in zip(found, group, strict=True)
    ]
    return [text.tokenizer.decode([t for t in tokens if t not in ends]).strip() for tokens in kept]


def _small(image: Image.Image) -> bytes:
    """A PNG of at most SHOWN_SIDE pixels a side."""
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    small.save(out, "PNG")
    return out.getvalue()


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Plain JSON: how many of the captions are right, and with grey images."""
    count = len(answers)
    found: dict[str, Any] = {"captions": count}
    for name, right in (
        ("exact_match", sum(answer.right for answer in answers)),
        ("exact_match_blanked", sum(answer.blanked == answer.expected for answer in answers)),
    ):
        part = right / count
        error = math.sqrt(part * (1 - part) / (count - 1)) if count > 1 else None
        found |= {name: part, f"{name}_stderr": error, f"{name}_count": right}
    return found
