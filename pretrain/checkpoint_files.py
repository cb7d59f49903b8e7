"""A checkpoint as files: its folder, the manifest that says what is in it, how it is committed, verified and retired.

    checkpoints/
      latest                      one line, the newest folder's name: for people and scripts, nothing here trusts it
      step_00001000/              there if and only if complete: it got this name by a rename, after the last fsync
        manifest.json             step, run state, versions, layout, and size and SHA-256 of every other file
        config.yaml               the run's configuration: whose tensors these are, wherever the folder is moved
        .metadata, __R_0.distcp   torch's distributed checkpoint (pretrain/checkpoint_shards.py)
      .step_00001000.XXXXXXXX/    a save that is under way, or was when its process died: the next save removes it

One process at a time changes such a folder (rank 0); nothing here talks to other ranks, and nothing needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from perilune.pretrain.errors import InputError

FORMAT = 1
MANIFEST, CONFIG = "manifest.json", "config.yaml"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")
log = logging.getLogger(__name__)
_NAMED = 3
_CHUNK = 1 << 20  # bytes read at once while hashing


class CheckpointError(InputError):
    """A checkpoint that cannot be used: damaged, not ours, or of another model. The message names the file."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint of which something is not as it was written: `folder`. The one before it may well be good."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


class SaveError(OSError):
    """A checkpoint that could not be written, on whichever rank. Those written before are as they were."""


def folder_name(step: int) -> str:
    """`step_00001000` for step 1000; sorts by step up to 10^8 steps, and `committed` beyond."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a committed checkpoint."""
    return int(path.name.rpartition("_")[2])


