"""`perilune pack`: documents into rows of exactly `seq_len` tokens, in WebDataset tar shards with a manifest.

The steps: documents are cut into batches, which workers encode and put on disk (`spool`); lengths alone are planned
into rows, a buffer at a time (`packing.plan`); workers write the rows, a shard at a time. What comes out depends on the
sources and the options, and on nothing else: not on the number of workers, nor on how often the run was killed.

Every document ends with EOS. What does not fill a row waits for the next buffer. A row left open at the end (one at
most without images) is filled up with text of the first documents over again, marked `repeat` and masked from the
loss. So no token is padding, none is dropped, none counts twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from perilune.pretrain.data import sources as data_sources
from perilune.pretrain.data.encode import EncodedDocument, Encoding
from perilune.pretrain.data.manifest import NAME, TOKEN_BYTES, read_manifest, write_atomically, write_manifest
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.pack_worker import Job, Placed, Pool, Worker, open_pool
from perilune.pretrain.data.packing import Piece, Span, chunks, plan
from perilune.pretrain.data.shard import token_dtype
from perilune.pretrain.data.sources import Document, SourceFile, Split
from perilune.pretrain.data.spool import FOLDER, Spool, SpooledBatch
from perilune.pretrain.data.storage import is_url
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from perilune.pretrain.doctor import usable_cores
from perilune.pretrain.errors import InputError, make_folder
from perilune.vision.image_header import ImageRule

BUFFER_TOKENS = 1 << 25  # planned at once unless the user says otherwise
MAX_SEQ_LEN = 1 << 24  # a row is laid out in memory, in the worst case token by token
BATCH_SIZE = 1 << 22  # characters of text and bytes of images encoded at once
BATCH_DOCUMENTS = 4096
LOCK = ".packing.lock"


def pack(
    sources: Sequence[str],
    out: Path,
    tokenizer: Path,
    seq_len: int,
    *,
    valid_fraction: float = 0.0,
    shuffle_seed: int | None = None,
    rows_per_shard: int = 4096,
    buffer_tokens: int = BUFFER_TOKENS,
    fim_rate: float = 0.0,
    patch_limit: int = 4096,
    max_patches: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Pack `sources` into `out`, or into `out/train` and `out/valid` when a part is held out.

    `demo:stdlib` holds out files of its own; for other sources `valid_fraction` of the documents are, by the hash of
    their text. Best-fit decreasing sees `buffer_tokens` at once (0: everything). Rows keep the sources' order, or with
    `shuffle_seed` stand shuffled within a buffer. `fim_rate` of the text documents not held out are rearranged for
    filling in the middle. An image of more than `patch_limit` patches is scaled down when it is read; a row holds
    `max_patches` at most. `workers` processes do the work (None: as many as there are cores and batches).
    The same arguments give the same bytes, whatever the number of workers; a run that was killed goes on where it was.
    What lies in `out` itself is no source.

    Returns `{name: statistics}`, name `all`, or `train` and `valid`; each holds path, rows, tokens, documents, splits,
    raw_bytes, seconds, already_there and the rest of the manifest's `packing`. Raises InputError for bad input and for
    an `out` packed from other text or by another recipe.
    """
    out = Path(out)
    if re.match(r"[a-z0-9+]+:/", str(out)):  # what a path makes of `s3://`
        raise InputError(f"--out {out}: shards are written to a folder here; name one, then copy it")
    least = {"--seq-len": seq_len, "rows per shard": rows_per_shard, "--patch-limit": patch_limit}
    least |= {"--max-patches": max_patches or 1, "--workers": 1 if workers is None else workers}
    for name, value in least.items():
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    if seq_len > MAX_SEQ_LEN:
        raise InputError(f"--seq-len {seq_len}: the limit is {MAX_SEQ_LEN}")
    if buffer_tokens < 0:
        raise InputError(f"--buffer-tokens {buffer_tokens}: must be 0 (everything at once) or more")
    for name, part in (("--valid-fraction", valid_fraction), ("--fim-rate", fim_rate)):
        if not 0 <= part < 1:
            raise InputError(f"{name} {part}: must be at least 0 and below 1")
    coder = load_tokenizer(tokenizer)
    if fim_rate:
        coder.fim_ids()
    files = _outside(out, data_sources.find_files(sources))
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
            "buffer_tokens": buffer_tokens,
            "fim_rate": 0.0 if split == "valid" else fim_rate,
            "patch_limit": patch_limit,
            "max_patches": max_patches,
        }
        stats[split or "all"] = _pack_split(mine, out / split if split else out, coder, recipe, workers)
    return stats


