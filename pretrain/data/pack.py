"""Documents into rows of exactly `seq_len` tokens, written as WebDataset tar shards with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def pack(
    sources: Sequence[str],
    out: Path,
    tokenizer: Path,
    seq_len: int,
    *,
    valid_fraction: float = 0.0,
    shuffle_seed: int | None = None,
    rows_per_shard: int = 4096,
) -> dict[str, Any]:
    """Pack `sources` into `out`, or into `out/train` and `out/valid` when there is a held-out part.

    Returns `{name: statistics}` with name `all`, or `train` and `valid`; each has path, rows, tokens, documents, splits,
    raw_bytes, seconds, already_there. Raises InputError for bad input and for an `out` packed by another recipe.
    """
    raise NotImplementedError
