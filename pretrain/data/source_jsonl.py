"""Documents of .jsonl[.gz|.zst], a line each: a text, or texts and images that lie beside the file.

    {"text": "..."}
    {"parts": [{"image": "pictures/1.png"}, {"text": "a moon"}, {"image": "pictures/2.jpg"}, {"text": "a sun"}]}

Images stand in a list of parts, and not as a mark such as `<image>` inside a text, because text is taken as it is: a
text that holds such a mark means it. Other fields are passed over.

The path of an image is relative to the folder of the file, and leads nowhere out of it: `..`, absolute paths, URLs and
links to elsewhere are refused, since a corpus may come from anyone.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from perilune.pretrain.data.source_file import MAX_DOCUMENT_BYTES, SourceFile, decode, encodable, open_path
from perilune.pretrain.data.source_tar import MAX_SAMPLE_BYTES
from perilune.pretrain.data.source_zstd import Zstd
from perilune.pretrain.data.storage import is_url
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import MAX_BYTES as MAX_IMAGE_BYTES

RULE = 'the line must be an object with a string `text`, or with a list `parts` of {"text": ...} and {"image": PATH}'


def json_lines(file: SourceFile, ending: str) -> Iterator[tuple[str, tuple[str | bytes, ...]]]:
    """(document id, its texts and encoded images in order) of each line that is not blank.

    Raises InputError naming file and line for damage, limits, lines of another form, and images that are not there or
    not below the file's folder.
    """
    import zstandard

    number = 0
    with file.open() as raw:
        stream: Any = raw
        if ending == ".jsonl.gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif ending == ".jsonl.zst":
            stream = io.BufferedReader(Zstd(raw))
        while True:
            try:
                line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise InputError(
                    f"{file.name}: cannot be unpacked after line {number}: {error}. Fetch or pack it again"
                ) from error
            if not line:
                return
            number += 1
            source = f"{file.name}:{number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{source}: a line beyond the limit of {MAX_DOCUMENT_BYTES} bytes. Cut it up")
            if not line.isspace():
                yield source, _document(line, source, file.path)


def _document(line: bytes, source: str, path: str) -> tuple[str | bytes, ...]:
    try:
        value = json.loads(decode(line, source))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a line of JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{source}: a {type(value).__name__}; {RULE}")
    if isinstance(value.get("parts"), list) and "text" not in value:
        return _parts(value["parts"], source, path)
    text = value.get("text")
    if not isinstance(text, str) or "parts" in value:
        raise InputError(f"{source}: {f'an object with {sorted(value)}':.200}; {RULE}")
    return (encodable(text, source),) if text else ()


def _parts(parts: list[Any], source: str, path: str) -> tuple[str | bytes, ...]:
    out: list[str | bytes] = []
    size = 0
    for i, part in enumerate(parts):
        match part:
            case {"text": str(text), **rest} if not rest:
                out.append(encodable(text, source))
            case {"image": str(name), **rest} if not rest:
                data = _image(name, source, path)
                size += len(data)
                if size > MAX_SAMPLE_BYTES:
                    raise InputError(f"{source}: images of more than {MAX_SAMPLE_BYTES} bytes in all. Cut it up")
                out.append(data)
            case _:
                raise InputError(f"{source}: part {i} is {part!r:.100}; {RULE}")
    return tuple(part for part in out if part)


def _image(name: str, source: str, path: str) -> bytes:
    """The bytes of the image `name` beside the jsonl at `path`."""
    said = f"{source}: image {name!r:.200}"
    inner = PurePosixPath(name)
    odd = "\\\0" + ("%?#*" if is_url(path) else "")  # in a URL, these can spell `..` or another file
    if not inner.parts or inner.is_absolute() or ".." in inner.parts or set(name) & set(odd) or is_url(name):
        raise InputError(f"{said}: must be a path relative to the folder of the jsonl, which does not leave it")
    try:
        with open_path(_remote(inner, path) if is_url(path) else _local(inner, path)) as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    except (InputError, OSError) as error:
        raise InputError(f"{said}: cannot be read: {error}") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"{said}: more than {MAX_IMAGE_BYTES} bytes, which is the limit. Scale it down")
    if not data:
        raise InputError(f"{said}: an empty file. Fetch it again or leave it out")
    return data


def _local(inner: PurePosixPath, path: str) -> str:
    """Where the image lies, once links are followed."""
    folder = Path(path).parent.resolve()
    found = Path(os.path.realpath(folder / inner))
    if not found.is_relative_to(folder):
        raise InputError(f"it leads to {found}, out of {folder}; copy the file there")
    if not stat.S_ISREG(found.stat().st_mode):  # a pipe would never answer, a device never end
        raise InputError(f"{found} is not a regular file")
    return str(found)


def _remote(inner: PurePosixPath, path: str) -> str:
    return f"{path.partition('?')[0].rpartition('/')[0]}/{inner}"