def committed(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and (entry / MANIFEST).is_file():
            found.append((int(match[1]), entry))
    return [entry for _, entry in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. To step back, delete the newer folders."""
    found = committed(folder)
    return found[-1] if found else None


# --- manifest -----------------------------------------------------------------------------------------------------


def json_only(state: dict[str, Any]) -> dict[str, Any]:
    """`state` as it comes back from JSON. Raises TypeError where that would change it (tuples, NaN, int keys...)."""
    try:
        again = json.loads(json.dumps(state, allow_nan=False))
    except ValueError as error:
        raise TypeError(f"run_state holds what JSON cannot: {error}") from error
    if again != state:
        changed = sorted(str(key) for key in state.keys() | again.keys() if state.get(key) != again.get(key))
        raise TypeError(f"run_state does not survive JSON (keys {', '.join(changed)}): use lists, and string keys")
    return again


def digest_of(body: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, itself checked. Raises CheckpointError."""
    file = path / MANIFEST
    if not file.is_file():
        inside = latest(path) or latest(path / "checkpoints")
        hint = f"; did you mean {inside}?" if inside else ": not a complete checkpoint of perilune"
        if (path / "config.json").is_file():
            hint += "; of a Hugging Face folder `perilune import` makes one"
        raise CheckpointError(f"{path} has no {MANIFEST}{hint}")
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
        sealed = manifest.pop("sha256", None) == digest_of(manifest)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(path, f"{file} is damaged: {type(error).__name__}: {error}. {_remedy(path)}") from error
    if isinstance(version, str):  # packed datasets have a file of this name too
        raise CheckpointError(f"{path} is no checkpoint: its {MANIFEST} is of the format {version}")
    if version != FORMAT:
        raise CheckpointError(f"{file} is of format {version}; this perilune reads {FORMAT}. Use the one that wrote it")
    if not sealed:
        raise DamagedCheckpoint(
            path, f"{file} is damaged: its content does not have the SHA-256 it states. {_remedy(path)}"
        )
    _check_types(file, manifest)
    for name in manifest["files"]:
        if name != os.path.basename(name) or name in ("", ".", "..", MANIFEST):
            raise CheckpointError(f"{file} lists {name!r}, which is not the plain name of a file beside it")
    return manifest


def _check_types(file: Path, manifest: dict[str, Any]) -> None:
    """Raises CheckpointError for a manifest that whoever wrote it has sealed, and that is not as ours are."""
    wrong = [key for key, kind in (("step", int), ("run_state", dict), ("files", dict))
             if type(manifest.get(key)) is not kind]  # fmt: skip
    wrong += [key for key, kinds in (("versions", (dict,)), ("optimizer_step", (int, type(None))))
              if key in manifest and type(manifest[key]) not in kinds]  # fmt: skip
    listed = manifest["files"] if "files" not in wrong else {}
    for name, said in listed.items():
        size, digest = (said.get("bytes"), said.get("sha256")) if type(said) is dict else (None, None)
        if type(size) is not int or size < 0 or type(digest) is not str:
            wrong.append(f"files.{name}")
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise CheckpointError(
            f"{file} was not written by perilune: {', '.join(wrong[:_NAMED])}{more} absent or of another type"
        )


def _remedy(path: Path) -> str:
    return f"Delete {path} to go on from the checkpoint before it, or copy it again from where it came"


def write_manifest(temporary: Path, body: dict[str, Any]) -> None:
    """The last file of a checkpoint; `body` is all of it but the format's number and its own hash."""
    manifest = {"format": FORMAT, **body}
    text = json.dumps({**manifest, "sha256": digest_of(manifest)}, indent=1, allow_nan=False)
    _write_synced(temporary / MANIFEST, text + "\n")


def write_config(temporary: Path, text: str) -> None:
    """The configuration, as YAML; before the manifest, which holds its hash."""
    _write_synced(temporary / CONFIG, text)


# --- hashes -------------------------------------------------------------------------------------------------------


def shares(sizes: dict[str, int], parts: int) -> list[list[str]]:
    """File names split into `parts` of about equal bytes: largest first, each to the part with the least so far."""
    loads: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    split: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        loads.sort()
        load, part = loads[0]
        split[part].append(name)
        loads[0] = (load + sizes[name], part)
    return split


class _Stopped(Exception):
    """Nobody waits for the hashes any more."""


def describe(path: Path, names: Iterable[str], stop: Event | None = None) -> dict[str, dict[str, Any]]:
    """name -> {"bytes": size, "sha256": hex digest} of files in `path`, read as they are on disk."""
    found = {}
    for name in names:
        digest, size = hashlib.sha256(), 0
        with open(path / name, "rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if stop is not None and stop.is_set():
                    raise _Stopped
        found[name] = {"bytes": size, "sha256": digest.hexdigest()}
    return found


def check_sizes(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Raises CheckpointError naming the first of `names` that is missing or not of the size that the manifest says."""
    for name in names:
        file, said = path / name, manifest["files"][name]["bytes"]
        if not file.is_file():
            raise DamagedCheckpoint(path, f"{file} is missing. {_remedy(path)}")
        if (size := file.stat().st_size) != said:
            raise DamagedCheckpoint(path, f"{file} has {size} bytes, the manifest says {said}. {_remedy(path)}")


def check_files(path: Path, manifest: dict[str, Any], names: Iterable[str], stop: Event | None = None) -> None:
    """Raises CheckpointError naming the first of `names` that is missing or not what the manifest says."""
    for name in names:
        check_sizes(path, manifest, [name])
        if describe(path, [name], stop)[name]["sha256"] != manifest["files"][name]["sha256"]:
            file = path / name
            raise DamagedCheckpoint(
                path, f"{file} is damaged: its SHA-256 is not the one in the manifest. {_remedy(path)}"
            )


@contextmanager
def checked_meanwhile(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> Iterator[None]:
    """`check_files` in a thread while the body reads them: raises at the end, whatever the body made of damage.

    A full disk and Ctrl-C are no work of damage: they end the check at once.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as thread:
        checking = thread.submit(check_files, path, manifest, names, stop)
        try:
            yield
        except BaseException as error:
            if isinstance(error, OSError) or not isinstance(error, Exception):
                stop.set()
            else:
                checking.result()
            raise
        checking.result()


def sizes_of(manifest: dict[str, Any]) -> dict[str, int]:
    """File name -> bytes, as the manifest says."""
    return {name: said["bytes"] for name, said in manifest["files"].items()}


def verify(path: Path) -> dict[str, Any]:
    """Read and hash every file of a checkpoint; returns its manifest. Raises CheckpointError naming the bad file."""
    manifest = read_manifest(path)
    check_files(path, manifest, manifest["files"])
    return manifest


# --- commit and retirement ----------------------------------------------------------------------------------------


def prepare(folder: Path, step: int) -> tuple[Path | None, Path]:
    """(the checkpoint of this step if a good one is there, the new folder to write into otherwise).

    Removes what crashed saves left. A folder of this step that is damaged is set aside under a hidden name, which the
    save after this one removes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.glob(".step_*"):
        _remove_if_possible(entry)
    final = folder / folder_name(step)
    temporary = folder / f".{final.name}.{uuid.uuid4().hex[:8]}"
    if final.exists():
        try:
            if verify(final)["step"] == step:
                return final, temporary
        except CheckpointError as error:
            log.warning("set aside, as it is no good checkpoint: %s", error)
        os.rename(final, folder / f"{temporary.name}.damaged")
    temporary.mkdir()
    return None, temporary


def commit(temporary: Path, step: int, keep: int) -> Path:
    """Make a written folder the newest checkpoint, in an order in which a crash at any point leaves a whole one.

    Then retire all but the newest `keep` (0: none); this one always stays.
    """
    folder = temporary.parent
    final = folder / folder_name(step)
    _sync_folder(temporary)
    os.rename(temporary, final)
    _sync_folder(folder)
    point_to(final)
    older = [path for path in committed(folder) if path != final]
    for path in older[: max(0, len(older) + 1 - keep)] if keep else ():
        hidden = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        os.rename(path, hidden)  # a folder half removed must not look complete
        _sync_folder(folder)
        _remove_if_possible(hidden)
    return final


def point_to(final: Path) -> None:
    """Write the file `latest`, in one piece."""
    temporary = final.parent / f".{folder_name(0)}.{LATEST}"  # hidden as a save is: left over, the next one removes it
    _write_synced(temporary, final.name + "\n")
    os.replace(temporary, final.parent / LATEST)
    _sync_folder(final.parent)


def discard(temporary: Path) -> None:
    """Give back the space of a save that failed. What cannot be removed now is left to the next save."""
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_if_possible(entry: Path) -> None:
    """Remove what is hidden from `committed` already; what does not go (a file that NFS keeps open) is left for now.

    The checkpoint beside it is as good with it as without, so that no save may fail on it.
    """
    try:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    except OSError as error:
        log.warning("%s cannot be removed now (%s); the next save tries it again", entry, error)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