def _outside(out: Path, files: list[SourceFile]) -> list[SourceFile]:
    """`files` without what lies in `out`: a folder of sources may hold it, and finds other files in it each time."""
    where = out.resolve()
    inside = [file for file in files if not is_url(file.path) and Path(file.path).resolve().is_relative_to(where)]
    if len(inside) == len(files):
        raise InputError(f"--out {out} holds the sources themselves, {files[0].name} first; name another --out")
    return [file for file in files if file not in inside] if inside else files


def _pack_split(
    files: list[SourceFile], folder: Path, coder: Tokenizer, recipe: dict[str, Any], workers: int | None
) -> dict[str, Any]:
    if (folder / NAME).exists():
        return _already_there(folder, recipe)
    start = time.monotonic()
    make_folder(folder)
    names = [path.name for path in folder.iterdir() if path.name != LOCK]
    if names and FOLDER not in names:
        raise InputError(f"{folder} holds {names[0]} and is not a packed dataset; name a new or empty --out")
    with _alone(folder):
        if (folder / NAME).exists():  # by now
            return _already_there(folder, recipe)
        packing = _pack_into(folder, files, coder, recipe, workers)
    return {"path": str(folder), "already_there": False, "seconds": time.monotonic() - start, **packing}


def _already_there(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest["recipe"] != recipe:
        changed = [key for key in recipe if manifest["recipe"].get(key) != recipe[key]]
        raise InputError(f"{folder} already holds a dataset, with other {', '.join(changed)}; name another --out")
    Spool(folder).clear_scratch()
    return {"path": str(folder), "already_there": True, "seconds": 0.0, **manifest["packing"]}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other packing writes here meanwhile: it would take this one's scratch files for its own, or remove them."""
    path = folder / LOCK
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(stream.fileno()), path.stat())  # not one that its owner has just removed
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:  # a file system without locks
            mine = True
        if not mine:
            raise InputError(f"another `perilune pack` is at work in {folder}: wait for it, or name another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _pack_into(
    folder: Path, files: list[SourceFile], coder: Tokenizer, recipe: dict[str, Any], workers: int | None
) -> dict[str, Any]:
    """The statistics of the dataset, once it is whole."""
    how = Encoding(recipe["seq_len"], recipe["fim_rate"], recipe["patch_limit"], recipe["max_patches"])
    job = Job(folder, coder.path, coder.fingerprint, how)
    if workers is None:
        batches = 1 + sum(file["bytes"] for file in recipe["files"]) // BATCH_SIZE
        workers = min(usable_cores(), batches)
    try:
        with open_pool(job, workers, coder) as pool:
            try:
                run = _run(files, job, coder, recipe, pool, workers)
            except _Lost as lost:
                Console(stderr=True).print(f"{folder}: {lost}; packing starts again", highlight=False)
                Spool(folder).clear()
                run = _run(files, job, coder, recipe, pool, workers)
    except (OSError, BrokenProcessPool) as error:  # a full disk; a worker that was killed, most often for memory
        raise InputError(f"{folder}: packing stopped: {error}; the same command goes on from there") from error
    if not run.count["documents"]:
        run.spool.clear()
        more = "more text, or a larger --valid-fraction and another --out" if recipe["valid_fraction"] else "more text"
        raise InputError(f"{folder}: no document in this split of {len(files)} files; give {more}")
    packing = run.statistics()
    _write_manifest(folder, coder, recipe, packing, run)
    run.spool.clear_scratch()
    return packing


