"""The deterministic stream of global batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perilune.pretrain import schema
from perilune.pretrain.data.batch import PackedBatch


@dataclass(frozen=True)
class DataState:
    """What has been consumed; knows nothing of ranks. Goes into a checkpoint by to_dict/from_dict (plain JSON)."""

    samples: int = 0  # rows consumed, over all datasets
    tokens: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # dataset path -> rows consumed
    fingerprints: dict[str, str] = field(default_factory=dict)  # dataset path -> fingerprint of its content

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> DataState:
        raise NotImplementedError


class Stream:
    def initial_state(self) -> DataState:
        """Nothing consumed yet."""
        raise NotImplementedError

    def check_state(self, state: DataState) -> None:
        """Raise InputError where a resumed state belongs to other data (call once after loading a checkpoint)."""

    def global_batch_ids(self, state: DataState, rows: int) -> list[tuple[int, int]]:
        """The (dataset, index) of each row of the next global batch: a pure function of the state."""
        raise NotImplementedError

    def advance(self, state: DataState, rows: int) -> DataState:
        """The state after a global batch of `rows` rows (a new object: commit it once the step has succeeded)."""
        raise NotImplementedError

    def micro_batches(
        self, state: DataState, rows: int, dp_rank: int, dp_size: int, micro_batch_size: int
    ) -> list[PackedBatch]:
        """This rank's micro-batches of the next global batch; InputError unless rows % (dp_size*micro) == 0."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the prefetch thread."""


def open_stream(data: schema.Data, seed: int, *, depth: int, vocab_size: int | None = None) -> Stream:
    """The stream of `data.path` or `data.blend`; `depth` is D (model.num_nextn_predict_layers)."""
    raise NotImplementedError


def valid_batches(
    path: Path | str,
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    depth: int,
    document_mask: bool,
    seq_len: int,
    max_rows: int = 0,
    vocab_size: int | None = None,
) -> Iterator[tuple[PackedBatch, int]]:
    """(batch, source bytes of its counted depth-0 targets), the same number on every rank; blank rows fill the end."""
    raise NotImplementedError
