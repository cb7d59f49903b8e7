"""Quarantine in one process: the rule of replacement, its record, its limit; and what is never quarantined."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from packed_rows import random_rows, write_dataset

from perilune.pretrain import schema
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.prefetch import Finding
from perilune.pretrain.data.reader import DamageError
from perilune.pretrain.data.stream import DataState, Stream, open_stream
from perilune.pretrain.errors import InputError

ROWS, SEQ_LEN = 20, 16


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", random_rows([[4, 12]] * ROWS, 100), SEQ_LEN, 100, rows_per_shard=10)


def damage(path: Path, *rows: int) -> None:
    """Flip a bit of each of these rows."""
    samples = [(shard["name"], sample[1]) for shard in read_manifest(path)["shards"] for sample in shard["samples"]]
    for name, offset in (samples[row] for row in rows):
        content = bytearray((path / name).read_bytes())
        content[offset + 700] ^= 16
        (path / name).write_bytes(content)


def open_one(path: Path, limit: int = 5, workers: int = 0) -> Stream:
    data = schema.Data(path=str(path), seq_len=SEQ_LEN, on_damage="quarantine", quarantine_limit=limit, workers=workers)
    return open_stream(data, 1, depth=0)


def epoch(stream: Stream, state: DataState, batch: int = 5) -> tuple[list[str], DataState]:
    """The row numbers read, in global batches, to the end of an epoch."""
    names: list[str] = []
    for _ in range(ROWS // batch):
        batches, state = stream.read(state, batch, 0, 1, 1)
        names += [name.rsplit("/", 1)[1].lstrip("0") or "0" for b in batches for name in b.sample_ids]
        state = stream.advance(state, batch)
    return names, state


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_whole_row_takes_the_place(dataset: Path, workers: int) -> None:
    damage(dataset, 3, 4, 19)
    stream = open_one(dataset, workers=workers)
    names, state = epoch(stream, stream.initial_state())
    expected = [int(n) for n in range(ROWS) if n not in (3, 4, 19)] + [5, 5, 0]
    assert sorted(map(int, names)) == sorted(expected)
    found = {entry["row"]: entry for entry in state.quarantine}
    assert sorted(found) == [3, 4, 19] and found[19]["replaced_by"] == 0 and found[4]["replaced_by"] == 5
    assert found[3]["replaced_by"] in (4, 5), "4 was still whole, as far as anyone knew, or was not"
    assert found[3]["id"] == "shard-000000.tar/000000003" and "CRC-32" in found[3]["reason"]
    assert state.samples == ROWS and sum(state.counters.values()) == ROWS
    stream.close()
    # What is saved leads on to the same rows, without meeting the damage again, also where damage would stop the run.
    resumed = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    again = open_stream(schema.Data(path=str(dataset), seq_len=SEQ_LEN, workers=0), 1, depth=0)
    again.check_state(resumed)
    second, end = epoch(again, resumed)
    assert sorted(map(int, second)) == sorted(expected) and end.quarantine == state.quarantine
    again.close()


def test_a_shard_that_is_lost_counts_row_by_row(dataset: Path) -> None:
    (dataset / "shard-000001.tar").unlink()
    with pytest.raises(DamageError, match=r"data\.quarantine_limit=9 allows no more.*shard-000001"):
        stream = open_one(dataset, limit=9)
        epoch(stream, stream.initial_state())
    stream = open_one(dataset, limit=10)
    names, state = epoch(stream, stream.initial_state())
    assert {int(name) for name in names} == set(range(10)) and len(state.quarantine) == 10
    stream.close()


def test_nothing_is_left(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    stream = open_one(dataset, limit=100)
    with pytest.raises(DamageError, match="every one of its 20 rows is damaged"):
        epoch(stream, stream.initial_state(), batch=20)
    stream.close()


def test_what_others_found_counts_too(dataset: Path) -> None:
    """A row that only another process cannot read is replaced here as well."""
    told = [[Finding(0, 7, "elsewhere")], []]
    data = schema.Data(path=str(dataset), seq_len=SEQ_LEN, on_damage="quarantine", workers=0)
    stream = open_stream(data, 1, depth=0, agree=lambda mine: told.pop(0) if told else list(mine))
    names, state = epoch(stream, stream.initial_state())
    assert "7" not in names and [entry["reason"] for entry in state.quarantine] == ["elsewhere"]
    stream.close()


def test_a_state_with_foreign_rows_is_refused(dataset: Path) -> None:
    stream = open_one(dataset)
    state = dataclasses.asdict(stream.initial_state())
    for entries, says in (([{"row": 1}], "cannot be read"), ([{"dataset": "x", "row": 1}], "does not add up")):
        with pytest.raises(InputError, match=says):
            DataState.from_dict(state | {"quarantine": entries})
    with pytest.raises(InputError, match=r"by data\.blend 20 rows are"):
        two = {str(dataset): 1.0, f"{dataset}/": 1.0}
        other = open_stream(schema.Data(blend=two, seq_len=SEQ_LEN, workers=0), 1, depth=0)
        fresh = other.initial_state()
        other.check_state(dataclasses.replace(fresh, samples=20, counters=dict(zip(two, (5, 15), strict=True))))
    assert np.array_equal(other.blend.counts(20), [10, 10])
    stream.close()