def _run(
    files: list[SourceFile], job: Job, coder: Tokenizer, recipe: dict[str, Any], pool: Pool, workers: int
) -> _Packing:
    run = _Packing(job, coder, recipe, pool, 2 * workers, {file.name: file.spec for file in files})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        total = sum(file["bytes"] for file in recipe["files"])
        task = bar.add_task(f"packing {job.dataset}", total=total)  # of the files: compressed ones end beyond it
        for batch in _encoded(files, run.spool, recipe, pool, 2 * workers):
            run.add(batch)
            bar.update(task, completed=min(run.count["raw_bytes"] + run.count["image_bytes"], total))
        run.finish()
        bar.update(task, completed=total)
    return run


def _encoded(
    files: list[SourceFile], spool: Spool, recipe: dict[str, Any], pool: Pool, ahead: int
) -> Iterator[SpooledBatch]:
    """The batches in order: those that are on disk from before, then the rest, `ahead` of them in work at once."""
    number, place = 0, (0, 0)
    if spool.begin(recipe):
        while (known := spool.load_batch(number)) is not None:
            number, place = number + 1, known.place
            yield known
    waiting: deque[Future[SpooledBatch]] = deque()
    documents = data_sources.read_placed(files, recipe["split"], recipe["valid_fraction"], place)
    for documents_of, after in _batches(documents):
        known = spool.load_batch(number)  # workers finish out of order
        if known is not None:
            done: Future[SpooledBatch] = Future()
            done.set_result(known)
            waiting.append(done)
        else:
            waiting.append(pool.submit(Worker.encode, number, documents_of, after))
        number += 1
        while len(waiting) >= ahead or (waiting and waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(documents: Iterable[tuple[int, int, Document]]) -> Iterator[tuple[list[Document], tuple[int, int]]]:
    """(documents, place in the sources after them)."""
    batch: list[Document] = []
    size = 0
    place = (0, 0)
    for file, record, document in documents:
        batch.append(document)
        place = (file, record)
        size += sum(part.nbytes if isinstance(part, np.ndarray) else len(part) for part in document.parts)
        if size >= BATCH_SIZE or len(batch) >= BATCH_DOCUMENTS:
            yield batch, place
            batch, size = [], 0
    if batch:
        yield batch, place


class _Lost(Exception):
    """Tokens of an earlier run that are needed again are not there any more."""


@dataclass(frozen=True)
class _Known:
    batch: int
    document: EncodedDocument


class _Packing:
    """Encoded documents waiting to be planned, rows waiting to be written, and what has been written."""

    def __init__(
        self, job: Job, coder: Tokenizer, recipe: dict[str, Any], pool: Pool, ahead: int, specs: dict[str, str]
    ) -> None:
        self.spool, self.coder, self.pool, self.ahead, self.specs = Spool(job.dataset), coder, pool, ahead, specs
        self.seq_len, self.max_patches = job.how.seq_len, job.how.max_patches
        self.seed, self.rows_per_shard = recipe["shuffle_seed"], recipe["rows_per_shard"]
        self.buffer_tokens = recipe["buffer_tokens"]
        self.documents: dict[int, _Known] = {}  # those with pieces waiting, and those of `head`
        self.spans: dict[int, list[Span]] = {}  # of those with images
        self.waiting: list[Piece] = []
        self.waiting_tokens = 0
        self.head: list[Piece] = []  # text of the first documents, a row of it or more: fills the last rows
        self.head_tokens = 0
        self.rows: list[list[Placed]] = []  # not yet given to a worker
        self.shards: dict[int, dict[str, Any]] = {}  # written
        self.writing: deque[tuple[int, Future[dict[str, Any]], Counter[int]]] = deque()
        self.left: Counter[int] = Counter()  # batch -> its tokens that stand in no finished shard
        self.gone: set[int] = set()  # batches whose tokens are not kept any more
        self.kept: set[int] = set()  # batches of `head`
        self.buffers = 0
        self.count: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}
        self.lengths: Counter[int] = Counter()  # of documents: power of two -> how many
        self.pieces: Counter[int] = Counter()  # of rows: documents or parts of them -> how many

    def add(self, batch: SpooledBatch) -> None:
        """Take in a batch; give rows to the workers once the buffer is full."""
        self.left[batch.number] = sum(document.size for document in batch.documents)
        if not batch.there:
            self.gone.add(batch.number)
        for document in batch.documents:
            number, size = self.count["documents"], document.size
            self.documents[number] = _Known(batch.number, document)
            piece = Piece(number, 0, size)
            forced = (size - 1) // self.seq_len
            if document.images:
                spans = [Span(i.start, i.end, i.down * i.across) for i in document.images]
                self.spans[number] = spans
                forced = len(chunks(piece, self.seq_len, self.spans, self.max_patches)) - 1
            self.waiting.append(piece)
            self.waiting_tokens += size
            if self.head_tokens < self.seq_len:
                text = _text_of(piece, self.spans.get(number, []))
                self.head += text
                self.head_tokens += sum(part.length for part in text)
                self.kept.add(batch.number)
            self._count(document, forced)
            if self.buffer_tokens and self.waiting_tokens >= self.buffer_tokens:
                self._plan()

    def finish(self) -> None:
        """Plan and write all that waits, rows that stay open filled up with `head` over again."""
        self._plan()
        for pieces in self._open:
            self._row(pieces, self._repeats(pieces))
        if self.rows:
            self._write(self.rows)
        while self.writing:
            self._finish_shard()

    def statistics(self) -> dict[str, Any]:
        """For the manifest and the command's report; counts of rows, tokens, documents, splits (cuts) and bytes."""
        names = ["rows", "documents", "document_tokens", "raw_bytes", "splits", "forced_splits", "repeat_tokens"]
        names += ["fim_documents", "images", "image_tokens", "image_bytes", "patches"]
        lengths = {f"{1 << power}-{(2 << power) - 1}": self.lengths[power] for power in sorted(self.lengths)}
        return {
            **{name: self.count[name] for name in names},
            "tokens": self.count["rows"] * self.seq_len,
            "document_lengths": lengths,
            "pieces_per_row": {str(n): self.pieces[n] for n in sorted(self.pieces)},
            "sources": {spec: dict(counts) for spec, counts in self.by_source.items()},
        }

    def _count(self, document: EncodedDocument, forced: int) -> None:
        one = {
            "documents": 1,
            "document_tokens": document.size,
            "raw_bytes": document.raw_bytes,
            "images": len(document.images),
        }
        self.count.update(one)
        source = document.source
        while source not in self.specs:  # file, file:line, or file:key, where names may hold colons too
            source = source.rpartition(":")[0]
        self.by_source.setdefault(self.specs[source], Counter()).update(one)
        self.count["forced_splits"] += forced
        self.count["fim_documents"] += document.fim
        self.lengths[document.size.bit_length() - 1] += 1
        for image in document.images:
            self.count["image_tokens"] += image.tokens
            self.count["image_bytes"] += image.size
            self.count["patches"] += image.down * image.across

    def _plan(self) -> None:
        rows, self._open = plan(self.waiting, self.seq_len, self.spans, self.max_patches)
        rows.sort(key=min)  # best-fit decreasing sorts by length; this brings back the sources' order
        if self.seed is not None and rows:
            order = permute(np.arange(len(rows)), len(rows), self.seed, self.buffers, "pack")
            rows = [rows[i] for i in order]
        for row in rows:
            self._row(row, [])
        self.buffers += 1
        # Open rows wait for text. Where patches run out before tokens do it never comes, and the buffer must not fill
        # up with them.
        self._open.sort(key=lambda pieces: sum(piece.length for piece in pieces))
        held = sum(piece.length for pieces in self._open for piece in pieces)
        while self.buffer_tokens and len(self._open) > 1 and held > self.buffer_tokens // 2:
            pieces = self._open.pop()
            held -= sum(piece.length for piece in pieces)
            self._row(pieces, self._repeats(pieces))
        self.waiting = [piece for pieces in self._open for piece in pieces]
        self.waiting_tokens = sum(piece.length for piece in self.waiting)
        kept = {piece.doc for piece in self.waiting} | {piece.doc for piece in self.head}
        self.documents = {number: self.documents[number] for number in self.documents if number in kept}
        self.spans = {number: self.spans[number] for number in self.spans if number in kept}

    def _repeats(self, pieces: list[Piece]) -> list[Piece]:
        """What fills up an open row: `head` over again."""
        room = self.seq_len - sum(piece.length for piece in pieces)
        repeats: list[Piece] = []
        while room:
            for piece in self.head:
                size = min(room, piece.length)
                repeats += [piece._replace(length=size)] if size else []
                room -= size
        return repeats

    def _row(self, pieces: list[Piece], repeats: list[Piece]) -> None:
        row = [self._placed(piece, False) for piece in pieces] + [self._placed(piece, True) for piece in repeats]
        self.count["rows"] += 1
        self.count["splits"] += sum(piece.start > 0 for piece in pieces)
        self.count["repeat_tokens"] += sum(piece.length for piece in repeats)
        self.pieces[len(row)] += 1
        self.rows.append(row)
        if len(self.rows) == self.rows_per_shard:
            self._write(self.rows)
            self.rows = []

    def _placed(self, piece: Piece, repeat: bool) -> Placed:
        known = self.documents[piece.doc]
        return Placed(piece.doc, known.batch, known.document, piece.start, piece.length, repeat)

    def _write(self, rows: list[list[Placed]]) -> None:
        """Have the next shard written, unless it is there from before."""
        number = len(self.shards) + len(self.writing)
        tokens: Counter[int] = Counter()
        for row in rows:
            for piece in row:
                tokens[piece.batch] += 0 if piece.repeat else piece.length
        done: Future[dict[str, Any]] = Future()
        if (entry := self.spool.load_shard(number)) is not None:
            done.set_result(entry)
        else:
            if lost := self.gone & tokens.keys():
                raise _Lost(f"shard {number} is damaged, and the tokens of {len(lost)} batches are not kept any more")
            done = self.pool.submit(Worker.write, number, self.count["rows"] - len(rows), rows)
        self.writing.append((number, done, tokens))
        while len(self.writing) >= self.ahead or (self.writing and self.writing[0][1].done()):
            self._finish_shard()

    def _finish_shard(self) -> None:
        number, done, tokens = self.writing.popleft()
        self.shards[number] = done.result()
        self.left.subtract(tokens)
        for batch in tokens:
            if self.left[batch] == 0 and batch not in self.kept:
                self.spool.drop_batch(batch)
                del self.left[batch]


