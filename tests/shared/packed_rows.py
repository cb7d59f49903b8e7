"""Packed datasets without tokenizing text: rows of random tokens, of documents of given or lognormal lengths."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from perilune.pretrain.data.manifest import TOKEN_BYTES, write_manifest
from perilune.pretrain.data.packing import Piece, plan
from perilune.pretrain.data.shard import Row, ShardWriter, token_dtype
from perilune.vision.image_header import ImageRule


def lognormal_lengths(documents: int, median: int = 600, sigma: float = 1.2, seed: int = 0) -> list[int]:
    """Tokens of each document."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, documents)
    return np.maximum(1, drawn).astype(int).tolist()


def packed_lengths(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Lengths of the pieces of each row, as packing arranges documents of `lengths`."""
    rows, _ = plan([Piece(i, 0, n) for i, n in enumerate(lengths)], seq_len)
    return [[piece.length for piece in row] for row in rows]


def random_rows(pieces: Iterable[Sequence[int]], vocab_size: int, seed: int = 0) -> Iterable[Row]:
    """Rows of random tokens with pieces of these lengths."""
    rng = np.random.default_rng(seed)
    for number, lengths in enumerate(pieces):
        size = sum(lengths)
        docs = ",".join(
            f'{{"doc":{number * 1000 + i},"source":"corpus.jsonl:{number * 1000 + i}","start":0,"tokens":{n},"of":{n},'
            f'"bytes":{4 * n},"continues":false,"continued":false,"repeat":false}}'
            for i, n in enumerate(lengths)
        )
        yield Row(
            f"{number:09d}",
            rng.integers(0, vocab_size, size).astype(token_dtype(vocab_size)),
            np.cumsum([0, *lengths]).astype("<i4"),
            np.ones(size, np.uint8),
            f"[{docs}]".encode(),
        )


def write_dataset(
    folder: Path,
    rows: Iterable[Row],
    seq_len: int,
    vocab_size: int,
    rows_per_shard: int = 256,
    images: ImageRule | None = None,
) -> Path:
    """`rows` as a packed dataset in `folder`; `images` where some have images."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, rows_per_shard)
    for row in rows:
        writer.write(row)
    writer.close()
    table = io.BytesIO()
    np.lib.format.write_array(table, np.full(vocab_size, 4, np.uint16), version=(1, 0), allow_pickle=False)
    (folder / TOKEN_BYTES).write_bytes(table.getvalue())
    count = sum(len(shard["samples"]) for shard in writer.shards)
    write_manifest(
        folder,
        {
            "seq_len": seq_len,
            "rows": count,
            "tokens": count * seq_len,
            "tokenizer": {"path": "none", "fingerprint": "random", "vocab_size": vocab_size},
            "token_bytes": {"name": TOKEN_BYTES, "sha256": hashlib.sha256(table.getvalue()).hexdigest()},
            "images": images.to_dict() if images else None,
            "shards": writer.shards,
        },
    )
    return folder
