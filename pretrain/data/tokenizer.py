"""Byte-level BPE with Hugging Face `tokenizers`: training, loading, and what a token costs in source bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def train_tokenizer(sources: Sequence[str], out: Path, vocab_size: int) -> Path:
    """Train on the training split of `sources` and write the folder `out`; returns `out`.

    Raises InputError for a vocabulary too small for the bytes and special tokens, sources without text, or an `out`
    that already holds another tokenizer. The same recipe again leaves `out` as it is.
    """
    raise NotImplementedError
