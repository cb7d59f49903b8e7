"""The deterministic stream of global batches: which rows, in which order, to which rank.

The steps, each a pure function of what stands before it:

1. A `DataState` says how many rows of each dataset are consumed. It knows nothing of ranks, threads or batches.
2. `blend` decides from the counts which dataset gives each next row: the one furthest behind its weight.
3. `order.permute` turns a dataset's count into epoch and row, keyed by (seed, epoch, dataset).
4. `deal` gives each data-parallel rank its rows of the global batch, micro-batch by micro-batch.

So a global batch holds the same rows whatever the number of ranks, and after a resume from any state. Prefetching reads
one global batch ahead in a thread and changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain import schema
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.errors import InputError


@dataclass(frozen=True)
class DataState:
    """What has been consumed. Goes into a checkpoint by to_dict and from_dict (plain JSON)."""

    samples: int = 0  # rows, over all datasets
    tokens: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # dataset path -> rows consumed of it
    fingerprints: dict[str, str] = field(default_factory=dict)  # dataset path -> fingerprint of its content

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> DataState:
        """The state back; InputError where keys are missing, unknown, or counts do not add up."""
        try:
            state = DataState(**saved)
            sound = sum(state.counters.values()) == state.samples and state.counters.keys() == state.fingerprints.keys()
        except (TypeError, AttributeError) as error:
            raise InputError(f"the saved state of the data cannot be read: {error}") from error
        if not sound:
            raise InputError(f"the saved state of the data does not add up: {saved}")
        return state


class Stream:
    """Global batches of one dataset or a blend of several. Made by `open_stream`."""

    def __init__(self, datasets: dict[str, PackedDataset], weights: dict[str, float], seed: int, data: schema.Data,
                 depth: int) -> None:  # fmt: skip
        self.paths = list(datasets)
        self.datasets = list(datasets.values())
        total = sum(weights.values())
        self.weights = np.array([weights[path] / total for path in self.paths])
        self.seed = seed
        self.seq_len = data.seq_len
        self.depth = depth
        self.document_mask = data.document_mask
        self.tokenizer_fingerprint = self.datasets[0].tokenizer_fingerprint
        seen: list[str] = []
        self._names = []  # keys of the orders: the content, not its path; the same content twice differs by a number
        for dataset in self.datasets:
            self._names.append(f"{dataset.fingerprint}#{seen.count(dataset.fingerprint)}")
            seen.append(dataset.fingerprint)
        self._pool = ThreadPoolExecutor(data.workers, "data") if data.workers else None
        self._ahead: tuple[Any, Future[list[PackedBatch]]] | None = None

    def initial_state(self) -> DataState:
        """Nothing consumed yet."""
        fingerprints = {path: data.fingerprint for path, data in zip(self.paths, self.datasets, strict=True)}
        return DataState(counters=dict.fromkeys(self.paths, 0), fingerprints=fingerprints)

    def check_state(self, state: DataState) -> None:
        """Raise InputError where a state that was saved belongs to other data than this stream's."""
        mine = self.initial_state().fingerprints
        if state.fingerprints != mine:
            raise InputError(
                f"the run was trained on {state.fingerprints}, this stream reads {mine} (dataset: fingerprint); "
                "resume with the same data, or start a new run with --init-from"
            )

    def global_batch_ids(self, state: DataState, rows: int) -> list[tuple[int, int]]:
        """(dataset, row) of each row of the next global batch, both counted from 0."""
        counts = np.array([state.counters[path] for path in self.paths])
        chosen = blend(counts, self.weights, rows)
        picked = np.zeros(rows, np.int64)
        for d, dataset in enumerate(self.datasets):
            mine = np.flatnonzero(chosen == d)
            picked[mine] = self._order(d, len(dataset), counts[d] + np.arange(mine.size))
        return list(zip(chosen.tolist(), picked.tolist(), strict=True))

    def advance(self, state: DataState, rows: int) -> DataState:
        """The state once a global batch of `rows` rows is consumed."""
        counts = np.array([state.counters[path] for path in self.paths])
        taken = np.bincount(blend(counts, self.weights, rows), minlength=len(self.paths))
        return replace(
            state,
            samples=state.samples + rows,
            tokens=state.tokens + rows * self.seq_len,
            counters={path: int(c) for path, c in zip(self.paths, counts + taken, strict=True)},
        )

    def micro_batches(
        self, state: DataState, rows: int, dp_rank: int, dp_size: int, micro_batch_size: int
    ) -> list[PackedBatch]:
        """This rank's micro-batches of the next global batch of `rows` rows; begins to read the one after it.

        Raises InputError unless rows is a multiple of dp_size * micro_batch_size, and DamageError for damaged data.
        """
        if self._pool is None:
            return self._read(state, rows, dp_rank, dp_size, micro_batch_size)
        request = (state, rows, dp_rank, dp_size, micro_batch_size)
        if self._ahead is not None and self._ahead[0] == request:
            batches = self._ahead[1].result()
        else:
            batches = self._read(*request)
        following = (self.advance(state, rows), *request[1:])
        self._ahead = (following, self._pool.submit(self._read, *following))
        return batches

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for dataset in self.datasets:
            dataset.close()

    def _read(self, state: DataState, rows: int, dp_rank: int, dp_size: int, size: int) -> list[PackedBatch]:
        places = deal(rows, dp_rank, dp_size, size)
        ids = self.global_batch_ids(state, rows)
        return [self._batch([ids[place] for place in micro]) for micro in places.tolist()]

    def _batch(self, ids: Sequence[tuple[int, int]]) -> PackedBatch:
        rows = [self.datasets[d][i] for d, i in ids]
        names = [f"{self.paths[d]}/{self.datasets[d].sample_id(i)}" for d, i in ids]
        return collate(rows, self.depth, self.document_mask, names)

    def _order(self, d: int, size: int, counts: np.ndarray) -> np.ndarray:
        """The rows of dataset `d` at these places of its endless sequence of epochs."""
        out = np.empty_like(counts)
        epochs = counts // size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(counts[here] % size, size, self.seed, int(epoch), self._names[d])
        return out


