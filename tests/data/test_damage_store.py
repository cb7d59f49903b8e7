"""A dataset behind a web server that fails, stalls, answers short or wrong: asked again, then a named error."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from http_store import HttpStore, serve

from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.storage import Remote, StoreError
from perilune.pretrain.errors import InputError

FIRST, SHARD = "shard-000000.tar", "shard-000001.tar"
PATIENT = Remote(timeout_s=5.0, retry_s=20.0)
HASTY = Remote(timeout_s=0.5, retry_s=0.6)


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Iterator[HttpStore]:
    with serve(Path(shutil.copytree(packed, tmp_path / "served"))) as served:
        yield served


def test_remote_rows_are_the_local_ones(store: HttpStore, packed: Path) -> None:
    here, there = PackedDataset(packed), PackedDataset(store.url, PATIENT)
    assert there.fingerprint == here.fingerprint and len(there) == len(here)
    for index in (0, 53, len(here) - 1):
        assert there.sample_id(index) == here.sample_id(index)
        assert np.array_equal(there[index].tokens, here[index].tokens)
    assert store.asked[FIRST] == store.asked[SHARD] == 1, "one ranged read a row"


@pytest.mark.parametrize("fault", ["500", "503", "429", "short", "cut"])
def test_what_passes_costs_a_pause_and_no_row(store: HttpStore, packed: Path, fault: str) -> None:
    dataset = PackedDataset(store.url, PATIENT)
    store.faults[SHARD] = [fault] * 2
    assert np.array_equal(dataset[53].tokens, PackedDataset(packed)[53].tokens)
    assert store.asked[SHARD] == 3 and not store.faults[SHARD]


def test_a_request_that_stalls_is_given_up_and_asked_again(store: HttpStore) -> None:
    dataset = PackedDataset(store.url, Remote(timeout_s=0.5, retry_s=20.0))
    store.faults[SHARD] = ["stall"]
    assert dataset[53].tokens.size == 64 and store.asked[SHARD] == 2


@pytest.mark.parametrize("fault", ["500", "503", "stall", "short", "cut"])
def test_what_does_not_pass_is_an_error_that_names_it(store: HttpStore, fault: str) -> None:
    dataset = PackedDataset(store.url, HASTY)
    store.always[SHARD] = fault
    began = time.monotonic()
    with pytest.raises(StoreError, match=rf"{SHARD} cannot be read: .*; tried \d+ times.*data\.retry_s"):
        dataset[53]
    assert time.monotonic() - began < 20.0
    assert dataset[3].tokens.size == 64, "other shards are read on"


def test_what_was_refused_is_not_asked_again(store: HttpStore) -> None:
    dataset = PackedDataset(store.url, PATIENT)
    store.always[SHARD] = "403"
    with pytest.raises(StoreError, match="403"):
        dataset[53]
    assert store.asked[SHARD] == 1


def test_a_server_without_ranges_is_refused(store: HttpStore) -> None:
    dataset = PackedDataset(store.url, HASTY)
    store.always[SHARD] = "whole"
    with pytest.raises(StoreError, match="does not read by ranges"):
        dataset[53]


def test_damage_behind_a_store_is_damage(store: HttpStore, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit that flips on the way is read again; one that is stored, a cut or a missing shard names its sample."""
    key, offset, length, *_ = read_manifest(store.folder)["shards"][1]["samples"][3]
    dataset = PackedDataset(store.url, HASTY)
    store.faults[SHARD] = ["flip"]
    assert dataset[53].tokens.size == 64
    store.always[SHARD] = "flip"
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}: CRC-32"):
        dataset[53]
    del store.always[SHARD]
    with (store.folder / SHARD).open("r+b") as stream:
        stream.truncate(offset + 10)
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}: 10 of {length} bytes"):
        dataset[53]
    with pytest.raises(DamageError, match=f"{SHARD}/.*: 0 of "):
        dataset[60]
    assert inspect_command(store.url, check=True) == 1
    assert f"{SHARD}/{key} at byte {offset}: 10 of {length} bytes are there" in capsys.readouterr().out
    (store.folder / SHARD).unlink()
    with pytest.raises(DamageError, match=f"{SHARD}/{key} at byte {offset}"):
        dataset[53]
    assert inspect_command(store.url, check=True) == 1 and "shard is missing" in capsys.readouterr().out


def test_inspect_of_a_remote_prefix(
    store: HttpStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert inspect_command(store.url, check=True, sample=53, html=True) == 0
    assert "whole: " in capsys.readouterr().out and "shard-000001.tar/000000053" in Path("inspect.html").read_text()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        inspect_command(f"{store.url}/nothing/here")


def test_prefixes_of_no_known_kind_run_nothing(tmp_path: Path) -> None:
    """`pipe:` runs a shell in stock webdataset; here it is a folder that is not there, and other kinds are unknown."""
    witness = tmp_path / "ran"
    for path in (f"pipe:touch {witness}", f"pipe://touch {witness}", "nothing://host/data", "python://os.system"):
        with pytest.raises(InputError):
            PackedDataset(path)
    assert not witness.exists()
