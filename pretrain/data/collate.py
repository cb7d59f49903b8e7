"""Rows into `batch.PackedBatch`: what `assemble` lays out in arrays, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from perilune.pretrain.data.assemble import Arrays, assemble
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.shard import Row


def collate(
    rows: Sequence[Row],
    depth: int,
    document_mask: bool,
    sample_ids: Sequence[str] = (),
    patches: Sequence[np.ndarray] = (),
) -> PackedBatch:
    """`rows` (of equal length) end to end, for MTP depth D = `depth` >= 0; see `assemble`."""
    return to_batch(assemble(rows, depth, document_mask, sample_ids, patches))


def to_batch(arrays: Arrays, pin: bool = False) -> PackedBatch:
    """The same as tensors, which share the arrays' memory, or with `pin` stand in pinned memory for a GPU to fetch."""
    fields: dict[str, Any] = {}
    for name, value in vars(arrays).items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(value)
            fields[name] = tensor.pin_memory() if pin else tensor
        else:
            fields[name] = value
    return PackedBatch(**fields)
