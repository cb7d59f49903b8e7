"""A model to ask: a run's newest checkpoint, a given one, or a Hugging Face folder, whole in this one process.

Tensors are read one at a time into the model. MTP layers, which neither likelihood nor generation uses, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from perilune.moe import backbone
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain.evaluate.described import Described, describe
from perilune.pretrain.hf.config import config_from_hf
from perilune.pretrain.hf.config_vision import without_vision
from perilune.pretrain.hf.folder import read_json
from perilune.pretrain.hf.importing import Reader
from perilune.pretrain.hf.source import Checkpoint
from perilune.pretrain.hf.table import Tensor
from perilune.pretrain.hf.weights import WeightFolder, as_torch
from perilune.pretrain.schema import Config, Contrastive, Model, Precision, Vision


@dataclass(frozen=True, kw_only=True)
class Loaded(Described):
    """A model in eval mode on this process's device, and what is known of it."""

    net: backbone.Backbone


@contextmanager
def alone() -> Iterator[None]:
    """This process as a group of one, with Megatron-core's groups, for the time of the body. No network is used."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        meshes.start(meshes.Mesh(1))
        yield
    finally:
        meshes.stop()


def open_model(path: Path, tokenizer: Path | None = None, *, average: bool = False) -> Loaded:
    """The model that `describe` finds at `path`, which says what is what, loaded. To be called as `load`."""
    return load(describe(path, tokenizer, average=average))


def load(about: Described) -> Loaded:
    """The model, in the type of its weights (fp32 or bf16).

    To be called within `alone`, or in a process whose groups are those of one. Raises InputError for a tensor that does
    not fit.
    """
    known = {one.name: getattr(about, one.name) for one in fields(about)}
    return Loaded(net=_net_of_hf(about) if about.checkpoint is None else _net_of(about.checkpoint), **known)


def _net_of(checkpoint: Checkpoint) -> backbone.Backbone:
    config = checkpoint.config
    model = replace(config.model, num_nextn_predict_layers=0)
    net = _build(model, config.vision, getattr(torch, checkpoint.dtype()), config.contrastive)

    def read(target: torch.Tensor, key: str) -> None:
        known, name = key in checkpoint.tensors, checkpoint.average_of(key) if checkpoint.average else key
        target.copy_(as_torch(checkpoint.read(name) if known else checkpoint.read_besides(name, target.shape)))

    _fill(net, checkpoint.tensors, read)
    return net


def _net_of_hf(about: Described) -> backbone.Backbone:
    raw = read_json(about.path / "config.json")
    decoder, vision, names, _ = without_vision(raw) or (raw, Vision(), "deepseek_v3", None)
    with WeightFolder(about.path) as weights:
        reader = Reader(weights, decoder, config_from_hf(decoder), about.model, vision, names)
        net = _build(about.model, vision, reader.dtype)

        def read(target: torch.Tensor, key: str) -> None:
            for offset, shape, parts in reader.table[key].pieces():
                place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                target[place].copy_(reader.piece(reader.table[key], shape, parts))

        _fill(net, reader.table, read)
    return net


def _build(
    model: Model,
    vision: Vision,
    dtype: torch.dtype,
    contrastive: Contrastive = Contrastive(),  # noqa: B008 (frozen)
) -> backbone.Backbone:
    precision = Precision(compute="bf16" if dtype is torch.bfloat16 else "fp32")
    config = replace(Config(), model=model, vision=vision, contrastive=contrastive, precision=precision)
    (net,) = models.build_chunks(config, meshes.Mesh(1))
    net.to(meshes.device())
    net.eval()
    return net


def _fill(net: backbone.Backbone, table: dict[str, Tensor], read: Callable[[torch.Tensor, str], Any]) -> None:
    """`read(tensor, its name in a checkpoint)` for all of `net`, in fp32 what `table` has so.

    What compares images with texts is in no table: no format has a place for it.
    """
    state = net.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, entry in net.sharded_state_dict().items():
            if name.endswith("_extra_state"):
                continue
            if entry.key in table and table[entry.key].fp32:
                state[name].data = state[name].data.float()
            read(state[name], entry.key)
