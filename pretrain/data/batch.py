"""What a model sees of the data: one micro-batch of packed rows as flat [T] tensors with document boundaries.

Legend: T tokens of the micro-batch (rows x seq_len), D the MTP depth, 1+D the prediction depths (0 is next-token),
I images, P their patches, M = P / 4 their merged features, each of which stands at one placeholder token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from perilune.pretrain.data.shard import RowImage


@dataclass
class PackedBatch:
    """One micro-batch of `rows` rows, each of exactly `seq_len` tokens, laid end to end; no padding token anywhere.

    Depth k asks, at position i, for token i+k+1 given the hidden state of i and the embedding of token i+k.
    Everything that lies beyond a row, or beyond a document when documents are masked, has mask 0.
    """

    inputs: torch.Tensor  # [1+D, T] int64: token i+k, or 0 where there is none
    labels: torch.Tensor  # [1+D, T] int64: token i+k+1, or 0 where there is none
    loss_mask: torch.Tensor  # [1+D, T] float32: 1 where that label counts
    positions: torch.Tensor  # [T] int64: position inside the document, where RoPE restarts
    cu_seqlens: torch.Tensor  # [documents+1] int32: where attention is cut (row ends always are)
    max_seqlen: int
    rows: int
    seq_len: int
    sample_ids: tuple[str, ...] = ()  # for logs: which rows these are
    images: tuple[RowImage, ...] = ()  # encoded as they were packed, with their places in [T]
    # What a vision tower reads; of size 0 without images, or where the run has no tower: patches [P, 3, 14, 14] uint8,
    # image after image, each row-major over its grid; grids [I, 2] int64, patches (down, across) of each image; and
    # image_index [M] int64, the places in [T] of the merged features, image after image, each row-major over its cells.
    patches: torch.Tensor = field(default_factory=partial(torch.empty, 0, 3, 14, 14, dtype=torch.uint8))
    grids: torch.Tensor = field(default_factory=partial(torch.empty, 0, 2, dtype=torch.int64))
    image_index: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int64))

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()
        }
        return PackedBatch(**moved)

    def take(self, index: torch.Tensor) -> PackedBatch:
        """The tokens at `index` of every depth; everything else stays that of the whole pack.

        So do the images: `image_index` counts places in [T] of the whole pack, and a feature is this rank's where its
        place is one of `index`.
        """
        return replace(
            self,
            inputs=self.inputs[:, index],
            labels=self.labels[:, index],
            loss_mask=self.loss_mask[:, index],
            positions=self.positions[index],
        )
