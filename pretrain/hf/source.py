"""Our checkpoint, read one tensor at a time by one process: no process group, no model, and every file hashed first."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import checkpoint_shards as shards
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.table import Tensor, tensors
from perilune.pretrain.schema import Config

CONFIG = "config.yaml"  # of a run's directory, and of a checkpoint that was imported
MASTER = "optimizer.state.param."  # before the name of a weight: its fp32 master
_NAMED = 3


class Checkpoint:
    """A committed checkpoint whose tensors are those of its run's model, no more and no fewer.

    Raises InputError (CheckpointError) for a path that is neither, a damaged or hostile file, and tensors that are not
    the model's of the config beside them.
    """

    def __init__(self, run_or_checkpoint: Path) -> None:
        self.path = _checkpoint_of(run_or_checkpoint)
        self.manifest = files.verify(self.path)
        self._metadata = shards.read_metadata(self.path, files.sizes_of(self.manifest))
        self.config = self._config()
        self.tensors: dict[str, Tensor] = tensors(self.config.model)
        self._stored = shards.stored_shapes(self._metadata)
        self._check()

    def dtype(self) -> torch.dtype:
        """Of the weights: fp32 or bf16."""
        found = {
            dtype for name, (_, dtype) in self._stored.items() if name in self.tensors and not self.tensors[name].fp32
        }
        if len(found) != 1 or not found <= {"float32", "bfloat16"}:
            raise CheckpointError(
                f"{self.path} holds weights of {sorted(found)}; float32 or bfloat16 throughout is expected"
            )
        return torch.float32 if found == {"float32"} else torch.bfloat16

    def has_masters(self) -> bool:
        """Whether every bf16 weight has its fp32 master in the optimizer's state."""
        return all(t.fp32 or MASTER + t.name in self._stored for t in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The whole global tensor `name`, in the type in which it is stored."""
        entry: Any = self._metadata.state_dict_metadata[name]
        whole: torch.Tensor | None = None
        for chunk in entry.chunks:
            place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            with open(self.path / place.relative_path, "rb") as stream:
                stream.seek(place.offset)
                data = stream.read(place.length)
            part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if part.dtype != entry.properties.dtype or tuple(part.shape) != tuple(chunk.sizes):
                raise CheckpointError(
                    f"{self.path}: {name} holds {list(part.shape)} {part.dtype} where its metadata says "
                    f"{list(chunk.sizes)} {entry.properties.dtype}"
                )
            if len(entry.chunks) == 1:
                return part
            if whole is None:
                whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        if whole is None:
            raise CheckpointError(f"{self.path}: {name} has no parts")
        return whole

    def _config(self) -> Config:
        """Of the run that the checkpoint lies in, or its own if it was imported."""
        own, run = self.path / CONFIG, self.path.parent.parent / CONFIG
        if CONFIG in self.manifest["files"]:
            return configs.load(own)
        if self.path.parent.name == "checkpoints" and run.is_file():
            return configs.load(run)
        raise InputError(
            f"{self.path}: the configuration of its run is not at {run}; keep a checkpoint in its run's folder, "
            "RUN/checkpoints/step_..., with RUN/config.yaml"
        )

    def _check(self) -> None:
        held = {name: shape for name, shape in self._stored.items() if not name.startswith("optimizer.")}
        wrong = [f"it lacks {name}" for name in self.tensors if name not in held]
        wrong += [f"it has {name}, which this model has not" for name in held if name not in self.tensors]
        for name, tensor in self.tensors.items():
            if name in held and held[name][0] != tensor.shape:
                wrong.append(f"{name} is {list(held[name][0])}, by the configuration {list(tensor.shape)}")
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise CheckpointError(f"{self.path} is not of the model in its {CONFIG}: {'; '.join(wrong[:_NAMED])}{more}")


def _checkpoint_of(path: Path) -> Path:
    """A checkpoint's own folder, or the newest of a run's."""
    if (path / files.MANIFEST).is_file():
        return path
    if (newest := files.latest(path / "checkpoints")) is not None:
        return newest
    if (newest := files.latest(path)) is not None:
        return newest
    raise InputError(f"{path} is neither a run with a complete checkpoint (RUN/checkpoints/step_...) nor a checkpoint")
