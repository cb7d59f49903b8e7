"""Rows into the flat arrays of a micro-batch, for every prediction depth. numpy alone: reading processes run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perilune.pretrain.data.shard import Row, RowImage

PATCH = (14, 14)  # of a batch without images: MoonViT's


@dataclass(frozen=True)
class Arrays:
    """The fields of `batch.PackedBatch`, its tensors as arrays."""

    inputs: np.ndarray  # [1+D, T] int64
    labels: np.ndarray  # [1+D, T] int64
    loss_mask: np.ndarray  # [1+D, T] float32
    positions: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [segments + 1] int32
    max_seqlen: int
    rows: int
    seq_len: int
    sample_ids: tuple[str, ...]
    images: tuple[RowImage, ...]
    patches: np.ndarray  # [P, 3, 14, 14] uint8
    grids: np.ndarray  # [I, 2] int64
    image_index: np.ndarray  # [M] int64


def assemble(
    rows: Sequence[Row],
    depth: int,
    document_mask: bool,
    sample_ids: Sequence[str] = (),
    patches: Sequence[np.ndarray] = (),
    read: Sequence[np.ndarray] = (),
) -> Arrays:
    """`rows` (of equal length) end to end, for MTP depth D = `depth` >= 0.

    A segment is a piece of a document where documents are masked, else a row. Nothing looks beyond its segment: at
    position i, depth k reads token i+k and predicts token i+k+1 where both stand in i's segment; the prediction counts
    where the row's own loss mask allows that token. Images keep their encoded bytes; their places become those in [T].

    `patches` holds uint8 [P, 3, 14, 14] of each image of the rows, one after another; none where no tower reads them,
    and then the batch has no grids and places of merged features either. `read` holds the tokens of each row as the
    model is to read them, if not as they are.
    """
    seq_len = rows[0].tokens.size
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)  # [T]
    allowed = np.concatenate([row.loss_mask for row in rows]).astype(np.float32)  # [T]
    if document_mask:
        starts = np.concatenate([row.cu_seqlens[:-1].astype(np.int64) + i * seq_len for i, row in enumerate(rows)])
    else:
        starts = np.arange(len(rows), dtype=np.int64) * seq_len
    bounds = np.append(starts, tokens.size)  # [segments + 1]
    lengths = np.diff(bounds)
    place = np.arange(tokens.size)
    positions = place - np.repeat(starts, lengths)
    left = np.repeat(bounds[1:], lengths) - place  # tokens of the segment from here to its end, this one included

    inputs_T = np.concatenate(read).astype(np.int64) if read else tokens
    inputs = np.zeros((depth + 1, tokens.size), np.int64)
    labels = np.zeros_like(inputs)
    loss_mask = np.zeros(inputs.shape, np.float32)
    for k in range(depth + 1):
        ahead = k + 1
        inputs[k, : max(0, tokens.size - k)] = inputs_T[k:]
        inputs[k] *= left > k
        labels[k, : max(0, tokens.size - ahead)] = tokens[ahead:]
        labels[k] *= left > ahead
        loss_mask[k, : max(0, tokens.size - ahead)] = allowed[ahead:]
        loss_mask[k] *= left > ahead
    images = tuple(
        replace(image, start=image.start + i * seq_len) for i, row in enumerate(rows) for image in row.images
    )
    shown = images if patches else ()
    return Arrays(
        inputs=inputs,
        labels=labels,
        loss_mask=loss_mask,
        positions=positions,
        cu_seqlens=bounds.astype(np.int32),
        max_seqlen=int(lengths.max()),
        rows=len(rows),
        seq_len=seq_len,
        sample_ids=tuple(sample_ids) or tuple(row.key for row in rows),
        images=images,
        patches=np.concatenate(patches) if patches else np.zeros((0, 3, *PATCH), np.uint8),
        grids=np.array([image.grid for image in shown], np.int64).reshape(-1, 2),
        image_index=np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(image.start, image.start + image.tokens) for image in shown)]
        ),
    )
