"""Where documents come from: SRC of the command line -> documents, in one fixed order, each with an id and a split.

A SRC is a file, a folder (searched downwards, links followed), a glob, each on this machine or behind fsspec (s3://,
gs://, https://), `demo:stdlib`, or `demo:glyphs` (`demo_glyphs`). What a document is, by ending:

    .txt .md .py            the file
    .jsonl[.gz|.zst]        one line: an object with a string `text`, or texts and images' paths (`source_jsonl`)
    .parquet                one row: a string column `text`, and images in a column `image` (`source_parquet`)
    .tar                    one WebDataset sample: an image-text pair or an interleaved document (`source_tar`)
    .idx, .bin              one document of a Megatron dataset, its tokens as they are (`source_tokens`)

Text is taken as it is, byte for byte: no newline is translated, nothing is normalised. What is not UTF-8 is an error,
never replaced. No source can make us hold more than MAX_DOCUMENT_BYTES of one document: compressed files are read line
by line, and a line beyond the limit is an error before it is held.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.data import source_file
from perilune.pretrain.data.demo_glyphs import (
    GLYPHS,
    describe_glyphs,
    glyph_files,
    glyph_records,
    is_glyph_spec,
    is_glyphs,
)
from perilune.pretrain.data.source_file import MAX_DOCUMENT_BYTES, SourceFile, Split, decode, token_file
from perilune.pretrain.data.source_jsonl import json_lines
from perilune.pretrain.data.source_parquet import parquet_rows
from perilune.pretrain.data.source_tar import tar_samples
from perilune.pretrain.data.source_tokens import token_documents
from perilune.pretrain.data.storage import is_url
from perilune.pretrain.errors import InputError

__all__ = [
    "DEMO", "PLAIN", "Document", "SourceFile", "Split", "describe", "documents", "find_files", "has_held_out_files",
    "held_out_bytes", "read_files", "read_placed",
]  # fmt: skip

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN = (*PLAIN, *LINES, ".parquet", ".tar", ".idx")
DEMO = "demo:stdlib"
DEMO_VALID_FRACTION = 0.05  # of the standard library's files, by the hash of their path
DEMO_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

Part = str | bytes | np.ndarray  # text, an encoded image, or token ids


@dataclass(frozen=True)
class Document:
    source: str  # unique within the sources: file, file:line or file:key
    parts: tuple[Part, ...]  # in order, none empty
    split: Split

    @property
    def text(self) -> str:
        """Its text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))


def find_files(specs: Sequence[str]) -> list[SourceFile]:
    """The files of `specs`: in their order, sorted inside a folder or glob, each file once.

    Raises InputError where a SRC finds nothing, or names a file whose ending is not known.
    """
    if not specs:
        raise InputError(f"no source: name files, folders, globs, {DEMO} or {GLYPHS}")
    files: dict[str, SourceFile] = {}
    for spec in specs:
        for file in _find(spec):
            made = is_url(file.path) or is_glyphs(file)
            files.setdefault(file.path if made else str(Path(file.path).resolve()), file)
    return list(files.values())


def has_held_out_files(specs: Sequence[str]) -> bool:
    """Whether a SRC brings its own held-out files."""
    return any(spec == DEMO or is_glyph_spec(spec) for spec in specs)


def documents(specs: Sequence[str], split: Split | None = None, valid_fraction: float = 0.0) -> Iterator[Document]:
    """All documents of `specs`, or those of one split. Empty ones, which hold no token, are left out.

    `valid_fraction` of the documents, by the hash of their text (so equal documents never straddle the splits), are
    `valid`; `demo:stdlib` is split file by file and `demo:glyphs` by what is drawn, whatever the fraction.
    """
    return read_files(find_files(specs), split, valid_fraction)


def read_files(
    files: Iterable[SourceFile], split: Split | None = None, valid_fraction: float = 0.0
) -> Iterator[Document]:
    """`documents` of files already found."""
    return (document for _, _, document in read_placed(list(files), split, valid_fraction))


def read_placed(
    files: Sequence[SourceFile], split: Split | None, valid_fraction: float, start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[int, int, Document]]:
    """(file, records read of it, document): the last two places, given as `start`, go on after that document."""
    for number, file in enumerate(files):
        if number < start[0] or (file.split is not None and split not in (None, file.split)):
            continue
        skip = start[1] if number == start[0] else 0
        for record, (source, parts) in enumerate(islice(_records(file), skip, None), skip + 1):
            if not parts:
                continue
            own = file.split or _split_of(parts, valid_fraction)
            if split in (None, own):
                yield number, record, Document(source, parts, own)


def describe(file: SourceFile) -> dict[str, Any]:
    """`source_file.describe`, or for what is made on the fly the versions that decide what it is."""
    return describe_glyphs(file) if is_glyphs(file) else source_file.describe(file)


def held_out_bytes(spec: str) -> bytes:
    """The held-out documents of `spec` end to end, as `xz` would see them beside the model's bits per byte."""
    if spec != DEMO:
        raise InputError(f"{spec}: only {DEMO} has held-out files of its own")
    return b"".join(document.text.encode() for document in documents([spec], "valid"))


