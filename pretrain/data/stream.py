"""The deterministic stream of global batches: which rows, in which order, to which rank.

The steps, each a pure function of what stands before it:

1. A `DataState` says how many rows of each dataset are consumed. It knows nothing of ranks, processes or batches.
2. `Blend` says which dataset gives each next row: the one furthest behind its weight.
3. `order.permute` turns a dataset's count into epoch and row, keyed by (seed, epoch, dataset).
4. A row that is quarantined is replaced by the next whole one of its dataset.
5. `dealing.deal` gives each data-parallel rank its rows of the global batch, micro-batch by micro-batch, by their cost.

So a global batch holds the same rows whatever the number of ranks, and after a resume from any state. Processes that
read ahead (`prefetch`) change nothing but the time.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perilune.pretrain import schema
from perilune.pretrain.data.blend import Blend, Weight
from perilune.pretrain.data.dealing import CostModel, deal
from perilune.pretrain.data.images import read_decoded
from perilune.pretrain.data.manifest import image_rule
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.prefetch import Finding, Ids, Loaded, ReadingProcess, Recipe, load
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.storage import Remote
from perilune.pretrain.errors import InputError

if TYPE_CHECKING:  # a launcher opens datasets without the seconds that importing torch takes
    from perilune.pretrain.data.batch import PackedBatch

Agree = Callable[[Sequence[Finding]], list[Finding]]  # what one process found -> what all found, equal on all


@dataclass(frozen=True)
class DataState:
    """What has been consumed. Goes into a checkpoint by to_dict and from_dict (plain JSON)."""

    samples: int = 0  # rows, over all datasets
    tokens: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # dataset path -> rows consumed of it
    fingerprints: dict[str, str] = field(default_factory=dict)  # dataset path -> fingerprint of its content
    # Rows found damaged, as they were found: dataset (path), row (number), id (shard/key), replaced_by (the rule's
    # answer then; later damage may move it on), reason, samples (the state's, at the batch that met it)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    # dataset path -> rows of its content that runs before this one had read, of the same seed's order
    earlier: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> DataState:
        """The state back; InputError where keys are missing, unknown, or counts do not add up."""
        try:
            state = DataState(**saved)
            sound = sum(state.counters.values()) == state.samples and state.counters.keys() == state.fingerprints.keys()
            sound = sound and all(path in state.counters and rows >= 0 for path, rows in state.earlier.items())
            sound = sound and all(
                entry["dataset"] in state.counters and entry["row"] >= 0 for entry in state.quarantine
            )
        except (TypeError, AttributeError, KeyError) as error:
            raise InputError(f"the saved state of the data cannot be read: {error!r}") from error
        if not sound:
            raise InputError(f"the saved state of the data does not add up: {saved}")
        return state


@dataclass(frozen=True)
class _Request:
    """A rank's part of a global batch; equal requests give equal batches."""

    state: DataState
    rows: int
    dp_rank: int
    dp_size: int
    micro_batch_size: int


