"""Our checkpoint, read one tensor at a time by one process: no process group, no model, and every file hashed first."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_metadata import AVERAGE, MASTER, METADATA, Index, read_metadata, stored_shapes
from perilune.pretrain.checkpoint_tensor import DTYPES, mapped
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.table import FORMATS, Tensor, at_least, format_of, tensors
from perilune.pretrain.rules import part_of
from perilune.pretrain.schema import Config

CONTRASTIVE = "contrastive."  # before the names of what compares images with texts: of no later stage and no format
_NAMED = 3


class Checkpoint:
    """A committed checkpoint whose tensors are those of its run's model, no more and no fewer.

    It may lie anywhere: its configuration is in it. Blocks have the names of the format `names` (None: the model's
    own). Without `hashed`, tensors may be read inside of `hashed_meanwhile` only. With `average` its weights are the
    averages of them (`average_of`), and InputError says so where it has none.
    Raises InputError (CheckpointError) for a path that is neither, a damaged or hostile file, and tensors that are not
    the model's of that configuration.
    """

    def __init__(
        self, run_or_checkpoint: Path, *, hashed: bool = True, names: str | None = None, average: bool = False
    ) -> None:
        found = checkpoint_of(run_or_checkpoint)
        if found is None:
            hint = "; of a Hugging Face folder `perilune import` makes a checkpoint"
            is_theirs = (run_or_checkpoint / "config.json").is_file()
            raise InputError(neither(run_or_checkpoint) + (hint if is_theirs else ""))
        self.path = found
        self.manifest = files.read_manifest(self.path)
        held = self.manifest["files"]
        files.check_sizes(self.path, self.manifest, held)
        files.check_files(self.path, self.manifest, held if hashed else held.keys() & {METADATA, files.CONFIG})
        self._metadata = read_metadata(self.path, files.sizes_of(self.manifest))
        self.config = self._config()
        self.names = names or format_of(self.config.vision)
        if (self.names == "deepseek_v3") != (not self.config.vision.num_layers):
            fits = ", ".join(FORMATS[1:]) if self.config.vision.num_layers else FORMATS[0]
            raise InputError(
                f"--format {self.names}: {self.path} is of a model with vision.num_layers="
                f"{self.config.vision.num_layers}; its formats are {fits}"
            )
        need, held_bytes = at_least(self.config.model, self.config.vision), sum(files.sizes_of(self.manifest).values())
        if need > held_bytes:  # before the table is made, which is as large as the configuration says
            raise CheckpointError(
                f"{self.path} is not of the model in its {files.CONFIG}: that has {need:,} tensors and more, and all "
                f"of its files together {held_bytes:,} bytes"
            )
        self.tensors: dict[str, Tensor] = tensors(self.config.model, self.config.vision, self.names)
        self._stored = stored_shapes(self._metadata)
        self._held: dict[Index, np.ndarray] = {}
        self._check()
        self.average = average
        if average:
            self._check_average()
        if {self._stored[t.name][1] for t in self.tensors.values() if not (t.fp32 or t.router)} != {"float32"}:
            routers = (t for t in self.tensors.values() if t.router and self._stored[t.name][1] == "float32")
            self.tensors |= {t.name: t.in_fp32() for t in routers}

    @property
    def run_dir(self) -> Path | None:
        """The run that it lies in, RUN/checkpoints/step_...; None if it was moved or imported."""
        above = self.path.resolve().parent
        return above.parent if above.name == "checkpoints" else None

    def dtype(self) -> str:
        """Of the weights: `float32` or `bfloat16`."""
        found = {
            dtype for name, (_, dtype) in self._stored.items() if name in self.tensors and not self.tensors[name].fp32
        }
        if len(found) != 1 or not found <= {"float32", "bfloat16"}:
            raise CheckpointError(
                f"{self.path} holds weights of {sorted(found)}; float32 or bfloat16 throughout is expected"
            )
        return found.pop()

    def hashed_meanwhile(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Hash the files that hold the tensors `names` while the body reads them; raises CheckpointError at its end."""
        wanted = set(names)
        held = {place.relative_path for at, place in self._metadata.storage_data.items() if at.fqn in wanted}
        return files.checked_meanwhile(self.path, self.manifest, sorted(held))

    def read_besides(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor that no format has a place for. Raises CheckpointError where it is not there or of another shape."""
        if name not in self._stored or self._stored[name][0] != tuple(shape):
            found = self._stored[name][0] if name in self._stored else "not there"
            raise CheckpointError(f"{self.path}: {name} is {found}, by the configuration {list(shape)}")
        return self.read(name)

    def average_of(self, name: str) -> str:
        """Under what name the average of a tensor of the model is stored.

        Router biases, which are no weights, and what was frozen are their own: they have none and are as they are.
        """
        return AVERAGE + name if AVERAGE + name in self._stored else name

    def master_of(self, name: str) -> str:
        """Under what name the fp32 master of a bf16 weight is stored; what was frozen has none and is its own."""
        return MASTER + name if MASTER + name in self._stored else name

    def has_masters(self) -> bool:
        """Whether its bf16 weights have fp32 masters; imported weights and those saved without optimizer have none.

        Raises InputError if some that were trained have, and others not.
        """
        bf16 = [name for name, tensor in self.tensors.items() if not tensor.fp32]
        lacks = [name for name in bf16 if self.master_of(name) == name]
        trained = [name for name in lacks if part_of(name) not in self.config.train.freeze]
        if trained and len(lacks) < len(bf16):
            raise InputError(
                f"--dtype fp32: {self.path} holds masters of {len(bf16) - len(lacks)} weights and none of "
                f"{len(trained)} that were trained, {trained[0]} among them; export it with --dtype bf16, or another"
            )
        return len(lacks) < len(bf16)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """`start` to `stop` (None: the end) along dim 0 of the global tensor `name`, in the type in which it is stored.

        Read in ascending order, each of its stored parts is read once: one that reaches beyond `stop` is kept.
        """
        entry = self._metadata.state_dict_metadata[name]
        stop = entry.size[0] if stop is None else stop
        shape, found = (stop - start, *entry.size[1:]), None
        held, self._held = self._held, {}
        for chunk in entry.chunks:
            first, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            index = Index(name, chunk.offsets)
            part = held.pop(index) if index in held else self._part(index, chunk.sizes, entry.properties.dtype)
            if end > stop:
                self._held[index] = part
            cut = part[low - first : high - first]
            if cut.shape == shape:
                return cut
            if found is None:
                found = np.empty(shape, DTYPES[entry.properties.dtype])
            across = (slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
            found[slice(low - start, high - start), *across] = cut
        if found is None:
            raise CheckpointError(f"{self.path}: {name} has no parts")
        return found

    def _part(self, index: Index, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A part of a tensor as one process stored it."""
        place = self._metadata.storage_data[index]
        part = mapped(self.path / place.relative_path, place.offset, place.length)
        if part.dtype != DTYPES[dtype] or part.shape != shape:
            raise CheckpointError(
                f"{self.path}: {index.fqn} holds {list(part.shape)} {part.dtype} where its metadata says "
                f"{list(shape)} {dtype}"
            )
        return part

    def _config(self) -> Config:
        if files.CONFIG not in self.manifest["files"]:
            raise CheckpointError(
                f"{self.path}: its manifest lists no {files.CONFIG}, which says what model its tensors are of; let its "
                "run go on to another checkpoint"
            )
        return configs.load(self.path / files.CONFIG)

    def _check(self) -> None:
        none = ("optimizer.", CONTRASTIVE) if self.config.contrastive.loss != "none" else ("optimizer.",)
        held = {name: shape for name, shape in self._stored.items() if not name.startswith(none)}
        wrong = [f"it lacks {name}" for name in self.tensors if name not in held]
        wrong += [f"it has {name}, which this model has not" for name in held if name not in self.tensors]
        for name, tensor in self.tensors.items():
            if name in held and held[name][0] != tensor.shape:
                wrong.append(f"{name} is {list(held[name][0])}, by the configuration {list(tensor.shape)}")
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise CheckpointError(
                f"{self.path} is not of the model in its {files.CONFIG}: {'; '.join(wrong[:_NAMED])}{more}"
            )

    def _check_average(self) -> None:
        frozen = self.config.train.freeze
        lacks = [
            name
            for name, tensor in self.tensors.items()
            if not tensor.fp32 and self.average_of(name) == name and part_of(name) not in frozen
        ]
        if lacks:
            raise InputError(
                f"--ema: {self.path} holds no average of {len(lacks)} weights, {lacks[0]} among them: its run had "
                f"optim.ema_decay={self.config.optim.ema_decay:g}; go on with it with optim.ema_decay=0.999, say, and "
                "take a later checkpoint"
            )
        for name, tensor in self.tensors.items():
            if self._stored[self.average_of(name)][0] != tensor.shape:
                raise CheckpointError(f"{self.path}: {self.average_of(name)} is not {list(tensor.shape)}")


def checkpoint_of(path: Path) -> Path | None:
    """A checkpoint's own folder, or the newest of a run's; None for another folder."""
    if (path / files.MANIFEST).is_file():
        return path
    return files.latest(path / "checkpoints") or files.latest(path)


def neither(path: Path, *others: str) -> str:
    """The message for a folder that is no run, no checkpoint and none of `others`."""
    kinds = ["a run with a complete checkpoint (RUN/checkpoints/step_...)", "a checkpoint", *others]
    return f"{path} is neither {' nor '.join(kinds)}"
