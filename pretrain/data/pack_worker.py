"""The two pieces of work that `perilune pack` gives to processes: a batch encoded, a shard written.

Both are functions of their arguments and of files already on disk, so who does them, and in which order, does not show.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from perilune.pretrain.data.encode import EncodedDocument, Encoding, encode_documents
from perilune.pretrain.data.shard import Row, RowImage, ShardWriter, token_dtype
from perilune.pretrain.data.sources import Document
from perilune.pretrain.data.spool import Spool, SpooledBatch
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from perilune.pretrain.errors import InputError


class Placed(NamedTuple):
    """A piece of a document in a row."""

    number: int  # of the document in the dataset
    batch: int
    document: EncodedDocument
    start: int
    length: int
    repeat: bool  # stands here over again, masked from the loss


@dataclass(frozen=True)
class Job:
    """What a worker needs to know once."""

    dataset: Path
    tokenizer: Path
    fingerprint: str  # of the tokenizer
    how: Encoding


class Worker:
    """Does the work, in this process or in one of a pool."""

    def __init__(self, job: Job, coder: Tokenizer | None = None) -> None:
        self.job, self.coder = job, coder or load_tokenizer(job.tokenizer)
        if self.coder.fingerprint != job.fingerprint:
            raise InputError(f"{job.tokenizer}: changed while it was used; start again")
        self.spool = Spool(job.dataset)

    def encode(self, number: int, documents: Sequence[Document], place: tuple[int, int]) -> SpooledBatch:
        """Batch `number` encoded and on disk."""
        with _one_thread():
            batch = encode_documents(self.coder, documents, self.job.how)
        return self.spool.save_batch(number, batch, place)

    def write(self, number: int, first_row: int, rows: Sequence[Sequence[Placed]]) -> dict[str, Any]:
        """Shard `number` of these rows written and recorded; returns its entry in the manifest."""
        writer = ShardWriter(self.job.dataset, len(rows), number)
        for i, pieces in enumerate(rows):
            writer.write(self._row(f"{first_row + i:09d}", pieces))
        self.spool.save_shard(number, writer.shards[0])
        return writer.shards[0]

    def _row(self, key: str, pieces: Sequence[Placed]) -> Row:
        dtype = token_dtype(self.coder.vocab_size)
        parts, docs = [], []
        images: list[RowImage] = []
        loss_mask = np.ones(self.job.how.seq_len, np.uint8)
        at = 0
        for piece in pieces:
            document, end = piece.document, piece.start + piece.length
            begin = (document.offset + piece.start) * dtype.itemsize
            tokens = self.spool.bytes_of(piece.batch, begin, piece.length * dtype.itemsize).view(dtype)
            parts.append(tokens)
            if piece.repeat:
                loss_mask[at : at + piece.length] = 0
            for image in document.images:
                if piece.start <= image.start and image.end <= end:
                    shift = at - piece.start
                    loss_mask[image.start + shift : image.end + shift] = 0
                    data = self.spool.bytes_of(piece.batch, image.offset, image.size).tobytes()
                    grid = (image.down, image.across)
                    images.append(RowImage(data, image.ending, image.first + shift, image.tokens, grid))
            docs.append(
                {
                    "doc": piece.number,
                    "source": document.source,
                    "start": piece.start,
                    "tokens": piece.length,
                    "of": document.size,
                    "bytes": int(self.coder.token_bytes[tokens].sum(dtype=np.int64)),
                    "continues": piece.start > 0,
                    "continued": end < document.size,
                    "repeat": piece.repeat,
                }
            )
            at += piece.length
        cu_seqlens = np.cumsum([0, *(piece.length for piece in pieces)]).astype("<i4")
        docs_json = json.dumps(docs, separators=(",", ":")).encode()
        return Row(key, np.concatenate(parts), cu_seqlens, loss_mask, docs_json, tuple(images))


class Pool(Protocol):
    def submit(self, work: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Have `work(worker, *args)` done."""


class _Here:
    """No other process: each piece of work is done when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, work: Callable[..., Any], /, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(self._worker, *args))
        return done


class _Processes:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, work: Callable[..., Any], /, *args: Any) -> Future[Any]:
        # This may start a process, which keeps the mask: Ctrl-C goes to all of them, and is for this one to answer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_do, work, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def open_pool(job: Job, workers: int, coder: Tokenizer) -> Iterator[Pool]:
    """`workers` processes, or with one this process itself."""
    if workers == 1:
        yield _Here(Worker(job, coder))
        return
    # Spawned, since this process has threads (of the tokenizer and the progress bar), which a fork would cut off.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (job,))
    try:
        yield _Processes(pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _start(job: Job) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(job)


def _do(work: Callable[..., Any], *args: Any) -> Any:
    assert _worker is not None
    return work(_worker, *args)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for ever and hold the files."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tokenizer's threads off: the workers are as many as there are cores to use."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
