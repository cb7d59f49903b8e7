"""Documents into tokens, a batch at a time: text encoded, images replaced by placeholders, some text rearranged (FIM).

Each document depends on nothing but itself, so that it does not matter which worker encodes it, or when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from perilune.pretrain.data.shard import token_dtype
from perilune.pretrain.data.sources import Document
from perilune.pretrain.data.tokenizer import Tokenizer
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import ImageRule
from perilune.vision.images import verify_image

IMAGE_WORD = "image"  # between the marks of an image, as Kimi-VL writes it


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens; part of a dataset's recipe."""

    seq_len: int
    fim_rate: float = 0.0  # part of the text documents that are rearranged for filling in the middle
    patch_limit: int = 4096  # patches above which an image is scaled down
    max_patches: int | None = None  # of a row


class EncodedImage(NamedTuple):
    start: int  # of its span in the document, marks included
    end: int
    first: int  # placeholder
    tokens: int
    down: int  # patches
    across: int
    ending: str
    offset: int  # of its bytes in the batch
    size: int


class EncodedDocument(NamedTuple):
    source: str
    offset: int  # of its first token in the batch
    size: int  # tokens, EOS included
    raw_bytes: int  # of its text
    fim: bool
    images: tuple[EncodedImage, ...]


@dataclass
class EncodedBatch:
    """`documents` with their tokens end to end, and the bytes of their images after all tokens."""

    tokens: np.ndarray  # [tokens] of the smallest type that holds the vocabulary
    documents: list[EncodedDocument]
    images: list[bytes] = field(default_factory=list)


def encode_documents(coder: Tokenizer, documents: Sequence[Document], how: Encoding) -> EncodedBatch:
    """The tokens of `documents`, each with EOS at its end.

    Raises InputError, naming the document, for images that are damaged or cannot fit a row, and for ids outside the
    vocabulary.
    """
    orders = [_rearranged(document, how.fim_rate) for document in documents]
    texts = [part for document, order in zip(documents, orders, strict=True) for part in order or document.parts]
    encoded = iter(coder.encode_batch([text for text in texts if isinstance(text, str)]))
    dtype = token_dtype(coder.vocab_size)
    marks = coder.fim_ids() if how.fim_rate else ()
    tokens: list[np.ndarray] = []
    images: list[bytes] = []
    out: list[EncodedDocument] = []
    offset = image_offset = 0
    for document, order in zip(documents, orders, strict=True):
        parts: Sequence[Sequence[int] | np.ndarray]
        if order:
            pre, suffix, middle = (next(encoded) for _ in order)
            parts = [marks[:1], pre, marks[1:2], suffix, marks[2:], middle, [coder.eos_id]]
            spans: list[EncodedImage] = []
        else:
            parts, spans = _parts(coder, document, encoded, how)
        ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
        held = []
        for span in spans:
            held.append(span._replace(offset=image_offset))
            image_offset += span.size
        images += [part for part in document.parts if isinstance(part, bytes)]
        raw_bytes = int(coder.token_bytes[ids].sum(dtype=np.int64))
        raw_bytes -= len(held) * len(IMAGE_WORD)
        out.append(EncodedDocument(document.source, offset, ids.size, raw_bytes, bool(order), tuple(held)))
        tokens.append(ids.astype(dtype))
        offset += ids.size
    after = offset * dtype.itemsize
    out = [
        d._replace(images=tuple(i._replace(offset=after + i.offset) for i in d.images)) if d.images else d for d in out
    ]
    return EncodedBatch(np.concatenate(tokens), out, images)


def _parts(
    coder: Tokenizer, document: Document, encoded: Iterator[np.ndarray], how: Encoding
) -> tuple[list[Sequence[int] | np.ndarray], list[EncodedImage]]:
    """The document's ids part by part, and its images with their bytes counted from its own first one."""
    parts: list[Sequence[int] | np.ndarray] = []
    images: list[EncodedImage] = []
    ids: Sequence[int] | np.ndarray
    at = 0
    for part in document.parts:
        if isinstance(part, str):
            ids = next(encoded)
        elif isinstance(part, bytes):
            ids, image = _image(coder, part, document.source, at, how)
            images.append(image)
        else:
            ids = _given(coder, part, document.source)
        parts.append(ids)
        at += len(ids)
    last = document.parts[-1]
    if not (isinstance(last, np.ndarray) and int(last[-1]) == coder.eos_id):
        parts.append([coder.eos_id])
    return parts, images


def image_ids(coder: Tokenizer, count: int) -> tuple[list[int], int]:
    """(ids of an image of `count` placeholders with the marks around them, place of the first placeholder).

    Raises InputError where the vocabulary lacks the marks.
    """
    begin, content, end, placeholder = coder.media_ids()
    before = [begin, *coder.encode_batch([IMAGE_WORD])[0].tolist(), content]
    return [*before, *[placeholder] * count, end], len(before)


def _image(coder: Tokenizer, data: bytes, source: str, at: int, how: Encoding) -> tuple[list[int], EncodedImage]:
    rule = ImageRule(coder.media_ids()[3], patch_limit=how.patch_limit)
    try:
        ending, width, height = verify_image(data)
        grid = rule.grid(width, height)
    except ValueError as error:
        raise InputError(f"{source}: {error}. Repair it or leave it out") from error
    count = rule.tokens(grid)
    ids, first = image_ids(coder, count)
    patches = grid[0] * grid[1]
    if len(ids) > how.seq_len or (how.max_patches is not None and patches > how.max_patches):
        raise InputError(
            f"{source}: an image of {width} x {height} pixels takes {len(ids)} tokens and {patches} patches; a row has "
            f"{how.seq_len} tokens and {how.max_patches or 'any number of'} patches. Raise --seq-len or --max-patches, "
            "or lower --patch-limit, which scales images down"
        )
    return ids, EncodedImage(at, at + len(ids), at + first, count, *grid, ending, 0, len(data))


def _given(coder: Tokenizer, ids: np.ndarray, source: str) -> np.ndarray:
    """Ids that came as ids, checked against the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= coder.vocab_size:
        raise InputError(
            f"{source}: ids from {low} to {high}; the vocabulary of {coder.path} has {coder.vocab_size}. "
            "Name the tokenizer that made them with --tokenizer"
        )
    placeholder = coder.media_pad_id
    if placeholder is not None and bool((ids == placeholder).any()):
        raise InputError(f"{source}: holds the id {placeholder}, which stands for an image, without one. Remove it")
    return ids


def _rearranged(document: Document, rate: float) -> tuple[str, str, str] | None:
    """(prefix, suffix, middle) of a text chosen for FIM, in the order of PSM (DeepSeek-V3, arXiv 2412.19437 4.1).

    Chosen and cut, at two characters, by the hash of the text: the same wherever it stands.
    """
    if not rate or len(document.parts) != 1 or not isinstance(document.parts[0], str):
        return None
    text = document.parts[0]
    digest = hashlib.sha256(b"fim" + text.encode()).digest()
    draw, one, two = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    if draw >= int(rate * 2**64):
        return None
    low, high = sorted((one % (len(text) + 1), two % (len(text) + 1)))
    return text[:low], text[high:], text[low:high]