class Stream:
    """Global batches of one dataset or a blend of several. Made by `open_stream`."""

    def __init__(
        self,
        datasets: dict[str, PackedDataset],
        weights: Mapping[str, Weight],
        seed: int,
        data: schema.Data,
        depth: int,
        cost: CostModel,
        agree: Agree,
        decode: bool = False,
    ) -> None:
        self.paths = list(datasets)
        self.datasets = list(datasets.values())
        self.blend = Blend(weights, data.seq_len)
        self.seed = seed
        self.seq_len = data.seq_len
        self.tokenizer_fingerprint = self.datasets[0].tokenizer_fingerprint
        self._limit, self._agree = data.quarantine_limit, agree
        self._recipe = Recipe(
            tuple(self.paths),
            tuple(dataset.fingerprint for dataset in self.datasets),
            depth,
            data.document_mask,
            remote_of(data),
            data.on_damage == "quarantine",
            data.caption_noise,
            decode,
        )
        self._costs = []
        for dataset in self.datasets:  # without a mask all rows attend alike
            squares = dataset.squares if data.document_mask else np.full(len(dataset), data.seq_len**2)
            self._costs.append(cost.of(squares, dataset.patches, data.seq_len))
        seen: list[str] = []
        self._names = []  # keys of the orders: the content, not its path; the same content twice differs by a number
        for dataset in self.datasets:
            self._names.append(f"{dataset.fingerprint}#{seen.count(dataset.fingerprint)}")
            seen.append(dataset.fingerprint)
        self._workers = data.workers
        self._pool = ThreadPoolExecutor(data.workers, "data") if data.workers else None
        self._processes: queue.SimpleQueue[ReadingProcess] = queue.SimpleQueue()  # idle
        self._started: list[ReadingProcess] = []
        self._ahead: deque[tuple[_Request, Future[_Read]]] = deque()

    def initial_state(self) -> DataState:
        """Nothing consumed yet."""
        fingerprints = {path: data.fingerprint for path, data in zip(self.paths, self.datasets, strict=True)}
        return DataState(counters=dict.fromkeys(self.paths, 0), fingerprints=fingerprints)

    def begin_after(self, before: Sequence[DataState]) -> DataState:
        """Nothing consumed yet, in a run that takes over from others, which read in the order of this stream's seed:
        their rows are not read again before the rest.

        A dataset, known by the fingerprint of its content wherever it lies, goes on from the furthest of them.
        """
        earlier = dict.fromkeys(self.paths, 0)
        for path, dataset in zip(self.paths, self.datasets, strict=True):
            for state in before:
                for theirs, fingerprint in state.fingerprints.items():
                    if fingerprint == dataset.fingerprint:
                        rows = state.counters[theirs] + state.earlier.get(theirs, 0)
                        earlier[path] = max(earlier[path], rows)
        return replace(self.initial_state(), earlier=earlier)

    def found_again(self, state: DataState) -> DataState:
        """A state that was saved, by the paths where the same content lies now; InputError as `check_state`.

        A blend's datasets are found in its order, which decides between those that are equally far behind.
        """
        if list(state.fingerprints.values()) == [dataset.fingerprint for dataset in self.datasets]:
            now = dict(zip(state.fingerprints, self.paths, strict=True))
            state = replace(
                state,
                counters={now[path]: rows for path, rows in state.counters.items()},
                fingerprints={now[path]: fingerprint for path, fingerprint in state.fingerprints.items()},
                quarantine=[entry | {"dataset": now[entry["dataset"]]} for entry in state.quarantine],
                earlier={now[path]: rows for path, rows in state.earlier.items()},
            )
        self.check_state(state)
        return state

    def check_state(self, state: DataState) -> None:
        """Raise InputError where a state that was saved belongs to other data than this stream's, or another blend."""
        mine = self.initial_state().fingerprints
        if list(state.fingerprints.items()) != list(mine.items()):
            if sorted(state.fingerprints.values()) == sorted(mine.values()):
                raise InputError(
                    f"data.blend names its datasets in the order {list(mine.values())}, the run did in the order "
                    f"{state.fingerprints} (dataset: fingerprint). Of datasets equally far behind the first gives the "
                    "next row: name them in the run's order"
                )
            raise InputError(
                f"the run was trained on {state.fingerprints}, this stream reads {mine} (dataset: fingerprint); "
                "resume with the same data, or start a new run with --init-from"
            )
        counts = dict(zip(self.paths, self.blend.counts(state.samples).tolist(), strict=True))
        if state.counters != counts:
            raise InputError(
                f"the saved state counts {state.counters} rows consumed; by data.blend {state.samples} rows are "
                f"{counts}; resume with the blend of the run"
            )

    def global_batch_ids(self, state: DataState, rows: int) -> Ids:
        """(dataset, row) of each row of the next global batch, both counted from 0."""
        chosen = self.blend.choose(state.samples, rows)
        picked = np.zeros(rows, np.int64)
        for d, dataset in enumerate(self.datasets):
            mine = np.flatnonzero(chosen == d)
            read = state.earlier.get(self.paths[d], 0) + state.counters[self.paths[d]]
            picked[mine] = self._order(d, len(dataset), read + np.arange(mine.size))
        ids = list(zip(chosen.tolist(), picked.tolist(), strict=True))
        if not state.quarantine:
            return ids
        damaged = self._damaged(state)
        return [(d, self._whole(d, i, damaged)) for d, i in ids]

    def advance(self, state: DataState, rows: int) -> DataState:
        """The state once a global batch of `rows` rows is consumed."""
        taken = np.bincount(self.blend.choose(state.samples, rows), minlength=len(self.paths)).tolist()
        return replace(
            state,
            samples=state.samples + rows,
            tokens=state.tokens + rows * self.seq_len,
            counters={path: state.counters[path] + n for path, n in zip(self.paths, taken, strict=True)},
        )

    def read(
        self,
        state: DataState,
        rows: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        rows_at: Callable[[int], int] | None = None,
    ) -> tuple[list[PackedBatch], DataState]:
        """This rank's micro-batches of the next global batch of `rows` rows, and the state to advance from.

        The state returned differs from the one given by rows found damaged, where data.on_damage=quarantine. Begins to
        read the batches that follow; `rows_at` gives their rows by the tokens consumed, unless all have `rows`.

        Raises InputError unless rows is a multiple of dp_size * micro_batch_size, DamageError for damaged data, or for
        more of it than may be quarantined, and StoreError where a remote store fails.
        """
        while True:
            request = _Request(state, rows, dp_rank, dp_size, micro_batch_size)
            found = self._take(request, rows_at or (lambda tokens: rows))
            findings = self._agree(found.findings) if self._recipe.quarantine else []
            if not findings:
                return found.batches, state
            state = self._quarantined(state, findings)

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in self._started:  # a thread that waits for one gets its error
                process.end()
            self._pool.shutdown()
        for process in self._started:
            process.close()
        for dataset in self.datasets:
            dataset.close()

    def _take(self, request: _Request, rows_at: Callable[[int], int]) -> _Read:
        if self._pool is None:
            return self._read(request, lambda ids: load(self.datasets, self._recipe, ids))
        if not self._ahead or self._ahead[0][0] != request:  # the start, or a state nobody foresaw
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
            self._submit(request)
        future = self._ahead.popleft()[1]
        last = self._ahead[-1][0] if self._ahead else request
        while len(self._ahead) < self._workers:
            after = self.advance(last.state, last.rows)
            last = replace(last, state=after, rows=rows_at(after.tokens))
            self._submit(last)
        return future.result()

    def _submit(self, request: _Request) -> None:
        assert self._pool is not None
        self._ahead.append((request, self._pool.submit(self._read, request, self._load_elsewhere)))

    def _load_elsewhere(self, micro_batches: Sequence[Ids]) -> Loaded:
        """By an idle process, or a new one: there are no more than threads."""
        try:
            process = self._processes.get_nowait()
        except queue.Empty:
            process = ReadingProcess(self._recipe)
            self._started.append(process)
        try:
            return process.load(micro_batches)
        finally:
            self._processes.put(process)

    def _read(self, request: _Request, loader: Callable[[Sequence[Ids]], Loaded]) -> _Read:
        ids = self.global_batch_ids(request.state, request.rows)
        costs = np.array([self._costs[d][i] for d, i in ids])
        mine = deal(costs, request.dp_size, request.micro_batch_size)[request.dp_rank]
        loaded = loader([[ids[place] for place in micro] for micro in mine.tolist()])
        import torch

        from perilune.pretrain.data.collate import to_batch

        pin = torch.cuda.is_available()
        return _Read([to_batch(arrays, pin) for arrays in loaded.batches], loaded.findings)

    def _order(self, d: int, size: int, counts: np.ndarray) -> np.ndarray:
        """The rows of dataset `d` at these places of its endless sequence of epochs."""
        out = np.empty_like(counts)
        epochs = counts // size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(counts[here] % size, size, self.seed, int(epoch), self._names[d])
        return out

    def _damaged(self, state: DataState) -> set[tuple[int, int]]:
        return {(self.paths.index(entry["dataset"]), entry["row"]) for entry in state.quarantine}

    def _whole(self, d: int, row: int, damaged: set[tuple[int, int]]) -> int:
        """The rule of replacement: the first row from `row` on, the dataset taken as a ring, that is not damaged."""
        size = len(self.datasets[d])
        for step in range(min(size, len(damaged) + 1)):
            if (d, (row + step) % size) not in damaged:
                return (row + step) % size
        raise DamageError(f"{self.paths[d]}: every one of its {size} rows is damaged; pack or copy the dataset again")

    def _quarantined(self, state: DataState, findings: Sequence[Finding]) -> DataState:
        """`state` with `findings` recorded; DamageError beyond the limit."""
        known = self._damaged(state)
        new = sorted({(f.dataset, f.row): f.reason for f in reversed(findings)}.items())
        if len(known) + len(new) > self._limit:
            raise DamageError(
                f"{len(known)} rows are quarantined and {len(new)} more are damaged; "
                f"data.quarantine_limit={self._limit} allows no more. The next: {new[0][1]}"
            )
        damaged = known | {place for place, _ in new}
        entries = [
            {
                "dataset": self.paths[d],
                "row": row,
                "id": self.datasets[d].sample_id(row),
                "replaced_by": self._whole(d, row, damaged),
                "reason": reason,
                "samples": state.samples,
            }
            for (d, row), reason in new
        ]
        return replace(state, quarantine=[*state.quarantine, *entries])


