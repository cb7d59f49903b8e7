"""Where a new run is put, and from what it starts besides weights drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config


@dataclass(frozen=True)
class Start:
    """At most one of both; a run that has a checkpoint of its own goes on from that."""

    init_from: Path | None = None  # a checkpoint of the same model: its weights alone
    after: tuple[Path, ...] = ()  # runs or checkpoints whose stages this one follows (pretrain/carry_over.py)

    def check(self) -> None:
        """Refuse, before a process starts, what is no checkpoint. Raises InputError; the rest is checked at loading."""
        if self.init_from is not None and self.after:
            raise InputError("--init-from takes the weights of one model, --after parts of several: give one of both")
        for path in [*([self.init_from] if self.init_from else []), *map(checkpoint_at, self.after)]:
            files.read_manifest(path)

    def words(self) -> list[str]:
        """The options of `perilune train` that say the same from any folder."""
        words = ["--init-from", str(self.init_from.resolve())] if self.init_from else []
        return words + [word for path in self.after for word in ("--after", str(path.resolve()))]


def run_dir_of(config: Config) -> Path:
    """Where a run of `config` is put unless somebody says otherwise: runs/PRESET, or runs/PRESET/STAGE."""
    return Path("runs") / config.preset / config.stage


def checkpoint_at(path: Path) -> Path:
    """The newest checkpoint of the run `path`, or `path` itself where it is one. Raises CheckpointError."""
    if (path / files.MANIFEST).is_file():
        return path
    newest = files.latest(path / "checkpoints")
    if newest is None:
        raise files.CheckpointError(f"--after {path}: neither a checkpoint nor a run that has one")
    return newest
