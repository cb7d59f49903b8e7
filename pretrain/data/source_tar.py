"""Samples of WebDataset tars: image-text pairs and interleaved documents.

A sample is the run of members whose names agree up to the first dot of the last part, as in webdataset:

    KEY.jpg KEY.txt             a pair: the image, then the text (without .txt: `caption` or `text` of KEY.json)
    KEY.json KEY.0.jpg ...      interleaved: {"texts": [...], "images": [...]} of one length, as in OBELICS; at each
                                place a text, or the ending ("0.jpg") of an image member
    KEY.txt                     a text

Other members are passed over unread; names without a key or an ending (README, ._1.jpg) belong to no sample, as in
webdataset. Nothing is extracted or run, and no path in a tar is opened. Headers are read here and not by `tarfile`,
which ends quietly at a damaged header; a tar must end with its two zero blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from perilune.pretrain.data.source_file import MAX_DOCUMENT_BYTES, encodable
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import MAX_BYTES as MAX_IMAGE_BYTES

BLOCK = 512
MAX_HEADER_BYTES = 1 << 16  # of a pax header or a long name
MAX_SAMPLE_BYTES = 1 << 29
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
READ = (*IMAGES, ".txt", ".json")


@dataclass(frozen=True)
class _Member:
    name: str
    data: bytes | None  # None: not of an ending that is read
    at: int  # of its header


def tar_samples(stream: BinaryIO, name: str) -> Iterator[tuple[str, tuple[str | bytes, ...]]]:
    """(document id, its texts and encoded images in order) of each sample.

    Raises InputError naming the member and its byte for damage, links, limits, and samples that are none of the above.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    size = 0
    strange: str | None = None
    for member in tar_members(stream, name):
        folder, _, last = member.name.rpartition("/")
        stem, _, ending = last.partition(".")
        if not stem or not ending:
            strange = strange or member.name
            continue
        own = f"{folder}/{stem}" if folder else stem
        if own != key:
            if key is not None:
                yield f"{name}:{key}", _sample(parts, f"{name}:{key}")
            key, parts, size = own, {}, 0
        if member.data is None:
            continue
        if ending in parts:
            raise InputError(f"{name}: member {member.name!r} at byte {member.at} is there twice")
        parts[ending] = member.data
        size += len(member.data)
        if size > MAX_SAMPLE_BYTES:
            raise InputError(f"{name}: sample {own!r} has more than {MAX_SAMPLE_BYTES} bytes. Cut it up")
    if key is not None:
        yield f"{name}:{key}", _sample(parts, f"{name}:{key}")
    elif strange is not None:
        raise InputError(f"{name}: no member has a name of the form KEY.ENDING, as {strange!r} has not. Write it anew")


def tar_members(stream: BinaryIO, name: str) -> Iterator[_Member]:
    """The regular members, one after the other; folders are passed over, links and devices refused."""
    at, long_name, zeros = 0, None, 0
    while True:
        head = stream.read(BLOCK)
        if len(head) < BLOCK:
            raise InputError(f"{name}: ends at byte {at + len(head)} without the two zero blocks of a whole tar. "
                             "Fetch it again")  # fmt: skip
        if not any(head):
            zeros += 1
            if zeros == 2:
                return
            at += BLOCK
            continue
        if zeros:
            raise InputError(f"{name}: a zeroed block at byte {at - BLOCK} inside the tar. Fetch it again")
        own, kind, size = _header(head, name, at)
        begin, at = at, at + BLOCK + size + -size % BLOCK
        if kind in b"xL":
            if size > MAX_HEADER_BYTES:
                raise InputError(f"{name}: a name of {size} bytes at byte {begin}; the limit is {MAX_HEADER_BYTES}")
            data = _payload(stream, size, name, begin)
            long_name = _pax_path(data, name, begin) if kind == b"x" else data.rstrip(b"\0").decode("utf-8", "replace")
        elif kind in b"5g":
            _skip(stream, size, name, begin)
            long_name = None
        elif kind in b"0\0":
            member_name = long_name or own
            long_name = None
            ending = next((e for e in READ if member_name.lower().endswith(e)), None)
            limit = MAX_IMAGE_BYTES if ending in IMAGES else MAX_DOCUMENT_BYTES
            if ending is None:
                _skip(stream, size, name, begin)
                yield _Member(member_name, None, begin)
            elif size > limit:
                raise InputError(
                    f"{name}: member {member_name!r} at byte {begin} has {size} bytes; the limit is {limit}"
                )
            else:
                yield _Member(member_name, _payload(stream, size, name, begin), begin)
        else:
            raise InputError(f"{name}: member {own!r} at byte {begin} is a link or device (type {kind!r}), "
                             "never followed. Write the tar with plain files")  # fmt: skip


