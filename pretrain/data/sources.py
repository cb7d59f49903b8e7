"""Where text comes from: SRC of the command line -> documents, in one fixed order, each with an id and a split.

A SRC is a file, a folder (searched downwards), a glob, or `demo:stdlib`. What a document is, by ending:

    .txt .md .py            the file
    .jsonl[.gz|.zst]        one line: an object with a string `text`
    .parquet                one row: a string column `text`

Text is taken as it is, byte for byte: no newline is translated, nothing is normalised. What is not UTF-8 is an error,
never replaced. No source can make us hold more than MAX_DOCUMENT_BYTES of one document: compressed files are read line
by line, and a line beyond the limit is an error before it is held.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from perilune.pretrain.errors import InputError

Split = Literal["train", "valid"]

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN = (*PLAIN, *LINES, ".parquet")
DEMO = "demo:stdlib"
DEMO_VALID_FRACTION = 0.05  # of the standard library's files, by the hash of their path
DEMO_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

MAX_DOCUMENT_BYTES = 1 << 28
MAX_ROW_GROUP_BYTES = 1 << 32  # uncompressed bytes of a Parquet row group's text column
ZSTD_WINDOW_BYTES = 1 << 27  # what `zstd --long=27` writes; a frame that asks for more is refused


@dataclass(frozen=True)
class Document:
    source: str  # unique within the sources: file, or file:line
    text: str
    split: Split


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # what document ids start with: the path as the user wrote it, or `stdlib/...`
    split: Split | None = None  # None: decided document by document


def find_files(specs: Sequence[str]) -> list[SourceFile]:
    """The files of `specs`: in their order, sorted inside a folder or glob, each file once.

    Raises InputError where a SRC finds nothing, or names a file whose ending is not known.
    """
    if not specs:
        raise InputError(f"no source: name files, folders, globs or {DEMO}")
    files: dict[Path, SourceFile] = {}
    for spec in specs:
        for file in _find(spec):
            files.setdefault(file.path.resolve(), file)
    return list(files.values())


def has_held_out_files(specs: Sequence[str]) -> bool:
    """Whether a SRC brings its own held-out files."""
    return DEMO in specs


def documents(specs: Sequence[str], split: Split | None = None, valid_fraction: float = 0.0) -> Iterator[Document]:
    """All documents of `specs`, or those of one split. Empty ones, which hold no token, are left out.

    `valid_fraction` of the documents, by the hash of their text (so equal documents never straddle the splits), are
    `valid`; the files of `demo:stdlib` are split file by file whatever the fraction.
    """
    return read_files(find_files(specs), split, valid_fraction)


def read_files(
    files: Iterable[SourceFile], split: Split | None = None, valid_fraction: float = 0.0
) -> Iterator[Document]:
    """`documents` of files already found."""
    for file in files:
        if file.split is not None and split not in (None, file.split):
            continue
        for source, text in _texts(file):
            if not text:
                continue
            own = file.split or _split_of(text, valid_fraction)
            if split in (None, own):
                yield Document(source, text, own)


def held_out_bytes(spec: str) -> bytes:
    """The held-out documents of `spec` end to end, as `xz` would see them beside the model's bits per byte."""
    if spec != DEMO:
        raise InputError(f"{spec}: only {DEMO} has held-out files of its own")
    return b"".join(document.text.encode() for document in documents([spec], "valid"))


def describe(file: SourceFile) -> dict[str, Any]:
    """The file's name, size and SHA-256, for a manifest."""
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"name": file.name, "bytes": stream.tell(), "sha256": digest}


def _find(spec: str) -> list[SourceFile]:
    if spec == DEMO:
        return _standard_library()
    if spec.startswith("demo:"):
        raise InputError(f"{spec}: the only demo source is {DEMO}")
    path = Path(spec)
    if path.is_dir():
        paths = sorted(_walk(path), key=lambda p: p.as_posix())
        if not paths:
            raise InputError(f"{spec}: no file below this folder ends in {', '.join(KNOWN)}")
    elif path.exists():
        paths = [path]
    elif glob.has_magic(spec):
        paths = sorted(Path(p) for p in glob.glob(spec, recursive=True) if os.path.isfile(p))
        if not paths:
            raise InputError(f"{spec}: no file matches this pattern")
    else:
        raise InputError(f"{spec}: no such file or folder")
    for p in paths:
        if not p.is_file():
            raise InputError(f"{p}: not a regular file")
        if _ending(p) is None:
            raise InputError(f"{p}: unknown ending; known are {', '.join(KNOWN)}")
    return [SourceFile(p, p.as_posix()) for p in paths]


