"""Reading processes: they end with their parent, say what went wrong, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packed_rows import random_rows, write_dataset

from perilune.pretrain import schema
from perilune.pretrain.data.reader import DamageError
from perilune.pretrain.data.stream import Stream, open_stream
from perilune.pretrain.errors import InputError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch") / "data"
    return write_dataset(folder, random_rows([[4, 12]] * 40, 100), SEQ_LEN, 100, rows_per_shard=10)


def open_one(path: Path, workers: int) -> Stream:
    return open_stream(schema.Data(path=str(path), seq_len=SEQ_LEN, workers=workers), 1, depth=1)


def reading_processes() -> set[int]:
    """Those below this one, from whichever of its threads."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        for word in (task / "children").read_text().split():
            if b"pretrain.data.prefetch" in Path(f"/proc/{word}/cmdline").read_bytes():
                found.add(int(word))
    return found


def test_batches_that_grow_are_read_ahead_too(dataset: Path) -> None:
    plain, ahead = open_one(dataset, 0), open_one(dataset, 3)
    state = plain.initial_state()
    for _ in range(6):
        rows = 4 + 2 * (state.samples // 8)
        one = plain.read(state, rows, 0, 2, 1)[0]
        two = ahead.read(state, rows, 0, 2, 1, lambda tokens: 4 + 2 * (tokens // SEQ_LEN // 8))[0]
        assert [b.sample_ids for b in one] == [b.sample_ids for b in two]
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(one, two, strict=True))
        state = plain.advance(state, rows)
        assert len(ahead._ahead) == 3 and ahead._ahead[0][0].state == state, "what comes next was foreseen"
    assert len(reading_processes()) == 3
    ahead.close()
    assert not reading_processes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_replaced_meanwhile_is_other_data_and_no_damage(dataset: Path, tmp_path: Path, workers: int) -> None:
    """In place, manifest and all: what the next process opens is sound, and not what the run reads."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    other = write_dataset(tmp_path / "other", random_rows([[4, 12]] * 40, 100, seed=7), SEQ_LEN, 100, rows_per_shard=10)
    data = schema.Data(path=str(folder), seq_len=SEQ_LEN, workers=workers, on_damage="quarantine", quarantine_limit=40)
    stream = open_stream(data, 1, depth=1)
    try:
        shutil.copytree(other, folder, dirs_exist_ok=True)
        with pytest.raises(InputError, match="replaced by another dataset while it was read") as told:
            stream.read(stream.initial_state(), 4, 0, 1, 1)
        assert not isinstance(told.value, DamageError)
    finally:
        stream.close()


def test_one_that_dies_is_told(dataset: Path) -> None:
    stream = open_one(dataset, 1)
    state = stream.initial_state()
    stream.read(state, 4, 0, 1, 1)
    (process,) = reading_processes()
    os.kill(process, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"is gone \(exit code -9"):
        for _ in range(3):
            state = stream.advance(state, 4)
            stream.read(state, 4, 0, 1, 1)
    stream.close()


def test_damage_found_elsewhere_is_raised_here(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in dataset.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stream = open_one(folder, 1)
    for shard in folder.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamageError, match=r"shard-00000\d.tar/0000000\d\d at byte \d+: CRC-32 is"):
        stream.read(stream.initial_state(), 4, 0, 1, 1)
    stream.close()


def test_they_end_with_a_parent_that_is_killed(dataset: Path) -> None:
    code = f"""
import time
from perilune.pretrain import schema
from perilune.pretrain.data.stream import open_stream
stream = open_stream(schema.Data(path={str(dataset)!r}, seq_len={SEQ_LEN}, workers=1), 1, depth=1)
stream.read(stream.initial_state(), 4, 0, 1, 1)
print("ready", stream._started[0]._process.pid, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    ready, reader = parent.stdout.readline().split()
    assert ready == "ready" and Path(f"/proc/{reader}").exists()
    os.kill(int(reader), signal.SIGTERM)  # a run that is told to stop keeps its readers
    time.sleep(0.2)
    assert Path(f"/proc/{reader}/cmdline").read_bytes()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{reader}").exists() and Path(f"/proc/{reader}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the reading process outlives its parent"
        time.sleep(0.05)