@dataclass(frozen=True)
class _Read:
    batches: list[PackedBatch]
    findings: tuple[Finding, ...]


def remote_of(data: schema.Data) -> Remote:
    """How `data` says that remote stores are read."""
    return Remote(data.timeout_s, data.retry_s, data.cache_dir, int(data.cache_gib * (1 << 30)))


def open_stream(
    data: schema.Data,
    seed: int,
    *,
    depth: int,
    vocab_size: int | None = None,
    vision: schema.Vision | None = None,
    cost: CostModel = CostModel(token=0.0, square=1.0),  # noqa: B008 (frozen)
    agree: Agree = list,
) -> Stream:
    """The stream of `data.path` or `data.blend`; `depth` is D (model.num_nextn_predict_layers).

    Where `vision` has layers, batches carry their images as patches, decoded by the processes that read. `cost` says
    how long rows take, relative to each other. `agree` brings together what the run's processes found damaged; every
    process calls it for every batch where data.on_damage=quarantine.

    Raises InputError where there is no data, the datasets' rows are not data.seq_len long, their tokenizers differ,
    their tokens do not fit the model's `vocab_size`, or their images were cut into other patches than `vision` reads.
    """
    if (data.path is None) == (not data.blend):
        raise InputError(f"data.path is {data.path!r} and data.blend {data.blend}: name one of the two")
    weights = data.blend or {str(data.path): 1.0}
    Blend(weights, data.seq_len)  # its complaints first: they need no store
    whole, remote = data.on_damage == "stop", remote_of(data)
    datasets = {path: open_dataset(path, data.seq_len, vocab_size, remote, vision, whole=whole) for path in weights}
    fingerprints = {path: dataset.tokenizer_fingerprint for path, dataset in datasets.items()}
    if len(set(fingerprints.values())) > 1:
        raise InputError(f"data.blend mixes tokenizers {fingerprints} (dataset: fingerprint); pack all with one")
    return Stream(datasets, weights, seed, data, depth, cost, agree, _sees(vision))


