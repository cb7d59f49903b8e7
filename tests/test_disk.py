"""A file that is hashed behind its writer: the hash is of all its bytes, whatever they came in."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from perilune.pretrain import disk
from perilune.pretrain.disk import SyncedFile


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (4096,), (1, 4095, 4097, 1 << 22, 3), (1 << 23, 5, 1 << 22, 1 << 20)]
)
def test_the_hash_is_of_what_the_file_holds(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_READ", 10_000)  # no divisor of anything
    draw = random.Random(0)
    pieces = [bytearray(draw.randbytes(size)) for size in sizes]
    expected = b"".join(pieces)
    with SyncedFile(tmp_path / "file", hashed=True) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
            piece[:] = bytes(len(piece))  # the writer's memory is its own again
    assert (tmp_path / "file").read_bytes() == expected
    assert file.size == len(expected) and file.hexdigest() == hashlib.sha256(expected).hexdigest()


def test_a_hash_that_cannot_be_made_is_told_when_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = SyncedFile(tmp_path / "file", hashed=True)
    file.write(bytes(1 << 20))  # too little for a helper to begin
    monkeypatch.setattr(disk.os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output error"):
        file.close()
    held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [path for path in held if path.startswith(str(tmp_path))]


def test_a_file_that_was_cut_is_no_file_to_hash(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ends at byte 10"), SyncedFile(tmp_path / "file", hashed=True) as file:
        file.write(bytes(1 << 20))
        os.truncate(tmp_path / "file", 10)


def test_what_is_given_up_is_not_hashed_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SyncedFile(tmp_path / "file", hashed=True) as file:
        for _ in range(16):
            file.write(bytes(1 << 24))
        raise KeyboardInterrupt
    assert file._hashed < file.size
    with pytest.raises(ValueError, match="not closed"):
        SyncedFile(tmp_path / "other", hashed=True).hexdigest()


def test_a_file_that_is_not_hashed_is_written_anywhere(tmp_path: Path) -> None:
    with SyncedFile(tmp_path / "file", hashed=False) as file:
        file.write_at(b"there", 5)
        file.write_at(b"here ", 0)
        with pytest.raises(ValueError, match="not hashed"):
            file.hexdigest()
    assert (tmp_path / "file").read_bytes() == b"here there" and file.size == 10
    with SyncedFile(tmp_path / "other", hashed=True) as hashed, pytest.raises(ValueError, match="front to back"):
        hashed.write_at(b"x", 0)