def _text_of(piece: Piece, spans: list[Span]) -> list[Piece]:
    """What `piece` holds besides images."""
    bounds = [piece.start, *(place for span in spans for place in (span.start, span.end)), piece.start + piece.length]
    runs = zip(bounds[::2], bounds[1::2], strict=True)
    return [Piece(piece.doc, begin, end - begin) for begin, end in runs if end > begin]


def _write_manifest(
    folder: Path, coder: Tokenizer, recipe: dict[str, Any], packing: dict[str, Any], run: _Packing
) -> None:
    table = io.BytesIO()
    np.lib.format.write_array(table, coder.token_bytes, version=(1, 0), allow_pickle=False)
    write_atomically(folder / TOKEN_BYTES, table.getvalue())
    listed = json.dumps(recipe["files"], sort_keys=True).encode()
    rule = ImageRule(coder.media_ids()[3], patch_limit=recipe["patch_limit"]) if packing["images"] else None
    write_manifest(
        folder,
        {
            "seq_len": recipe["seq_len"],
            "rows": packing["rows"],
            "tokens": packing["tokens"],
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
            "images": rule.to_dict() if rule else None,
            "recipe": recipe,
            "files_sha256": hashlib.sha256(listed).hexdigest(),
            "packing": packing,
            "shards": [run.shards[number] for number in sorted(run.shards)],
        },
    )