def _sees(vision: schema.Vision | None) -> bool:
    return vision is not None and vision.num_layers > 0


def open_dataset(
    path: Path | str,
    seq_len: int | None,
    vocab_size: int | None = None,
    remote: Remote | None = None,
    vision: schema.Vision | None = None,
    *,
    whole: bool = True,
    tokenizer_fingerprint: str | None = None,
) -> PackedDataset:
    """The dataset at `path`; InputError where its rows, its vocabulary or its patches do not fit the run, or it was
    packed with another tokenizer than `tokenizer_fingerprint`, that of the training data. None stands for any."""
    dataset = PackedDataset(path, remote, whole=whole)
    if tokenizer_fingerprint not in (None, dataset.tokenizer_fingerprint):
        raise InputError(
            f"{path}: packed with tokenizer {dataset.tokenizer_fingerprint}, the training data with "
            f"{tokenizer_fingerprint}; pack both with one"
        )
    if seq_len not in (None, dataset.seq_len):
        raise InputError(
            f"{path}: packed in rows of {dataset.seq_len} tokens, but data.seq_len is {seq_len}; "
            f"set data.seq_len={dataset.seq_len}, or pack again with --seq-len {seq_len}"
        )
    if vocab_size is not None and dataset.vocab_size > vocab_size:
        raise InputError(
            f"{path}: its tokenizer has {dataset.vocab_size} tokens, the model {vocab_size}; "
            f"set model.vocab_size to {dataset.vocab_size} or more"
        )
    rule = image_rule(dataset.manifest)
    if vision is not None and _sees(vision) and rule is not None:
        packed, read = (rule.patch_size, rule.merge_size), (vision.patch_size, vision.merge_size)
        if packed != read:
            raise InputError(
                f"{path}: its images were packed as patches of {packed[0]} pixels, {packed[1]} a side to a token, the "
                f"tower reads {read[0]} and {read[1]}; set vision.patch_size={packed[0]} vision.merge_size={packed[1]}"
            )
    return dataset


