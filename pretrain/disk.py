"""A new file that is hashed, and on its way to the disk, while it is written: at its end little is left to wait for.

What is hashed are the bytes in the system's cache of the file, behind the writer, who never waits for it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Buffer
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_PIECE = 1 << 24  # bytes handed to the system at once
_BEHIND = 1 << 22  # bytes that are written before a helper is asked to hash them
_WINDOW = 1 << 26  # bytes mapped at once
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
        """SHA-256 of what was written, once it is closed. Raises ValueError for a file that is not `hashed`."""
        if self._digest is None:
            raise ValueError("this file is not hashed")
        return self._digest.hexdigest()

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        try:
            rest = self._helpers.submit(self._hash, self._hashing, self.size)
            if self._syncing is not None:
                self._syncing.result()  # an error of the disk is told once: here if the helper met it
            os.fsync(self._descriptor)
            rest.result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without waiting for the disk."""
        self._helpers.shutdown()
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
            if self.size - self._hashed >= _BEHIND and (self._hashing is None or self._hashing.done()):
                self._hashing = self._helpers.submit(self._hash, self._hashing, self.size)

    def _hash(self, before: Future[None] | None, end: int) -> None:
        """Go on to byte `end`, after what was asked for `before`."""
        if before is not None:
            before.result()
        while self._digest is not None and self._hashed < end:
            skipped = self._hashed % mmap.ALLOCATIONGRANULARITY
            length = skipped + min(end - self._hashed, _WINDOW)
            mapped = mmap.mmap(
                self._descriptor, length, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=self._hashed - skipped
            )
            with mapped, memoryview(mapped) as whole, whole[skipped:] as part:
                self._digest.update(part)
            self._hashed += length - skipped
