"""A folder that is complete or not there: written beside under a hidden name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perilune.pretrain.errors import InputError, make_folder

_LONGEST = 255 - len("..XXXXXXXX.partial")  # bytes of a name


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out`, which becomes `out` if the body ends well and is removed if it raises.

    What a killed process leaves is `.NAME.XXXXXXXX.partial`, which nothing takes for complete. Raises InputError if
    `out` is there already, before and after: it is never written over; and for a full disk.
    """
    out = out.absolute()
    refuse_existing(out)
    make_folder(out.parent)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        refuse_existing(out)
        os.rename(temporary, out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if full := _full_disk(error):
            raise InputError(f"{out} was not written: {full.strerror}; make room, or name another --out") from error
        raise


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk that `error` is or hides: torch's writer puts one of its own before it."""
    while error is not None and not isinstance(error, InputError):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def refuse_existing(out: Path) -> None:
    """Raises InputError if anything is at `out`, or if its name leaves no room for the hidden one's ending."""
    if (size := len(os.fsencode(out.name))) > _LONGEST:
        raise InputError(f"--out ends in a name of {size} bytes; at most {_LONGEST} are allowed: name a shorter one")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} is there already and is never written over: name another --out, or move it away")


def write_text(path: Path, text: str) -> None:
    """Write and sync a new text file."""
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, tree: Any) -> None:
    """Write and sync a new JSON file, indented as the hub's are."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises InputError if there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}, not an object")
    return tree


def sync_folder(path: Path) -> None:
    """Make the names in `path` last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