def valid_batches(
    dataset: PackedDataset,
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    depth: int,
    document_mask: bool,
    max_rows: int = 0,
    vision: schema.Vision | None = None,
) -> Iterator[tuple[PackedBatch, int]]:
    """(batch, bytes of text that its counted next-token targets stand for) over a dataset, in one fixed order.

    The first `max_rows` rows of that order (0: all) are dealt over the ranks; each rank gets the same number of
    micro-batches of exactly `micro_batch_size` rows, the last filled up with rows whose loss mask is all zero. Bits
    per byte is the sum of their losses over ln 2 and the sum of their bytes, both over all ranks. The end of a document
    is a target and stands for no byte; a segment's first token is predicted from nothing and is no target. Images come
    as patches where `vision` has layers.

    Raises DamageError for a row that is damaged.
    """
    from perilune.pretrain.data.collate import collate

    count = min(max_rows, len(dataset)) if max_rows else len(dataset)
    order = permute(np.arange(count), len(dataset), "valid", dataset.fingerprint).tolist()
    blanks = -count % (dp_size * micro_batch_size)

    def read(row: int) -> tuple[Row, list[np.ndarray]]:
        return read_decoded(dataset, row) if _sees(vision) else (dataset[row], [])

    for micro in np.arange(count + blanks).reshape(-1, dp_size, micro_batch_size)[:, dp_rank].tolist():
        rows, patches = [], []
        for place in micro:
            row, seen = read(order[place] if place < count else order[0])
            patches += seen
            rows.append(row if place < count else replace(row, loss_mask=np.zeros_like(row.loss_mask)))
        names = [dataset.sample_id(order[place]) if place < count else "blank" for place in micro]
        batch = collate(rows, depth, document_mask, names, patches)
        counted = batch.labels[0].numpy()[batch.loss_mask[0].numpy() > 0]
        yield batch, int(dataset.token_bytes[counted].sum(dtype=np.int64))
