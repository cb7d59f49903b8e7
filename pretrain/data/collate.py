"""Rows into the flat [T] micro-batch of `batch.PackedBatch`, with inputs and labels for every prediction depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.shard import Row


def collate(rows: Sequence[Row], depth: int, document_mask: bool, sample_ids: Sequence[str] = ()) -> PackedBatch:
    """`rows` (of equal length) end to end, for MTP depth D = `depth` >= 0.

    A segment is a piece of a document where documents are masked, else a row. Nothing looks beyond its segment: at
    position i, depth k reads token i+k and predicts token i+k+1 where both stand in i's segment; the prediction counts
    where the row's own loss mask allows that token.
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

    inputs = np.zeros((depth + 1, tokens.size), np.int64)
    labels = np.zeros_like(inputs)
    loss_mask = np.zeros(inputs.shape, np.float32)
    for k in range(depth + 1):
        ahead = k + 1
        inputs[k, : max(0, tokens.size - k)] = tokens[k:]
        inputs[k] *= left > k
        labels[k, : max(0, tokens.size - ahead)] = tokens[ahead:]
        labels[k] *= left > ahead
        loss_mask[k, : max(0, tokens.size - ahead)] = allowed[ahead:]
        loss_mask[k] *= left > ahead
    return PackedBatch(
        inputs=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=len(rows),
        seq_len=seq_len,
        sample_ids=tuple(sample_ids) or tuple(row.key for row in rows),
    )
