"""`perilune pack`: documents into rows of exactly `seq_len` tokens, in WebDataset tar shards with a manifest.

Every document ends with EOS. Documents are planned a buffer at a time (`packing.plan`); what does not fill a row waits
for the next buffer. At most one row in a dataset is left open at the end: it is filled up with the first documents
over again, marked `repeat` and masked from the loss. So no token is padding, none is dropped, none counts twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from perilune.pretrain.data import sources as data_sources
from perilune.pretrain.data.manifest import NAME, TOKEN_BYTES, read_manifest, write_atomically, write_manifest
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.packing import Piece, plan
from perilune.pretrain.data.shard import Row, ShardWriter, token_dtype
from perilune.pretrain.data.sources import Document, SourceFile, Split
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from perilune.pretrain.errors import InputError

BUFFER_TOKENS = 1 << 25  # tokens planned at once; part of the recipe, since rows depend on it
UNFINISHED = ".packing"  # stands in the folder until the dataset is whole
BATCH_CHARACTERS = 1 << 23  # text given to the tokenizer's threads at once
BATCH_DOCUMENTS = 4096


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
    """Pack `sources` into `out`, or into `out/train` and `out/valid` when a part is held out.

    `demo:stdlib` holds out files of its own; for other sources `valid_fraction` of the documents are, by the hash of
    their text. Rows keep the sources' order, or with `shuffle_seed` stand shuffled within a buffer of 2^25 tokens.
    The same arguments give the same bytes.

    Returns `{name: statistics}`, name `all`, or `train` and `valid`; each holds path, rows, tokens, documents, splits,
    raw_bytes, seconds, already_there and the rest of the manifest's `packing`. Raises InputError for bad input and for
    an `out` packed from other text or by another recipe.
    """
    out = Path(out)
    for name, value in (("--seq-len", seq_len), ("rows per shard", rows_per_shard)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    if not 0 <= valid_fraction < 1:
        raise InputError(f"--valid-fraction {valid_fraction}: must be at least 0 and below 1")
    coder = load_tokenizer(tokenizer)
    files = data_sources.find_files(sources)
    if valid_fraction and all(file.split for file in files):
        raise InputError(
            f"--valid-fraction {valid_fraction}: {', '.join(sources)} holds out files of its own; leave it out"
        )
    splits: list[Split | None] = ["train", "valid"] if valid_fraction or any(f.split for f in files) else [None]
    described = {file: data_sources.describe(file) for file in files}
    stats: dict[str, Any] = {}
    for split in splits:
        mine = [file for file in files if file.split in (None, split)]
        recipe = {
            "files": [described[file] for file in mine],
            "split": split,
            "valid_fraction": valid_fraction,
            "tokenizer": coder.fingerprint,
            "seq_len": seq_len,
            "shuffle_seed": shuffle_seed,
            "rows_per_shard": rows_per_shard,
            "buffer_tokens": BUFFER_TOKENS,
        }
        folder = out / split if split else out
        stats[split or "all"] = _pack_split(mine, folder, coder, recipe)
    return stats


def _pack_split(files: list[SourceFile], folder: Path, coder: Tokenizer, recipe: dict[str, Any]) -> dict[str, Any]:
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        if manifest["recipe"] != recipe:
            changed = [key for key in recipe if manifest["recipe"].get(key) != recipe[key]]
            raise InputError(f"{folder} already holds a dataset, with other {', '.join(changed)}; name another --out")
        return {"path": str(folder), "already_there": True, "seconds": 0.0, **manifest["packing"]}
    start = time.monotonic()
    _clear(folder)
    seed, seq_len = recipe["shuffle_seed"], recipe["seq_len"]
    run = _Packing(coder, seq_len, ShardWriter(folder, recipe["rows_per_shard"]), seed)
    texts = data_sources.read_files(files, recipe["split"], recipe["valid_fraction"])
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        total = sum(file["bytes"] for file in recipe["files"])
        task = bar.add_task(f"packing {folder}", total=total)  # of the files: compressed ones end beyond it
        for batch in _batches(texts):
            run.add(batch)
            bar.update(task, completed=min(run.count["raw_bytes"], total))
        run.finish()
        bar.update(task, completed=total)
    if not run.count["documents"]:
        raise InputError(f"{folder}: no document in this split of {len(files)} files; give more text")

    table = io.BytesIO()
    np.lib.format.write_array(table, coder.token_bytes, version=(1, 0), allow_pickle=False)
    write_atomically(folder / TOKEN_BYTES, table.getvalue())
    rows = run.count["rows"]
    listed = json.dumps(recipe["files"], sort_keys=True).encode()
    packing = run.statistics()
    write_manifest(
        folder,
        {
            "seq_len": seq_len,
            "rows": rows,
            "tokens": rows * seq_len,
            "dtype": token_dtype(coder.vocab_size).name,
            "tokenizer": {
                "fingerprint": coder.fingerprint,
                "vocab_size": coder.vocab_size,
                "path": str(coder.path),
                "bos_id": coder.bos_id,
                "eos_id": coder.eos_id,
                "pad_id": coder.pad_id,
            },
            "token_bytes": {"name": TOKEN_BYTES, "sha256": hashlib.sha256(table.getvalue()).hexdigest()},
            "recipe": recipe,
            "files_sha256": hashlib.sha256(listed).hexdigest(),
            "packing": packing,
            "shards": run.writer.shards,
        },
    )
    (folder / UNFINISHED).unlink()
    return {"path": str(folder), "already_there": False, "seconds": time.monotonic() - start, **packing}


def _clear(folder: Path) -> None:
    """Make `folder` ready: new or empty, or what a run that was cut short left there, which is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in folder.iterdir()]
    if names and UNFINISHED not in names:
        raise InputError(f"{folder} holds {names[0]} and is not a packed dataset; name a new or empty --out")
    (folder / UNFINISHED).touch()
    for leftover in folder.glob("shard-*.tar*"):
        leftover.unlink()