def _header(head: bytes, name: str, at: int) -> tuple[str, bytes, int]:
    """(name, type, size); InputError where the header's own checksum does not fit."""
    try:
        stored = int(head[148:156].strip(b" \0") or b"0", 8)
        field = head[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise InputError(f"{name}: no tar header at byte {at}. Fetch it again") from error
    if stored != sum(head[:148]) + sum(head[156:]) + 8 * 0x20 or size < 0:
        raise InputError(f"{name}: the tar header at byte {at} is damaged (its checksum does not fit). Fetch it again")
    own = head[:100].rstrip(b"\0").decode("utf-8", "replace")
    prefix = head[345:500].rstrip(b"\0").decode("utf-8", "replace") if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{own}" if prefix else own, head[156:157], size


def _pax_path(data: bytes, name: str, at: int) -> str | None:
    """The `path` of a pax header; other records tell nothing needed here, except a size, which is refused."""
    path = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 9 or not 0 < int(length) <= len(data):
            raise InputError(f"{name}: the pax header at byte {at} cannot be read. Fetch it again")
        key, _, value = data[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "replace")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            word = key.decode("utf-8", "replace")
            raise InputError(f"{name}: the pax header at byte {at} sets {word!r}, which no plain file needs")
        data = data[int(length) :]
    return path


def _payload(stream: BinaryIO, size: int, name: str, at: int) -> bytes:
    data = stream.read(size + -size % BLOCK)
    if len(data) < size + -size % BLOCK:
        raise InputError(f"{name}: the member at byte {at} has {size} bytes, of which {min(size, len(data))} are "
                         "there. Fetch it again")  # fmt: skip
    return data[:size]


def _skip(stream: BinaryIO, size: int, name: str, at: int) -> None:
    left = size + -size % BLOCK
    while left:
        data = stream.read(min(left, 1 << 20))
        if not data:
            raise InputError(f"{name}: the member at byte {at} has {size} bytes; the last {left} are missing")
        left -= len(data)


def _sample(parts: dict[str, bytes], source: str) -> tuple[str | bytes, ...]:
    images = {ending: data for ending, data in parts.items() if f".{ending}".lower().endswith(IMAGES)}
    about = _json(parts["json"], source) if "json" in parts else {}
    if isinstance(about.get("texts"), list) and isinstance(about.get("images"), list):
        return _interleaved(about["texts"], about["images"], images, source)
    if "txt" in parts:
        text: object = _text(parts["txt"], source)
    else:
        text = about.get("caption", about.get("text"))
    if not isinstance(text, str) or len(images) > 1:
        raise InputError(
            f"{source}: members {sorted(parts)}; a sample is an image and its .txt (or .json with a string "
            "`caption` or `text`), or a .json with lists `texts` and `images` beside its images"
        )
    pair: list[str | bytes] = [*images.values(), encodable(text, source)]
    return tuple(part for part in pair if part)


def _interleaved(texts: list, order: list, images: dict[str, bytes], source: str) -> tuple[str | bytes, ...]:
    if len(texts) != len(order):
        raise InputError(f"{source}: {len(texts)} texts and {len(order)} images; the lists must be of one length")
    out: list[str | bytes] = []
    for i, (text, image) in enumerate(zip(texts, order, strict=True)):
        if isinstance(text, str) and image is None:
            out.append(encodable(text, source))
        elif text is None and isinstance(image, str) and image in images:
            out.append(images[image])
        elif text is not None or image is not None:
            raise InputError(f"{source}: place {i} holds {text!r:.60} and {image!r:.60}; it must be a text or the "
                             f"ending of one of {sorted(images)}")  # fmt: skip
    if left := set(images) - {image for image in order if isinstance(image, str)}:
        raise InputError(f"{source}: images {sorted(left)} stand at no place of the document")
    return tuple(part for part in out if part)


def _json(data: bytes, source: str) -> dict:
    try:
        value = json.loads(_text(data, source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: its .json cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: its .json is a {type(value).__name__}, not an object")
    return value


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from error
