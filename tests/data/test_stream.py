"""The stream: the same rows whatever the ranks, the threads and the point of resume."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perilune.pretrain import schema
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.stream import DataState, Stream, open_dataset, open_stream, valid_batches
from perilune.pretrain.errors import InputError

ROWS = 24


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A second, small dataset of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "a.txt").write_text("another orbit " * 200)
    pack([str(folder / "a.txt")], folder / "data", tokenizer_path, 64)
    return folder / "data"


def open_one(path: Path, workers: int = 0, seed: int = 1, **keys: object) -> Stream:
    return open_stream(schema.Data(path=str(path), seq_len=64, workers=workers, **keys), seed, depth=1)


def run(stream: Stream, state: DataState, steps: int, ranks: int, size: int) -> tuple[list[set[str]], DataState]:
    """The sample ids of each global batch, and the state after."""
    found = []
    for _ in range(steps):
        batches = [b for r in range(ranks) for b in stream.read(state, ROWS, r, ranks, size)[0]]
        names = [name for batch in batches for name in batch.sample_ids]
        assert len(names) == len(set(names)) == ROWS
        found.append(set(names))
        state = stream.advance(state, ROWS)
    return found, state


def test_ranks_threads_and_resume_change_no_global_batch(packed: Path) -> None:
    stream = open_one(packed)
    expected, end = run(stream, stream.initial_state(), 12, 1, 1)
    assert end.samples == 12 * ROWS and end.tokens == 12 * ROWS * 64
    for ranks, size, workers in [(2, 3, 1), (4, 2, 0), (4, 6, 1)]:
        again = open_one(packed, workers)
        first, middle = run(again, again.initial_state(), 5, 1, 2)
        again.close()
        resumed = open_one(packed, workers)
        state = DataState.from_dict(json.loads(json.dumps(middle.to_dict())))
        resumed.check_state(state)
        rest, last = run(resumed, state, 7, ranks, size)
        assert first + rest == expected and last == end
        resumed.close()


def test_reading_ahead_gives_the_same_tensors(packed: Path) -> None:
    plain, ahead = open_one(packed, 0), open_one(packed, 1)
    state = plain.initial_state()
    for rows in (8, 8, 16, 8):
        two = [stream.read(state, rows, 1, 2, 2)[0] for stream in (plain, ahead)]
        for a, b in zip(*two, strict=True):
            for name, value in vars(a).items():
                other = getattr(b, name)
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
        state = plain.advance(state, rows)
    ahead.close()


def test_an_epoch_is_every_row_once_and_the_next_is_in_another_order(packed: Path) -> None:
    stream, size = open_one(packed), len(PackedDataset(packed))
    state = stream.initial_state()
    first = [i for _, i in stream.global_batch_ids(state, size)]
    second = [i for _, i in stream.global_batch_ids(stream.advance(state, size), size)]
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second and first != sorted(first)
    across = [i for _, i in stream.global_batch_ids(stream.advance(state, size - 3), 6)]
    assert across == first[-3:] + second[:3]
    assert [i for _, i in open_one(packed, seed=2).global_batch_ids(state, size)] != first


def test_a_blend_keeps_its_weights_at_every_step(packed: Path, other: Path) -> None:
    weights = {str(packed): 6.0, str(other): 3.0}
    stream = open_stream(schema.Data(blend=weights, seq_len=64), 1, depth=0)
    state = stream.initial_state()
    for _ in range(20):
        chosen = Counter(d for d, _ in stream.global_batch_ids(state, 7))
        before, state = state, stream.advance(state, 7)
        assert [state.counters[p] - before.counters[p] for p in weights] == [chosen[0], chosen[1]]
        assert abs(state.counters[str(packed)] - state.samples * 2 / 3) < 1
    stream.close()
    # by a schedule: the second dataset alone from 40 rows on, whatever the batches
    phases = {str(packed): {0: 1.0, 40 * 64: 0.0}, str(other): {40 * 64: 1.0}}
    stream = open_stream(schema.Data(blend=phases, seq_len=64, workers=0), 1, depth=0)
    ids, state = [], stream.initial_state()
    for rows in (7, 30, 9, 4):
        ids += stream.global_batch_ids(state, rows)
        state = stream.advance(state, rows)
        stream.check_state(state)
    assert [d for d, _ in ids] == [0] * 40 + [1] * 10 and state.counters[str(other)] == 10
    stream.close()
    # one content under two names is not read in the same order
    both = open_stream(schema.Data(blend={str(other): 1.0, str(other) + "/": 1.0}, seq_len=64), 1, depth=0)
    ids = both.global_batch_ids(both.initial_state(), 2 * len(PackedDataset(other)))
    assert [i for d, i in ids if d == 0] != [i for d, i in ids if d == 1]
    both.close()


def test_a_blend_that_moved_goes_on_one_in_another_order_does_not(packed: Path, other: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    shutil.copytree(other, tmp_path / "other")
    bad = {"row": 3, "id": "", "replaced_by": 4, "reason": "", "samples": 0}

    def blended(*paths: Path) -> Stream:
        return open_stream(schema.Data(blend=dict.fromkeys(map(str, paths), 0.5), seq_len=64, workers=0), 1, depth=0)

    before, moved = blended(packed, other), blended(tmp_path / "packed", tmp_path / "other")
    start = before.begin_after([before.advance(before.initial_state(), 6)])
    state = replace(before.advance(start, 11), quarantine=[bad | {"dataset": str(packed)}])
    saved = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    found = moved.found_again(saved)
    assert found.counters == {str(tmp_path / "packed"): 6, str(tmp_path / "other"): 5}
    assert found.earlier == {str(tmp_path / "packed"): 3, str(tmp_path / "other"): 3}
    assert [entry["dataset"] for entry in found.quarantine] == [str(tmp_path / "packed")]
    assert moved.global_batch_ids(found, 50) == before.global_batch_ids(state, 50)
    # After as many rows of each, only the order tells which of the two comes next.
    even = before.advance(before.initial_state(), 10)
    for turned in (blended(other, packed), blended(tmp_path / "other", tmp_path / "packed")):
        with pytest.raises(InputError, match="name them in the run's order"):
            turned.found_again(even)
    half = blended(packed, tmp_path / "other")
    assert half.found_again(even).counters == {str(packed): 5, str(tmp_path / "other"): 5}


def test_refusals(packed: Path, other: Path, tmp_path: Path, corpus: str) -> None:
    stream = open_one(packed)
    with pytest.raises(InputError, match=r"24 rows does not divide by 5 data-parallel ranks x .* 1 rows = 5"):
        stream.read(stream.initial_state(), ROWS, 0, 5, 1)
    with pytest.raises(InputError, match="resume with the same data"):
        stream.found_again(open_one(other).initial_state())
    with pytest.raises(InputError, match=r"rows of 64 tokens, but data\.seq_len is 128"):
        open_stream(schema.Data(path=str(packed), seq_len=128), 1, depth=1)
    with pytest.raises(InputError, match="400 tokens, the model 300"):
        open_stream(schema.Data(path=str(packed), seq_len=64), 1, depth=1, vocab_size=300)
    with pytest.raises(InputError, match="name one of the two"):
        open_stream(schema.Data(path=str(packed), blend={str(other): 1.0}), 1, depth=1)
    with pytest.raises(InputError, match="weights must be positive"):
        open_stream(schema.Data(blend={str(other): -1.0}, seq_len=64), 1, depth=1)
    with pytest.raises(InputError, match="does not add up"):
        DataState.from_dict({"samples": 3, "tokens": 1, "counters": {"a": 2}, "fingerprints": {"a": ""}})
    with pytest.raises(InputError, match="cannot be read"):
        DataState.from_dict({"sample": 3})
    from perilune.pretrain.data.tokenizer import train_tokenizer

    pack([corpus], tmp_path / "d", train_tokenizer([corpus], tmp_path / "t", 300), 64)
    with pytest.raises(InputError, match="mixes tokenizers"):
        open_stream(schema.Data(blend={str(packed): 1.0, str(tmp_path / "d"): 1.0}, seq_len=64), 1, depth=1)


def validate(
    path: Path, ranks: int, size: int, max_rows: int = 0, mask: bool = True
) -> list[list[tuple[PackedBatch, int]]]:
    """Of each rank: its batches and their bytes."""
    keys = {"depth": 1, "document_mask": mask, "max_rows": max_rows}
    dataset = PackedDataset(path)
    return [list(valid_batches(dataset, dp_rank=r, dp_size=ranks, micro_batch_size=size, **keys)) for r in range(ranks)]


@pytest.mark.parametrize("mask", [True, False])
def test_validation_counts_every_target_and_byte_once_for_any_ranks(packed: Path, mask: bool) -> None:
    dataset = PackedDataset(packed)
    targets = bytes_ = 0
    for row in dataset:
        cuts = row.cu_seqlens if mask else np.array([0, 64])
        counted = row.loss_mask.copy()
        counted[cuts[:-1]] = 0
        targets += int(counted.sum())
        bytes_ += int(dataset.token_bytes[row.tokens[counted > 0]].sum())
    assert bytes_ <= dataset.manifest["packing"]["raw_bytes"]
    for ranks, size in [(1, 1), (2, 3), (4, 5)]:
        found = validate(packed, ranks, size, mask=mask)
        assert len({len(batches) for batches in found}) == 1, "ranks get as many micro-batches"
        assert all(batch.rows == size for batches in found for batch, _ in batches)
        assert sum(int(b.loss_mask[0].sum()) for batches in found for b, _ in batches) == targets
        assert sum(n for batches in found for _, n in batches) == bytes_


def test_part_of_the_validation_set_is_the_same_rows_for_any_ranks(packed: Path) -> None:
    def names(ranks: int, size: int) -> list[str]:
        batches = [b for batches in validate(packed, ranks, size, max_rows=10) for b, _ in batches]
        return sorted(name for b in batches for name in b.sample_ids if name != "blank")

    assert len(names(1, 1)) == 10
    assert names(1, 1) == names(2, 4) == names(4, 1)


def test_validation_with_another_tokenizer_is_refused(packed: Path) -> None:
    with pytest.raises(InputError, match="packed with tokenizer"):
        open_dataset(packed, 64, tokenizer_fingerprint="another")
