"""Where a packed dataset lies: a folder, or a prefix that fsspec opens (s3://, gs://, https://).

Everything is a ranged read of a named file. A remote store is asked again, with growing pauses, when it fails, stalls
or answers short; what it gave is kept in a bounded cache on local disk. Nothing here believes the bytes: the reader
verifies every sample, wherever it came from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import stat
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from perilune.pretrain.errors import InputError

OPEN_FILES = 64  # descriptors kept
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
FIRST_RETRY_S = 30.0  # of a first question to a store, by a command: a host that was mistyped is told soon
BUCKETS = 64  # of the cache: each is kept within its part of the limit
T = TypeVar("T")


class StoreError(InputError):
    """A store that fails, stalls or refuses; unlike damage it says nothing about the data."""


@dataclass(frozen=True)
class Remote:
    """How remote stores are read."""

    timeout_s: float = 60.0  # of one request
    retry_s: float = 300.0  # of requests that fail, one after the other, before it is an error
    cache_dir: str | None = None  # None: ~/.cache/perilune/rows
    cache_bytes: int = 0  # 0: no cache


class Store(Protocol):
    """Files by name below one place. A file that is not there is a FileNotFoundError everywhere."""

    where: str

    def read(self, name: str) -> bytes:
        """The whole of a small file."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer only where the file is shorter."""

    def size(self, name: str) -> int | None:
        """Bytes of the file; None where the store does not tell."""

    def forget(self, name: str, offset: int) -> None:
        """Drop what a cache holds of this read: it proved wrong."""

    def close(self) -> None:
        """Let go of what is open."""


def is_url(path: str) -> bool:
    """Whether `path` is for fsspec."""
    return "://" in path


def join(path: str, name: str) -> str:
    """`name` below `path`, a folder or a prefix."""
    return f"{path.rstrip('/')}/{name}"


