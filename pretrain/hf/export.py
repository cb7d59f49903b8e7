"""`perilune export`: a checkpoint becomes a folder that transformers, vLLM and SGLang load.

One process reads and writes one tensor at a time, experts one by one, from where the system caches the checkpoint's
files: at its peak it holds the largest tensor of which several processes of the run saved parts, or one that is put
into another order; not the model, not a layer. Nothing here imports torch, which takes longer than many an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import card
from perilune.pretrain.hf.config import config_to_hf
from perilune.pretrain.hf.config_vision import Media, preprocessor, with_vision
from perilune.pretrain.hf.folder import new_folder, refuse_existing, write_json
from perilune.pretrain.hf.shards import ShardWriter
from perilune.pretrain.hf.source import Checkpoint
from perilune.pretrain.hf.table import Block

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class VerifyError(RuntimeError):
    """An export that is not the checkpoint's model; the message holds what differs and by how much."""


def export(
    run_or_checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    names: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    average: bool = False,
    verified_by: Callable[[Path, Checkpoint, str], str] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the checkpoint (a run's newest) as the Hugging Face folder `out`; returns `out`.

    `names` is the format (None: the model's own, `deepseek_v3`, or `kimi_vl` with a tower; else `kimi_k25`). `dtype`
    is `fp32` or `bf16` (None: that of the weights); fp32 of a bf16 run are its masters. With `average` the average of
    the weights (`optim.ema_decay`) takes their place. `verified_by` is given the folder before it has its name: if it
    raises, there is no folder; what it returns goes into the model card.
    Raises InputError for a checkpoint that is damaged, that has no such average, or that transformers would compute
    otherwise, and for an `out` that is there.
    """
    refuse_existing(out)  # before every file is hashed
    checkpoint = Checkpoint(run_or_checkpoint, hashed=False, names=names, average=average)
    target = DTYPES[dtype] if dtype else checkpoint.dtype()
    sources = names_in(checkpoint, target)
    tokenizer = card.tokenizer_of(checkpoint)
    config = config_to_hf(checkpoint.config.model, dtype=target, **tokenizer.ids)
    if checkpoint.config.vision.num_layers:
        kept = checkpoint.manifest["run_state"].get("media")  # of imported weights
        media = tokenizer.media or (Media(**kept) if kept else None)
        config = with_vision(config, checkpoint.config.vision, checkpoint.names, media)
    what = "the average of the weights as " if average else ""
    say(f"{checkpoint.path}: writing {what}{target} to {out}, which gets its name if what is read has its hash")
    if tokenizer.missing:
        say(f"no tokenizer in the export: {tokenizer.missing}")
    if checkpoint.config.contrastive.loss != "none":
        say("left out: contrastive.*, the text encoder and pools, for which the format has no names")
    with new_folder(out) as folder:
        write_json(folder / "config.json", config)
        if checkpoint.config.vision.num_layers:
            processor = preprocessor(checkpoint.names, checkpoint.config.vision, card.patch_limit(checkpoint))
            write_json(folder / "preprocessor_config.json", processor)
        write_json(folder / "generation_config.json", card.generation_config(tokenizer))
        tokenizer.copy_to(folder)
        plan = [(b.theirs, b.shape, dtype_of(b, target))
                for tensor in checkpoint.tensors.values() for b in tensor.blocks]  # fmt: skip
        writer = ShardWriter(folder, plan, max_shard_bytes)
        with checkpoint.hashed_meanwhile(sources), closing(writer):
            for block, values in stream(checkpoint, target):
                writer.put(block.theirs, block.to_theirs(values))
            size = writer.finish()
        verdict = verified_by(folder, checkpoint, target) if verified_by else None
        card.write(folder, checkpoint, target, verdict)
    say(f"{len(plan):,} tensors, {size:,} bytes: {out}")
    return out


def dtype_of(block: Block, target: str) -> str:
    """Of what is written for `block` in an export in `target`."""
    return "float32" if block.fp32 else target


def stream(checkpoint: Checkpoint, target: str) -> Iterator[tuple[Block, np.ndarray]]:
    """Every block of the table with our values for an export in `target`, as they are stored, tensor after tensor."""
    for tensor, name in zip(checkpoint.tensors.values(), names_in(checkpoint, target), strict=True):
        for offset, shape, own in tensor.pieces():
            piece = checkpoint.read(name, offset[0], offset[0] + shape[0])
            if piece.shape != shape:
                raise InputError(f"{checkpoint.path}: {name} is not {list(tensor.shape)}")
            for block in tensor.blocks if shape == tensor.shape else own:
                yield block, piece[block.index_in_piece]


def names_in(checkpoint: Checkpoint, target: str) -> list[str]:
    """The stored tensor of each of `checkpoint.tensors`: fp32 of bf16 weights are their masters, where it has them.

    Averages, where it is opened for them, are fp32 whatever the weights are.
    """
    if checkpoint.average:
        return [checkpoint.average_of(t.name) for t in checkpoint.tensors.values()]
    masters = target == "float32" and checkpoint.dtype() == "bfloat16" and checkpoint.has_masters()
    return [checkpoint.master_of(t.name) if masters and not t.fp32 else t.name for t in checkpoint.tensors.values()]