def _walk(folder: Path) -> Iterator[Path]:
    """Files of a known ending; links to folders are not followed, since they can form a circle."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if _ending(path) is not None and path.is_file():
                yield path


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
        SourceFile(root / name, f"stdlib/{name}", "valid" if _hash(name) < DEMO_VALID_FRACTION else "train")
        for name in sorted(found)
    ]


def _split_of(text: str, valid_fraction: float) -> Split:
    return "valid" if valid_fraction > 0 and _hash(text) < valid_fraction else "train"


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def _ending(path: Path) -> str | None:
    name = path.name.lower()
    return next((ending for ending in KNOWN if name.endswith(ending)), None)


def _texts(file: SourceFile) -> Iterator[tuple[str, str]]:
    """(document id, text) of one file."""
    ending = _ending(file.path)
    if ending in PLAIN:
        size = file.path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(f"{file.name}: {size} bytes in one document; the limit is {MAX_DOCUMENT_BYTES}. Cut it up")
        yield file.name, _decode(file.path.read_bytes(), file.name)
    elif ending == ".parquet":
        yield from _parquet(file)
    else:
        with file.path.open("rb") as raw:
            yield from _lines(raw, ending, file.name)


def _lines(raw: BinaryIO, ending: str | None, name: str) -> Iterator[tuple[str, str]]:
    import zstandard

    stream: Any = raw
    if ending == ".jsonl.gz":
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
    elif ending == ".jsonl.zst":
        unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        stream = io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True))
    number = 0
    try:
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            source = f"{name}:{number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{source}: a line beyond the limit of {MAX_DOCUMENT_BYTES} bytes. Cut it up")
            if not line.isspace():
                yield source, _json_text(line, source)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{name}: cannot be unpacked after line {number}: {error}. Fetch or pack it again") from error


def _json_text(line: bytes, source: str) -> str:
    try:
        value = json.loads(_decode(line, source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a line of JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"an object with {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f"{source}: {found:.200}; the line must be an object with a string `text`")
    return _encodable(text, source)


def _parquet(file: SourceFile) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            if "text" not in schema.names:
                raise InputError(f"{file.name}: columns {schema.names}; a string column `text` is needed")
            kind = schema.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(f"{file.name}: the column `text` is {kind}; it must be a string")
            leaves = [table.schema.column(i).path for i in range(len(table.schema))]
            row = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).column(leaves.index("text")).total_uncompressed_size
                if size > MAX_ROW_GROUP_BYTES:
                    raise InputError(
                        f"{file.name}: row group {group} unpacks to {size} bytes of text; the limit is "
                        f"{MAX_ROW_GROUP_BYTES}. Write it with smaller row groups"
                    )
                for batch in table.iter_batches(1024, row_groups=[group], columns=["text"]):
                    for value in batch.column(0):
                        row += 1
                        yield f"{file.name}:{row}", _parquet_text(value, f"{file.name}:{row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file.name}: not a Parquet file that can be read: {error}") from error


def _parquet_text(value: Any, source: str) -> str:
    if not value.is_valid:
        return ""
    data = value.as_buffer().to_pybytes()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError(f"{source}: {len(data)} bytes in one document; the limit is {MAX_DOCUMENT_BYTES}. Cut it up")
    return _decode(data, source)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}). "
            "Convert it, for example with `iconv -f latin1 -t utf-8`, or leave it out"
        ) from error


def _encodable(text: str, source: str) -> str:
    """JSON's \\u escapes can spell half a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: half a surrogate pair at character {error.start}: not Unicode text") from error
    return text
