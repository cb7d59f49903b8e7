"""Loss and bits per byte on a packed dataset, of each source of its documents and of all.

A source is what the documents' names share: a file of many documents (.jsonl, .parquet), or the folder of files that
are one document each. `docs.json` of each row names its documents; bytes are those of the predicted tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perilune.moe.backbone import Backbone
from perilune.pretrain.data.mixture import source_of
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.stream import open_dataset, valid_batches
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.likelihood import FORWARD_TOKENS, check_finite, packed_losses
from perilune.pretrain.schema import Vision
from perilune.vision.vlm import images_of


@dataclass(frozen=True)
class Figures:
    """Sums over predicted tokens."""

    nats: float
    tokens: int  # the ends of documents are predicted too
    bytes: int  # of text that the tokens stand for

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Infinite where no byte was predicted."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; bits per byte is null where no byte was predicted."""
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Validation:
    """Of a dataset: every source's figures, the most bytes first; together they are the whole."""

    sources: dict[str, Figures]
    rows: int
    fingerprint: str

    @property
    def total(self) -> Figures:
        """Of all sources."""
        parts = list(self.sources.values())
        return Figures(sum(p.nats for p in parts), sum(p.tokens for p in parts), sum(p.bytes for p in parts))


def validate(
    net: Backbone,
    path: Path,
    *,
    vocab_size: int,
    document_mask: bool = True,
    tokenizer_fingerprint: str | None = None,
    vision: Vision | None = None,
    max_rows: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """Figures of the first `max_rows` rows (0: all) of the order in which training validates.

    `vision` is the tower of a model that has one. `progress` is told rows done and rows to do. Raises InputError for a
    dataset that is damaged or of another tokenizer or vocabulary, and where a loss is not finite.
    """
    dataset = open_dataset(path, None, vocab_size, vision=vision, tokenizer_fingerprint=tokenizer_fingerprint)
    rows_of = {dataset.sample_id(index): index for index in range(len(dataset))}
    total = min(max_rows, len(dataset)) if max_rows else len(dataset)
    at_once = min(total, max(1, FORWARD_TOKENS // dataset.seq_len))
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    done = 0
    try:
        for batch, _ in valid_batches(
            dataset,
            dp_rank=0,
            dp_size=1,
            micro_batch_size=at_once,
            depth=0,
            document_mask=document_mask,
            max_rows=total,
            vision=vision,
        ):
            images = images_of(batch.patches, batch.grids, batch.image_index, batch.inputs.shape[1]) if vision else None
            losses_T = packed_losses(net, batch.inputs[0], batch.labels[0], batch.positions, batch.cu_seqlens, images)
            losses_RS = losses_T.double().view(batch.rows, -1).numpy()
            counted_RS = batch.loss_mask[0].view(batch.rows, -1).numpy() > 0
            check_finite(losses_T[batch.loss_mask[0] > 0], f"losses on {path}")
            labels_RS = batch.labels[0].view(batch.rows, -1).numpy()
            for row, name in enumerate(batch.sample_ids):
                counted = counted_RS[row]
                if not counted.any():  # also the rows that fill the last batch up
                    continue
                sources, source_S = _sources(dataset[rows_of[name]])
                for number, source in enumerate(sources):
                    mine = counted & (source_S == number)
                    nats[source] += float(losses_RS[row][mine].sum())
                    tokens[source] += int(mine.sum())
                    sizes[source] += int(dataset.token_bytes[labels_RS[row][mine]].sum(dtype=np.int64))
            done = min(done + batch.rows, total)
            progress(done, total)
    finally:
        dataset.close()
    found = {source: Figures(nats[source], tokens[source], sizes[source]) for source in tokens if tokens[source]}
    ordered = dict(sorted(found.items(), key=lambda item: (-item[1].bytes, item[0])))
    return Validation(ordered, total, dataset.fingerprint)


def _sources(row: Row) -> tuple[list[str], np.ndarray]:
    """The sources of a row, and which of them the target of each position [S] is of (the last has none)."""
    names = [source_of(piece["source"]) for piece in row.docs]
    if len(names) != row.cu_seqlens.size - 1:
        raise InputError(
            f"row {row.key}: docs.json tells of {len(names)} pieces, cu_seqlens of {row.cu_seqlens.size - 1}; pack the "
            "dataset again"
        )
    sources = sorted(set(names))
    piece_S = np.repeat([sources.index(name) for name in names], np.diff(row.cu_seqlens))
    return sources, np.append(piece_S[1:], -1)