def blend(counts: np.ndarray, weights: np.ndarray, rows: int) -> np.ndarray:
    """Which dataset gives each of the next `rows` rows: int64 [rows].

    counts, weights: [datasets], rows taken so far and shares that sum to 1. Always the dataset furthest behind its
    share (the first of equals), so after any number of rows each count is within the number of datasets of its share.
    """
    if len(weights) == 1:
        return np.zeros(rows, np.int64)
    taken = counts.astype(np.int64)
    first = int(taken.sum())
    chosen = np.empty(rows, np.int64)
    for n in range(rows):
        chosen[n] = np.argmax(weights * (first + n + 1) - taken)
        taken[chosen[n]] += 1
    return chosen


def deal(rows: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> np.ndarray:
    """Places in the global batch of a rank's rows: [micro_batches, micro_batch_size].

    Consecutive micro-batches go to consecutive ranks. Raises InputError where the numbers do not divide.
    """
    at_once = dp_size * micro_batch_size
    if rows < 1 or rows % at_once:
        raise InputError(
            f"a global batch of {rows} rows does not divide by {dp_size} data-parallel ranks x micro-batches of "
            f"{micro_batch_size} rows = {at_once}; change train.global_batch_size or train.micro_batch_size"
        )
    return np.arange(rows).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


def open_stream(data: schema.Data, seed: int, *, depth: int, vocab_size: int | None = None) -> Stream:
    """The stream of `data.path` or `data.blend`; `depth` is D (model.num_nextn_predict_layers).

    Raises InputError where there is no data, the datasets' rows are not data.seq_len long, their tokenizers differ, or
    their tokens do not fit the model's `vocab_size`.
    """
    if (data.path is None) == (not data.blend):
        raise InputError(f"data.path is {data.path!r} and data.blend {data.blend}: name one of the two")
    if data.on_damage != "stop":
        raise InputError(f"data.on_damage={data.on_damage}: not built yet; use data.on_damage=stop")
    weights = data.blend or {str(data.path): 1.0}
    if bad := {path: weight for path, weight in weights.items() if not 0 < weight < float("inf")}:
        raise InputError(f"data.blend: weights must be positive numbers, not {bad}")
    datasets = {path: open_dataset(path, data.seq_len, vocab_size) for path in weights}
    fingerprints = {path: dataset.tokenizer_fingerprint for path, dataset in datasets.items()}
    if len(set(fingerprints.values())) > 1:
        raise InputError(f"data.blend mixes tokenizers {fingerprints} (dataset: fingerprint); pack all with one")
    return Stream(datasets, weights, seed, data, depth)


def open_dataset(path: Path | str, seq_len: int, vocab_size: int | None = None) -> PackedDataset:
    """The dataset at `path`; InputError where its rows or its vocabulary do not fit the run."""
    dataset = PackedDataset(path)
    if dataset.seq_len != seq_len:
        raise InputError(
            f"{path}: packed in rows of {dataset.seq_len} tokens, but data.seq_len is {seq_len}; "
            f"set data.seq_len={dataset.seq_len}, or pack again with --seq-len {seq_len}"
        )
    if vocab_size is not None and dataset.vocab_size > vocab_size:
        raise InputError(
            f"{path}: its tokenizer has {dataset.vocab_size} tokens, the model {vocab_size}; "
            f"set model.vocab_size to {dataset.vocab_size} or more"
        )
    return dataset


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
    tokenizer_fingerprint: str | None = None,
) -> Iterator[tuple[PackedBatch, int]]:
    """(batch, bytes of text that its counted next-token targets stand for) over a dataset, in one fixed order.

    The first `max_rows` rows of that order (0: all) are dealt over the ranks; each rank gets the same number of
    micro-batches of exactly `micro_batch_size` rows, the last filled up with rows whose loss mask is all zero. Bits
    per byte is the sum of their losses over ln 2 and the sum of their bytes, both over all ranks. The end of a document
    is a target and stands for no byte; a segment's first token is predicted from nothing and is no target.

    Raises InputError as `open_dataset` does, and where the tokenizer is not the one of the training data.
    """
    dataset = open_dataset(path, seq_len, vocab_size)
    if tokenizer_fingerprint not in (None, dataset.tokenizer_fingerprint):
        raise InputError(
            f"{path}: packed with tokenizer {dataset.tokenizer_fingerprint}, the training data with "
            f"{tokenizer_fingerprint}; pack both with one"
        )
    count = min(max_rows, len(dataset)) if max_rows else len(dataset)
    order = permute(np.arange(count), len(dataset), "valid", dataset.fingerprint).tolist()
    at_once = dp_size * micro_batch_size
    blanks = -count % at_once
    try:
        for micro in deal(count + blanks, dp_rank, dp_size, micro_batch_size).tolist():
            rows = []
            for place in micro:
                row = dataset[order[place] if place < count else order[0]]
                rows.append(row if place < count else replace(row, loss_mask=np.zeros_like(row.loss_mask)))
            names = [dataset.sample_id(order[place]) if place < count else "blank" for place in micro]
            batch = collate(rows, depth, document_mask, names)
            counted = batch.labels[0].numpy()[batch.loss_mask[0].numpy() > 0]
            yield batch, int(dataset.token_bytes[counted].sum(dtype=np.int64))
    finally:
        dataset.close()
