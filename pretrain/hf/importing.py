"""`perilune import`: a Hugging Face folder becomes a checkpoint of weights, from which `train --init-from` starts.

The folder's every tensor is held against the table first: one that is missing, extra, misshapen or of another type is
an error that names it. Then tensors go one by one (experts each on their own) into torch's distributed checkpoint, in
the form that Megatron-core's dist_checkpointing gives it, so that every layout can load its part.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import config as configs
from perilune.pretrain import rules
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.config import config_from_hf, dtype_of
from perilune.pretrain.hf.config_vision import Media, without_vision
from perilune.pretrain.hf.folder import new_folder, read_json, write_text
from perilune.pretrain.hf.table import Block, Tensor, at_least, blocks, tensors
from perilune.pretrain.hf.weights import FP8_BLOCK, SCALE, Entry, WeightFolder, dequantised, scale_shape
from perilune.pretrain.schema import Config, Data, Model, Vision

_STALE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # a buffer that old versions saved
_TYPES = {"float32": "F32", "bfloat16": "BF16"}
_FP8 = "F8_E4M3"
_NAMED = 5  # problems in a message
_FAR = 1000  # times more tensors than there are: named no more


def import_hf(
    folder: Path, out: Path, overrides: Sequence[str] = (), *, say: Callable[[str], None] = print
) -> Path:  # fmt: skip
    """Write the weights in `folder` as the checkpoint `out`; returns `out`.

    `overrides` (`key=value`) change the configuration that lies beside them, as far as the tensors fit it;
    `model.num_nextn_predict_layers=0` leaves MTP layers out. Raises InputError for a folder, a tensor or a
    configuration that does not fit, and for an `out` that is there. Nothing half-written stays.
    """
    raw = read_json(folder / "config.json")
    seen = without_vision(raw)
    if seen is not None:
        raw, vision, names, media = seen
    else:
        vision, names, media = Vision(), "deepseek_v3", None
    found = config_from_hf(raw)
    with WeightFolder(folder) as weights:
        _refuse_far_more(found, vision, weights)
        config = _config(found, vision, overrides)
        _refuse_far_more(config.model, vision, weights)
    if config.vision != vision:
        raise InputError("vision.*: the tower is that of config.json; leave its keys out")
    with WeightFolder(folder) as weights, new_folder(out) as temporary:
        reader = Reader(weights, raw, found, config.model, vision, names)
        for note in reader.notes:
            say(note)
        _write(reader, temporary)
        write_text(temporary / files.CONFIG, _yaml(config, overrides))
        files.write_manifest(temporary, _manifest(folder, temporary, media))
    say(f"{len(list(blocks(config.model, vision, names))):,} tensors of {folder}: {out}")
    return out


def _refuse_far_more(model: Model, vision: Vision, weights: WeightFolder) -> None:
    """Raises InputError for a shape of far more tensors than there are, before its table, as large as it says, is made.

    A few that are missing are named later.
    """
    need, held = at_least(model, vision), len(weights.entries)
    if need > _FAR * (held + 1):
        raise InputError(
            f"{weights.folder} cannot be imported: by config.json it has {need:,} tensors and more, and it holds "
            f"{held:,}"
        )


def _config(model: Model, vision: Vision, overrides: Sequence[str]) -> Config:
    """A run of `model` and tower, with the user's keys, that could be trained."""
    data = Data(seq_len=min(Data.seq_len, model.max_position_embeddings))
    base = Config(model=model, vision=vision, data=data)
    config = configs.resolve(base.preset, overrides, base=base)
    # How long it would be trained is nobody's question before `train`.
    rules.check(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1, tokens=0)), world=1)
    return config


def _yaml(config: Config, overrides: Sequence[str]) -> str:
    """The keys of model and tower, and those that the user gave: `train PRESET --config` takes the rest from PRESET."""
    tree = configs.to_dict(config)
    whole = ("model", "vision") if config.vision.num_layers else ("model",)
    given = {word.partition("=")[0] for word in overrides}
    kept = {
        section: {key: value for key, value in keys.items() if section in whole or f"{section}.{key}" in given}
        for section, keys in tree.items()
        if isinstance(keys, dict)
    }
    return yaml.safe_dump({section: keys for section, keys in kept.items() if keys}, sort_keys=False)