def open_store(path: Path | str, remote: Remote | None = None) -> Store:
    """The store at `path`. Raises InputError for a prefix of no known kind, or one whose library is missing."""
    text = str(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStore(text, remote or Remote()) if is_url(text) else LocalStore(text)


class LocalStore:
    """A folder; safe to read from several threads."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._open: OrderedDict[str, int] = OrderedDict()  # name -> file descriptor, least recently used first
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        try:
            with os.fdopen(_open_regular(Path(self.where) / name), "rb") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise StoreError(f"{join(self.where, name)} cannot be read: {error.strerror}") from error

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        # Under the lock, so that no other thread closes the descriptor while it is read from.
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
            else:
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[name] = _open_regular(Path(self.where) / name)
            return os.pread(self._open[name], length, offset)

    def size(self, name: str) -> int:
        path = Path(self.where) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path.stat().st_size

    def forget(self, name: str, offset: int) -> None:
        del name, offset

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


def _open_regular(path: Path) -> int:
    """A descriptor to read from; OSError where it is a device or a pipe, which might never answer or never end."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return opened


class RemoteStore:
    """A prefix of an object store or a web server."""

    def __init__(self, path: str, remote: Remote) -> None:
        import fsspec

        self.where = path.rstrip("/")
        self._remote = remote
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.where)
        except (ImportError, ValueError) as error:
            raise InputError(f"{path} cannot be opened: {error}") from error
        self._cache = Cache(remote.cache_dir, remote.cache_bytes) if remote.cache_bytes else None

    def read(self, name: str) -> bytes:
        return self._again(name, lambda: self._call("cat_file", name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        key = self._key(name, offset)
        if self._cache is not None and (kept := self._cache.get(key)) is not None and len(kept) == length:
            return kept
        data = self._again(name, lambda: self._fetch(name, offset, length))
        if self._cache is not None and len(data) == length:
            self._cache.put(key, data)
        return data

    def size(self, name: str) -> int | None:
        return self.info(name).get("size")

    def info(self, name: str) -> dict[str, Any]:
        """What the store tells of the file."""
        return self._again(name, lambda: self._call("info", name))

    def forget(self, name: str, offset: int) -> None:
        if self._cache is not None:
            self._cache.drop(self._key(name, offset))

    def close(self) -> None:
        pass

    def _key(self, name: str, offset: int) -> str:
        return hashlib.sha256(f"{self.where}/{name}@{offset}".encode()).hexdigest()

    def _fetch(self, name: str, offset: int, length: int) -> bytes:
        """One ranged read. Short only where the file is; else a short answer is an OSError, to be asked again."""
        try:
            data = self._call("cat_file", name, start=offset, end=offset + length)
        except (FileNotFoundError, TimeoutError):
            raise
        except Exception:
            if self._ends_before(name, offset + length):  # a server refuses a range beyond the end
                return b""
            raise
        if len(data) > length:
            raise StoreError(f"{self.where}/{name}: asked for {length} bytes, the store sent {len(data)}: it does not "
                             "read by ranges; serve the dataset from a store that does, or copy it here")  # fmt: skip
        if len(data) < length and not self._ends_before(name, offset + length):
            raise OSError(f"{len(data)} of {length} bytes at {offset} came")
        return data

    def _ends_before(self, name: str, end: int) -> bool:
        try:
            size = self._call("info", name).get("size")
        except Exception:  # then nothing is known: the first error counts
            return False
        return size is not None and size < end

    def _call(self, method: str, name: str, **more: Any) -> Any:
        """`method` of the file system within the time-out, where the file system can be interrupted at all."""
        path = f"{self._root.rstrip('/')}/{name}"
        try:
            if self._files.async_impl:
                from fsspec.asyn import sync

                call = getattr(self._files, f"_{method}")
                return sync(self._files.loop, call, path, timeout=self._remote.timeout_s, **more)
            return getattr(self._files, method)(path, **more)
        except FileNotFoundError as error:
            # Of a web server fsspec's `info` says so whatever happened: what did is the cause.
            why = error.__cause__
            if "https" in self._files.protocol and why is not None and getattr(why, "status", None) not in (404, 410):
                raise why from None
            raise

    def _again(self, name: str, call: Callable[[], T]) -> T:
        """`call`, repeated with growing pauses while it fails in ways that may pass; StoreError when time is up."""
        began, pause, tries = time.monotonic(), FIRST_PAUSE_S, 0
        while True:
            tries += 1
            try:
                return call()
            except (FileNotFoundError, InputError):
                raise
            except Exception as error:  # every store has exceptions of its own
                waited = time.monotonic() - began
                if not _may_pass(error) or waited + pause > self._remote.retry_s:
                    raise StoreError(
                        f"{self.where}/{name} cannot be read: {type(error).__name__}: {error or 'no answer'}; tried "
                        f"{tries} times in {waited:.0f} s (data.timeout_s, data.retry_s). Check that the "
                        "address is right, the store and the network; the same command continues from the last "
                        "checkpoint"
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _may_pass(error: Exception) -> bool:
    """Whether asking again can help: not where the request itself was refused."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return not isinstance(error, (PermissionError, ImportError, NotImplementedError))


class Cache:
    """Byte strings by key in files of a folder, within a limit; the least recently used go first.

    Several processes may share the folder: files appear by rename, and each process looks at a bucket again after it
    has written a sixteenth of its part, so that the limit is passed by no more than that for each process.
    """

    def __init__(self, folder: str | None, limit: int) -> None:
        self._folder = Path(folder) if folder else Path.home() / ".cache" / "perilune" / "rows"
        self._part = limit // BUCKETS
        self._written = dict.fromkeys(range(BUCKETS), self._part)  # since the last look; at the start: look

    def get(self, key: str) -> bytes | None:
        """The bytes, which count as used now."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, unless it is larger than a bucket. A disk that is full or read-only ends the caching."""
        if len(data) > self._part:
            return
        path, bucket = self._path(key), int(key[:8], 16) % BUCKETS
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._written[bucket] += len(data)
            if self._written[bucket] > self._part // 16:
                self._written[bucket] = 0
                _shrink(path.parent, self._part - len(data))
            scratch.write_bytes(data)
            os.replace(scratch, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            warnings.warn(f"rows are not cached any more in {self._folder}: {error}", stacklevel=2)
            self._part = -1

    def drop(self, key: str) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{int(key[:8], 16) % BUCKETS:02d}" / key


def _shrink(folder: Path, limit: int) -> None:
    """Remove the files used longest ago until the others hold `limit` bytes at most."""
    found = []
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except FileNotFoundError:  # another process removed it
            continue
        found.append((status.st_mtime_ns, status.st_size, entry.path))
    held = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if held <= limit:
            break
        Path(path).unlink(missing_ok=True)
        held -= size