def _find(spec: str) -> list[SourceFile]:
    if spec == DEMO:
        return _standard_library()
    if is_glyph_spec(spec):
        return glyph_files(spec)
    if spec.startswith("demo:"):
        raise InputError(f"{spec}: the demo sources are {DEMO} and {GLYPHS}")
    if is_url(spec) and not spec.startswith("file://"):
        return _find_remote(spec)
    local = spec.removeprefix("file://")
    path = Path(local)
    if path.is_dir():
        paths = sorted(_walk(path), key=lambda p: p.as_posix())
        if not paths:
            raise InputError(f"{spec}: no file below this folder ends in {', '.join(KNOWN)}")
    elif path.exists():
        paths = [path]
    elif glob.has_magic(local):
        paths = sorted(Path(p) for p in glob.glob(local, recursive=True) if not os.path.isdir(p))
        if not paths:
            raise InputError(f"{spec}: no file matches this pattern")
    else:
        raise InputError(f"{spec}: no such file or folder")
    for p in paths:
        if not p.is_file():
            what = "a link that leads nowhere" if p.is_symlink() and not p.exists() else "not a regular file"
            raise InputError(f"{p}: {what}. Repair it or move it away")
    return [_source(p.as_posix(), spec, lambda name: Path(name).is_file()) for p in paths]


def _find_remote(spec: str) -> list[SourceFile]:
    """The files of a URL, of a pattern with `*`, or below a prefix."""
    import fsspec

    try:
        files, inner = fsspec.core.url_to_fs(spec)
        if "*" in spec:
            found = [files.unstrip_protocol(path) for path in files.glob(inner)]
        elif _ending(spec.partition("?")[0]) or spec.partition("?")[0].endswith(".bin") or files.isfile(inner):
            found = [files.unstrip_protocol(inner)]
        else:
            found = [files.unstrip_protocol(path) for path in files.find(inner)]
            found = [path for path in found if _ending(path)]
        if not found:
            raise InputError(f"{spec}: nothing there that ends in {', '.join(KNOWN)}")
        return [_source(path, spec, files.exists) for path in sorted(found)]
    except InputError:
        raise
    except (ImportError, ValueError) as error:
        raise InputError(f"{spec} cannot be opened: {error}") from error
    except Exception as error:  # every store has exceptions of its own
        raise InputError(f"{spec}: its store says: {type(error).__name__}: {error}") from error


def _source(path: str, spec: str, exists: Callable[[str], bool]) -> SourceFile:
    """The file at `path`; of a Megatron dataset the index, whichever of its two files is named."""
    if path.lower().endswith(".bin"):
        path = path[: -len(".bin")] + ".idx"
    file = SourceFile(path, path, spec=spec)
    if _ending(file.ending_of) is None:
        raise InputError(f"{path}: unknown ending; known are {', '.join(KNOWN)}")
    if path.lower().endswith(".idx"):
        for needed in (path, token_file(path)):
            if not exists(needed):
                raise InputError(f"{needed}: missing; a Megatron dataset is an .idx and a .bin of one name")
    return file


def _walk(folder: Path) -> Iterator[Path]:
    """What has a known ending, links followed; each folder once, since links can form a circle."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}. Make it readable, or move it away")

    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()  # by which of two ways a folder is found must not depend on the disk
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(root, name) for name in names if _ending(name.lower()) is not None)


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in DEMO_SKIPPED]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [p.relative_to(root).as_posix() for p in paths if not p.is_symlink()]
    if not found:
        raise InputError(f"{DEMO}: no .py file in {root}; this Python comes without its standard library's source")
    return [
        SourceFile(str(root / name), f"stdlib/{name}", "valid" if _hash(name) < DEMO_VALID_FRACTION else "train", DEMO)
        for name in sorted(found)
    ]


def _split_of(parts: tuple[Part, ...], valid_fraction: float) -> Split:
    return "valid" if valid_fraction > 0 and _hash(*parts) < valid_fraction else "train"


def _hash(*parts: Part) -> float:
    """A number in [0, 1) that depends on nothing but the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


def _ending(name: str) -> str | None:
    """The known ending of a name in lower case."""
    return next((ending for ending in KNOWN if name.endswith(ending)), None)


def _records(file: SourceFile) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """(document id, parts) of one file; no parts where a record is empty."""
    ending = _ending(file.ending_of)
    if is_glyphs(file):
        yield from glyph_records(file)
    elif ending == ".tar":
        with file.open() as stream:
            yield from tar_samples(stream, file.name)
    elif ending == ".idx":
        for source, ids in token_documents(file):
            yield source, (ids,) if ids.size else ()
    elif ending == ".parquet":
        yield from parquet_rows(file)
    elif ending in LINES:
        yield from json_lines(file, ending)
    else:
        text = _plain(file)
        yield file.name, (text,) if text else ()


def _plain(file: SourceFile) -> str:
    with file.open() as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError(f"{file.name}: {file.size()} bytes in one document; the limit is {MAX_DOCUMENT_BYTES}. "
                         "Cut it up")  # fmt: skip
    return decode(data, file.name)