# ---------------------------------------------------------------- reading


class Reader:
    """The folder's tensors under our names, in the type that config.json states; FP8 blocks in that type too, routers
    in fp32 where they are stored so.

    Raises InputError at once, naming the first ones, if any tensor is not what the table says.
    """

    def __init__(
        self,
        weights: WeightFolder,
        raw: dict[str, object],
        found: Model,
        model: Model,
        vision: Vision = Vision(),  # noqa: B008 (frozen)
        names: str = "kimi_vl",
    ) -> None:
        self._weights = weights
        self.notes: list[str] = []
        said = dtype_of(raw)
        self.dtype: torch.dtype = getattr(torch, said)
        self._type = _TYPES[said]
        self._fp8 = _fp8(raw)
        held = weights.entries
        self.table = {
            name: t.in_fp32() if t.router and held.get(t.blocks[0].theirs, _NOTHING).dtype == "F32" else t
            for name, t in tensors(model, vision, names).items()
        }
        wanted = {block.theirs: block for tensor in self.table.values() for block in tensor.blocks}
        problems = [*self._names(wanted, found), *self._shapes(wanted)]
        if problems:
            more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise InputError(f"{weights.folder} cannot be imported: {'; '.join(problems[:_NAMED])}{more}")

    def _names(self, wanted: dict[str, Block], found: Model) -> list[str]:
        held, folder = self._weights.entries, self._weights.folder
        missing = [name for name in wanted if name not in held]
        problems = [f"{name} is missing" for name in missing]
        all_mtp = {b.theirs for b in blocks(found)} - {
            b.theirs for b in blocks(dataclasses.replace(found, num_nextn_predict_layers=0))
        }
        if missing and all_mtp and not all_mtp & held.keys():
            problems.insert(
                0,
                f"config.json says {found.num_nextn_predict_layers} MTP layers and none of their tensors is there: "
                "model.num_nextn_predict_layers=0 imports without them",
            )
        stale = {name for name in held if _STALE.fullmatch(name)}
        left_out = {name for name in held if _of(name) in all_mtp - wanted.keys()}
        for name in held:
            if name in wanted or name in stale or name in left_out:
                continue
            if _of(name) in wanted and name.endswith(SCALE) and held.get(_of(name), _NOTHING).dtype == _FP8:
                continue
            problems.append(f"{name} ({held[name].file}) belongs to no model of this config.json")
        if stale:
            self.notes.append(
                f"{folder}: {len(stale)} stale rotary_emb.inv_freq left out; they follow from config.json"
            )
        if left_out:
            self.notes.append(f"{folder}: {len(left_out)} tensors of MTP layers left out, as asked")
        return problems

    def _shapes(self, wanted: dict[str, Block]) -> list[str]:
        held, problems = self._weights.entries, []
        for name, block in wanted.items():
            if name not in held:
                continue
            entry, where = held[name], f"{name} ({held[name].file})"
            if entry.shape != block.shape:
                problems.append(f"{where} is {list(entry.shape)}, by config.json {list(block.shape)}")
            if entry.dtype == _FP8:
                problems += self._scale(name, block)
            elif entry.dtype != self._type and not (block.fp32 and entry.dtype == "F32"):
                problems.append(f"{where} is of type {entry.dtype}, by config.json {self._type}")
        return problems

    def _scale(self, name: str, block: Block) -> list[str]:
        if not self._fp8:
            return [f"{name} is of type {_FP8}, and config.json has no quantization_config for it"]
        scale, shape = self._weights.entries.get(name + SCALE), scale_shape(block.shape)
        if len(block.shape) != 2:
            return [f"{name} is of type {_FP8}; only matrices are"]
        if scale is None:
            return [f"{name}{SCALE} is missing: {name} is of type {_FP8}"]
        if scale.shape != shape or scale.dtype != "F32":
            return [f"{name}{SCALE} is {list(scale.shape)} {scale.dtype}, must be {list(shape)} F32"]
        return []

    def piece(self, tensor: Tensor, shape: tuple[int, ...], parts: Sequence[Block]) -> torch.Tensor:
        """The piece of `tensor` that `parts` cover, of `shape`; copies that stand elsewhere are compared with it."""
        if len(parts) == 1:
            whole = parts[0].to_ours(self._values(parts[0])).reshape(shape)
        else:
            whole = torch.empty(shape, dtype=torch.float32 if tensor.fp32 else self.dtype)
            for block in parts:
                whole[block.index_in_piece] = block.to_ours(self._values(block))
        for block in tensor.blocks:
            if block.copy and not torch.equal(self._values(block), whole):
                raise InputError(
                    f"{self._weights.folder}: {block.theirs} is not a copy of {parts[0].theirs}; MTP shares embedding "
                    "and head with the main model (V3 section 2.2), other ones of its own are not built"
                )
        return whole

    def _values(self, block: Block) -> torch.Tensor:
        name = block.theirs
        values = self._weights.read(name)
        if values.dtype == torch.float8_e4m3fn:
            values = dequantised(values, self._weights.read(name + SCALE))
        values = values.to(torch.float32 if block.fp32 else self.dtype)
        if not bool(values.isfinite().all()):
            raise InputError(f"{self._weights.folder}: {name} holds values that are not finite")
        return values


