"""A new file that is hashed, and on its way to the disk, while it is written: at its end little is left to wait for.

What is hashed are the bytes that the system gives back of the file, from its cache as a rule, behind the writer, who
does not wait for that. Read and not mapped: a page that cannot be read would be a signal that ends the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Buffer
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_PIECE = 1 << 24  # bytes handed to the system at once
_BEHIND = 1 << 22  # bytes that are written before a helper is asked to hash them
_READ = 1 << 20  # bytes read at once, into memory that stays in a core's cache
_AHEAD = 1 << 26  # bytes written between two requests to sync


class SyncedFile:
    """`close` returns once every byte is on the disk; leaving by an exception does not wait for that.

    A `hashed` file is written front to back.

    Raises OSError where the file cannot be made, written or synced, whichever call notices.
    """

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self.size = 0
        self._digest = hashlib.sha256() if hashed else None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="synced-file")
        self._syncing: Future[None] | None = None
        self._unsynced = 0  # bytes written since a sync was last asked for
        self._hashing: Future[None] | None = None
        self._hashed = 0
        self._one_hashes = threading.Lock()  # at a time, in the file's order
        self._given_up = False

    def __enter__(self) -> SyncedFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def write(self, data: Buffer) -> int:
        """Append `data`, which may change once this returns. Returns its bytes."""
        view = memoryview(data).cast("B")
        self._put(view, self.size)
        return len(view)

    def write_at(self, data: Buffer, start: int) -> None:
        """Put `data` at byte `start`. Raises ValueError for a file that is `hashed`."""
        if self._digest is not None:
            raise ValueError("a hashed file is written front to back")
        self._put(memoryview(data).cast("B"), start)

    def flush(self) -> None:
        """Nothing is held back; torch.save asks for it."""

    def hexdigest(self) -> str:
        """SHA-256 of what was written. Raises ValueError for a file that is not `hashed`, or not closed."""
        if self._digest is None or self._descriptor >= 0:
            raise ValueError("this file is not hashed" if self._digest is None else "this file is not closed")
        return self._digest.hexdigest()

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        try:
            rest = self._helpers.submit(self._hash, self.size) if self._digest is not None else None
            if self._syncing is not None:
                self._syncing.result()  # an error of the disk is told once: here if the helper met it
            os.fsync(self._descriptor)
            if rest is not None:
                rest.result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close, waiting for no more than the helpers have in hand: a sync, a piece that is hashed."""
        self._given_up = True
        self._helpers.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _put(self, view: memoryview, start: int) -> None:
        at = 0
        while at < len(view):
            count = os.pwrite(self._descriptor, view[at : at + _PIECE], start + at)
            at += count
            self.size = max(self.size, start + at)
            self._unsynced += count
            if self._unsynced >= _AHEAD and (self._syncing is None or self._syncing.done()):
                if self._syncing is not None:
                    self._syncing.result()
                self._unsynced, self._syncing = 0, self._helpers.submit(os.fsync, self._descriptor)
            if self._digest is None or self.size - self._hashed < _BEHIND:
                continue
            if self._hashing is None or self._hashing.done():
                if self._hashing is not None:
                    self._hashing.result()
                self._hashing = self._helpers.submit(self._hash, self.size)

    def _hash(self, end: int) -> None:
        """Go on to byte `end`."""
        assert self._digest is not None
        buffer = memoryview(bytearray(_READ))
        with self._one_hashes:
            while self._hashed < end and not self._given_up:
                count = os.preadv(self._descriptor, [buffer[: end - self._hashed]], self._hashed)
                if not count:
                    raise OSError(errno.EIO, f"the file ends at byte {self._hashed}, and {end} were written")
                self._digest.update(buffer[:count])
                self._hashed += count