@dataclass
class _Encoded:
    source: str
    ids: np.ndarray  # [tokens] of the smallest type, EOS last


class _Packing:
    """Encoded documents waiting to be planned, and what has been written of them."""

    def __init__(self, coder: Tokenizer, seq_len: int, writer: ShardWriter, shuffle_seed: int | None) -> None:
        self.coder, self.seq_len, self.writer, self.shuffle_seed = coder, seq_len, writer, shuffle_seed
        self.dtype = token_dtype(coder.vocab_size)
        self.documents: dict[int, _Encoded] = {}  # those with pieces waiting, and those of `head`
        self.waiting: list[Piece] = []
        self.waiting_tokens = 0
        self.head: list[int] = []  # the first documents, at least a row of tokens: the last row is filled with them
        self.head_tokens = 0
        self.buffers = 0
        self.count: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()  # of documents: power of two -> how many

    def add(self, batch: list[Document]) -> None:
        """Encode documents; write rows once the buffer is full."""
        for document, ids in zip(batch, self.coder.encode_batch([d.text for d in batch]), strict=True):
            number = self.count["documents"]
            encoded = _Encoded(document.source, np.append(ids, self.coder.eos_id).astype(self.dtype))
            size = encoded.ids.size
            self.documents[number] = encoded
            self.waiting.append(Piece(number, 0, size))
            self.waiting_tokens += size
            if self.head_tokens < self.seq_len:
                self.head.append(number)
                self.head_tokens += size
            self.count["documents"] += 1
            self.count["document_tokens"] += size
            self.count["raw_bytes"] += len(document.text.encode())
            self.count["forced_splits"] += (size - 1) // self.seq_len
            self.lengths[size.bit_length() - 1] += 1
            if self.waiting_tokens >= BUFFER_TOKENS:
                self._write_buffer()

    def finish(self) -> None:
        """Write what waits, the last row filled up with `head` over again."""
        self._write_buffer()
        if self.waiting:
            room = self.seq_len - self.waiting_tokens
            repeats: list[Piece] = []
            while room:
                for number in self.head:
                    size = min(room, self.documents[number].ids.size)
                    repeats += [Piece(number, 0, size)] if size else []
                    room -= size
            self._write_row(self.waiting, repeats)
        self.writer.close()

    def statistics(self) -> dict[str, Any]:
        """For the manifest and the command's report; counts of rows, tokens, documents, splits (cuts) and bytes."""
        names = ("rows", "documents", "document_tokens", "raw_bytes", "splits", "forced_splits", "repeat_tokens")
        lengths = {f"{1 << power}-{(2 << power) - 1}": self.lengths[power] for power in sorted(self.lengths)}
        tokens = self.count["rows"] * self.seq_len
        return {**{name: self.count[name] for name in names}, "tokens": tokens, "document_lengths": lengths}

    def _write_buffer(self) -> None:
        rows, rest = plan(self.waiting, self.seq_len)
        rows.sort(key=min)  # best-fit decreasing sorts by length; this brings back the sources' order
        if self.shuffle_seed is not None and rows:
            order = permute(np.arange(len(rows)), len(rows), self.shuffle_seed, self.buffers, "pack")
            rows = [rows[i] for i in order]
        for row in rows:
            self._write_row(row, [])
        self.buffers += 1
        self.waiting, self.waiting_tokens = rest, sum(piece.length for piece in rest)
        kept = {piece.doc for piece in rest} | set(self.head)
        self.documents = {number: self.documents[number] for number in self.documents if number in kept}

    def _write_row(self, pieces: list[Piece], repeats: list[Piece]) -> None:
        all_pieces = pieces + repeats
        tokens = np.concatenate([self.documents[p.doc].ids[p.start : p.start + p.length] for p in all_pieces])
        cu_seqlens = np.cumsum([0, *(p.length for p in all_pieces)]).astype("<i4")
        counted = sum(p.length for p in pieces)
        loss_mask = np.zeros(self.seq_len, np.uint8)
        loss_mask[:counted] = 1
        sizes = np.add.reduceat(self.coder.token_bytes[tokens], cu_seqlens[:-1], dtype=np.int64)
        docs = []
        for i, piece in enumerate(all_pieces):
            document = self.documents[piece.doc]
            docs.append(
                {
                    "doc": piece.doc,
                    "source": document.source,
                    "start": piece.start,
                    "tokens": piece.length,
                    "of": document.ids.size,
                    "bytes": int(sizes[i]),
                    "continues": piece.start > 0,
                    "continued": piece.start + piece.length < document.ids.size,
                    "repeat": i >= len(pieces),
                }
            )
            self.count["splits"] += i < len(pieces) and piece.start > 0
        self.count["repeat_tokens"] += self.seq_len - counted
        key = f"{self.count['rows']:09d}"
        self.count["rows"] += 1
        self.writer.write(Row(key, tokens, cu_seqlens, loss_mask, json.dumps(docs, separators=(",", ":")).encode()))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
