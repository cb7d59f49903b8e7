"""The cache of rows from remote stores, the kinds of place, and a stream over the web beside one from disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from http_store import serve
from packed_rows import random_rows, write_dataset

from perilune.pretrain import schema
from perilune.pretrain.data import storage
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.storage import BUCKETS, Cache, Remote, open_store
from perilune.pretrain.data.stream import open_stream
from perilune.pretrain.errors import InputError

SEQ_LEN, ROWS = 16, 40


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", random_rows([[4, 12]] * ROWS, 100), SEQ_LEN, 100, rows_per_shard=10)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_keeps_within_its_limit_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    limit = BUCKETS * 10_000
    cache = Cache(str(tmp_path), limit)
    keys = [f"{7 + BUCKETS * i:08x}rest{i}" for i in range(40)]  # all of one bucket
    for number, key in enumerate(keys):
        cache.put(key, bytes([number]) * 1000)
        os.utime(next(tmp_path.rglob(key)), ns=(number, number))  # clocks of file systems are coarse
        if number >= 5:
            assert cache.get(keys[2]) == bytes([2]) * 1000, "used again and again, it stays"
    assert 8_000 <= held(tmp_path) <= 10_000
    assert cache.get(keys[0]) is None and cache.get(keys[39]) is not None
    cache.put(keys[0], bytes(10_001))
    assert cache.get(keys[0]) is None, "larger than a bucket"
    cache.drop(keys[39])
    assert cache.get(keys[39]) is None
    other = Cache(str(tmp_path), limit)
    assert other.get(keys[2]) is not None, "another process finds it"


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_row(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(str(tmp_path / "file" / "below"), 1 << 20)
    with pytest.warns(UserWarning, match="not cached any more"):
        cache.put("0" * 64, b"x")
    cache.put("0" * 64, b"x")
    assert cache.get("0" * 64) is None


def test_a_stream_over_the_web_reads_each_row_once(dataset: Path, tmp_path: Path) -> None:
    with serve(dataset) as store:
        cache = tmp_path / "cache"
        remote = schema.Data(path=store.url, seq_len=SEQ_LEN, workers=1, cache_dir=str(cache), timeout_s=20.0)
        there = open_stream(remote, 1, depth=0)
        here = open_stream(schema.Data(path=str(dataset), seq_len=SEQ_LEN, workers=0), 1, depth=0)
        states = [there.initial_state(), here.initial_state()]
        for _ in range(2 * ROWS // 8):  # two epochs
            batches = []
            for i, stream in enumerate((there, here)):
                read, states[i] = stream.read(states[i], 8, 0, 1, 4)
                states[i] = stream.advance(states[i], 8)
                batches.append(read)
            for a, b in zip(*batches, strict=True):
                assert a.inputs.equal(b.inputs) and [n[-9:] for n in a.sample_ids] == [n[-9:] for n in b.sample_ids]
        there.close()
        shards = [name for name in store.asked if name.endswith(".tar")]
        assert sum(store.asked[name] for name in shards) == ROWS, "the second epoch came from the cache"
        for file in cache.rglob("*"):  # and what lies there is not believed
            if file.is_file():
                file.write_bytes(b"\0" * file.stat().st_size)
        again = PackedDataset(store.url, Remote(cache_dir=str(cache), cache_bytes=1 << 30))
        assert [again[i].tokens.tolist() for i in range(3)] == [here.datasets[0][i].tokens.tolist() for i in range(3)]
        assert sum(store.asked[name] for name in shards) == ROWS + 3
        here.close()


def test_kinds_of_place(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PackedDataset(f"file://{dataset}")[3].tokens.tolist() == PackedDataset(dataset)[3].tokens.tolist()
    with pytest.raises(InputError, match="cannot be opened"):
        open_store("nokind://place")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"s3://bucket/data cannot be opened: .*s3fs"):
        open_store("s3://bucket/data")


def test_descriptors_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 3)
    path = write_dataset(tmp_path / "many", random_rows([[SEQ_LEN]] * 12, 100), SEQ_LEN, 100, rows_per_shard=1)
    dataset = PackedDataset(path)
    before = len(os.listdir("/proc/self/fd"))
    for i in (*range(12), 0, 5):
        dataset[i]
    assert len(os.listdir("/proc/self/fd")) - before == 3
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before