_NOTHING = Entry((), "", "")


def _of(name: str) -> str:
    """The weight that `name` is, or is the scales of."""
    return name.removesuffix(SCALE)


def _fp8(raw: dict[str, object]) -> bool:
    """Whether config.json announces FP8 blocks; InputError for any other quantization."""
    said = raw.get("quantization_config")
    if said is None:
        return False
    block = [FP8_BLOCK, FP8_BLOCK]
    if not isinstance(said, dict) or said.get("quant_method") != "fp8" or said.get("weight_block_size") != block:
        raise InputError(f"config.json has quantization_config={said!r}; only fp8 in blocks of {block} is read")
    return True


# ---------------------------------------------------------------- writing


class _Planner(DefaultSavePlanner):
    """Makes each piece when torch's writer asks for it, and holds none."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._reader = reader
        self._pieces: dict[tuple[str, tuple[int, ...]], tuple[Tensor, tuple[int, ...], tuple[Block, ...]]] = {}
        items = []
        for tensor in reader.table.values():
            properties = TensorProperties(dtype=torch.float32 if tensor.fp32 else reader.dtype)
            for offset, shape, parts in tensor.pieces():
                self._pieces[tensor.name, offset] = (tensor, shape, parts)
                chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
                data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(tensor.shape))
                index = MetadataIndex(tensor.name, chunk.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plans = [SavePlan(group) for group in _groups(items)]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._reader.piece(*self._pieces[write_item.index.fqn, tuple(write_item.index.offset or ())])


def _groups(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """One file each: torch's writer keeps the tensors of a file until it is closed. No larger than the largest item."""
    sizes = [math.prod(item.tensor_data.chunk.sizes) for item in items if item.tensor_data]
    group: list[WriteItem] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if group and held + size > max(sizes):
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    yield group


class _Writer(dcp.FileSystemWriter):
    """torch's writer without this machine's paths in the metadata."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


def _write(reader: Reader, folder: Path) -> None:
    """The steps of torch's `dcp.save` for one process, whose own wraps every error in one that hides it."""
    planner = _Planner(reader)
    writer = _Writer(folder, single_file_per_rank=True, thread_count=1, sync_files=True)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(plan) for plan in planner.plans])
    with torch.no_grad():
        written = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, written)


def _manifest(folder: Path, temporary: Path, media: Media | None) -> dict[str, object]:
    """The body of a checkpoint's manifest: weights only, at step 0."""
    names = sorted(entry.name for entry in temporary.iterdir())
    return {
        "step": 0,
        "run_state": {"step": 0, "imported_from": str(folder.absolute())}
        | ({"media": dataclasses.asdict(media)} if media else {}),
        "optimizer_step": None,
        "layout": {"world": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "zero1": False},
        "versions": {name: importlib.metadata.version(name) for name in ("perilune", "torch", "megatron-core")},
        "files": files.describe(temporary, names),
    }
