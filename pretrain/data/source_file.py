"""A source file as a stream of bytes, wherever it lies, and what is known of it for a manifest.

A remote file is read by ranges through `storage`, so that a store that fails, stalls or answers short is asked again.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from perilune.pretrain.data import storage
from perilune.pretrain.data.storage import Remote, RemoteStore, is_url, open_store
from perilune.pretrain.errors import InputError

Split = Literal["train", "valid"]

MAX_DOCUMENT_BYTES = 1 << 28
BLOCK_BYTES = 1 << 22  # of one ranged read of a remote file
VERSIONS = ("etag", "content-md5", "digest", "md5hash", "crc32c", "generation", "versionid", "last-modified", "mtime")


@dataclass(frozen=True)
class SourceFile:
    path: str  # on this machine, or a URL
    name: str  # what document ids start with: the path as the user wrote it, or `stdlib/...`
    split: Split | None = None  # None: decided document by document
    spec: str = ""  # the SRC that found it

    @property
    def ending_of(self) -> str:
        """The name in lower case without a URL's query, for comparing endings."""
        return re.sub(r"\?.*", "", self.path).lower() if is_url(self.path) else self.path.lower()

    def open(self) -> BinaryIO:
        """Its bytes, to be read and sought. Raises InputError where it cannot be opened."""
        return open_path(self.path)

    def size(self) -> int:
        """Bytes."""
        with self.open() as stream:
            return stream.seek(0, io.SEEK_END)


def open_path(path: str) -> BinaryIO:
    """The file at a path or URL."""
    try:
        if is_url(path):
            return io.BufferedReader(_RemoteFile(path), BLOCK_BYTES)
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror or error}") from error


def decode(data: bytes, source: str) -> str:
    """UTF-8 as text, byte for byte. Raises InputError naming the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}). "
            "Convert it, for example with `iconv -f latin1 -t utf-8`, or leave it out"
        ) from error


def encodable(text: str, source: str) -> str:
    """`text` of JSON, whose \\u escapes can spell half a surrogate pair, which no UTF-8 can hold: InputError then."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: half a surrogate pair at character {error.start}: not Unicode text") from error
    return text


def describe(file: SourceFile) -> dict[str, Any]:
    """The file's name and size for a manifest, and its SHA-256, or for a remote file the version its store tells.

    Of a Megatron dataset the index and the tokens count together.
    """
    if file.ending_of.endswith(".idx"):
        parts = [_describe(file.path), _describe(token_file(file.path))]
        total = sum(part.pop("bytes") for part in parts)
        return {"name": file.name, "bytes": total, **parts[0], "tokens": parts[1]}
    return {"name": file.name, **_describe(file.path)}


def token_file(index: str) -> str:
    """The `.bin` beside a Megatron `.idx`."""
    return index[: -len(".idx")] + ".bin"


def _describe(path: str) -> dict[str, Any]:
    if is_url(path):
        where, _, name = path.rpartition("/")
        try:
            info = RemoteStore(where, Remote(retry_s=storage.FIRST_RETRY_S)).info(name)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        known = {key.lower(): str(value) for key, value in info.items() if value}
        version = {key: known[key] for key in VERSIONS if key in known}
        if version and isinstance(info.get("size"), int):
            return {"bytes": info["size"], "version": version}
    with open_path(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


class _RemoteFile(io.RawIOBase):
    """A remote file, unbuffered: each read is one request."""

    def __init__(self, url: str) -> None:
        where, _, self._name = url.rpartition("/")
        self._store = open_store(where)
        size = self._store.size(self._name)
        if size is None:
            raise InputError(f"{url}: the store does not tell its size; copy the file here first")
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._store.read_range(self._name, self._at, wanted)
        if len(data) != wanted:
            raise InputError(
                f"{self._store.where}/{self._name}: {len(data)} of {wanted} bytes at {self._at}; it changed"
            )
        buffer[:wanted] = data
        self._at += wanted
        return wanted
