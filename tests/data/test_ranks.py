"""Training itself over changing numbers of ranks, with damage, and beside padded rows."""

from __future__ import annotations

from pathlib import Path

import data_ranks
import pytest
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset

from perilune.parallel.workers import Workers
from perilune.pretrain import schema
from perilune.pretrain.data.packing import Piece, plan

SEQ_LEN, VOCAB = 64, 512


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pieces = packed_lengths(lognormal_lengths(180, median=20), SEQ_LEN)
    folder = tmp_path_factory.mktemp("ranks") / "data"
    return write_dataset(folder, random_rows(pieces, VOCAB), SEQ_LEN, VOCAB, rows_per_shard=32)


def test_resume_over_two_one_and_four_ranks(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    data = schema.Data(path=str(dataset), seq_len=SEQ_LEN)
    straight = workers.run(1, data_ranks.train, data, tmp_path / "straight", 7, 4)[0]
    parts = [
        workers.run(ranks, data_ranks.train, data, tmp_path / "resumed", steps, size)
        for ranks, steps, size in ((2, 3, 1), (1, 2, 4), (4, 2, 2))
    ]
    for results in parts:
        assert all(result == results[0] for result in results), "all ranks tell the same"
    assert [ids for results in parts for ids in results[0]["ids"]] == straight["ids"]
    assert parts[-1][0]["state"] == straight["state"]
    losses = [loss for results in parts for loss in results[0]["losses"]]
    assert losses == pytest.approx(straight["losses"], rel=2e-5)
    assert len(set(losses)) == 7
    assert [results[0]["micros"] for results in parts] == [[8, 8, 8], [4, 4], [2, 2]]


def test_ranks_agree_on_damaged_rows(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """Rows damaged in two shards are replaced by the same rule on one rank and on two, and stay so after a resume."""
    for shard, at in ((dataset / "shard-000000.tar", 5000), (dataset / "shard-000002.tar", 20000)):
        content = bytearray(shard.read_bytes())
        content[at] ^= 1
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / shard.name).write_bytes(content)
    for file in dataset.iterdir():
        if not (tmp_path / "damaged" / file.name).exists():
            (tmp_path / "damaged" / file.name).symlink_to(file)
    data = schema.Data(path=str(tmp_path / "damaged"), seq_len=SEQ_LEN, on_damage="quarantine", quarantine_limit=2)
    steps = 8  # of 16 rows: more than an epoch, so that both damaged rows are met
    one = workers.run(1, data_ranks.train, data, tmp_path / "one", steps, 8)[0]
    workers.run(2, data_ranks.train, data, tmp_path / "two", steps - 3, 4)
    two = workers.run(2, data_ranks.train, data, tmp_path / "two", 3, 2)
    assert two[0] == two[1]
    assert two[0]["state"] == one["state"] and two[0]["ids"] == one["ids"][-3:]
    met = one["state"]["quarantine"]
    assert len(met) == 2 and all("CRC-32" in entry["reason"] for entry in met)
    assert one["state"]["samples"] == steps * 16
    few = schema.Data(path=str(tmp_path / "damaged"), seq_len=SEQ_LEN, on_damage="quarantine", quarantine_limit=1)
    refused = workers.run(2, data_ranks.train, few, tmp_path / "few", steps, 8)
    assert all("data.quarantine_limit=1" in result["error"] for result in refused)
    stopped = workers.run(1, data_ranks.train, schema.Data(path=data.path, seq_len=SEQ_LEN), tmp_path / "s", steps, 8)
    assert "CRC-32" in stopped[0]["error"] and "shard-00000" in stopped[0]["error"]


def test_packed_beside_padded(workers: Workers) -> None:
    """The same documents in rows of 64, packed and padded: equal losses and gradients, a fraction of the tokens."""
    lengths = [n for n in lognormal_lengths(60, median=12) if n < SEQ_LEN]
    rows, _ = plan([Piece(i, 0, n) for i, n in enumerate(lengths)], SEQ_LEN)
    whole = [[p.doc for p in row] for row in rows if all(p.length == lengths[p.doc] for p in row)]
    kept = sorted(doc for row in whole for doc in row)
    renumbered = [[kept.index(doc) for doc in row] for row in whole]
    found = workers.run(1, data_ranks.packed_and_padded, [lengths[doc] for doc in kept], renumbered, SEQ_LEN)[0]
    packed, padded = found["packed"], found["padded"]
    assert packed["counted"] == padded["counted"]
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-6)
    assert found["gradient"] < 1e-5
    assert packed["tokens"] == sum(lengths[doc] for doc in kept) == len(whole) * SEQ_LEN
    assert padded["tokens"] == len(kept) * SEQ_LEN > 2 * packed["tokens"]
    assert padded["routed"] / packed["routed"] == pytest.approx(padded["tokens"] / packed["tokens"], rel=0.05)
