"""A zstd file unpacked a piece at a time; one that was cut is an error, and never a shorter file.

`zstandard`'s own stream reader ends quietly inside a frame, and what was unpacked of its last block is lost.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

WINDOW_BYTES = 1 << 27  # what `zstd --long=27` writes; a frame that asks for more is refused
PIECE_BYTES = 1 << 12  # unpacked at once: a block of 128 KiB takes 4 bytes at least, so this holds 128 MiB at most


class Zstd(io.RawIOBase):
    """The frames of `packed` end to end. Reading raises EOFError inside a frame that ends too early."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
        self._frame: Any = None  # the one begun
        self._left, self._out = b"", memoryview(b"")  # packed bytes of the next frame; what nobody took yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._left or self._packed.read(PIECE_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._unpacker.decompressobj()
            self._out = memoryview(self._frame.decompress(data))
            self._left = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size
