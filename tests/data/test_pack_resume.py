"""The same bytes whatever the number of workers, and however often the run was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perilune.pretrain.data import pack as module
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.pack_worker import Worker
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.errors import InputError

# Small batches, so that there is something to be killed between; `pause` slows each batch down.
SCRIPT = """
import signal, sys, time
from pathlib import Path
from perilune.pretrain.data import pack as module
from perilune.pretrain.data.pack_worker import Worker

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    corpus, out, tokenizer, workers, pause = sys.argv[1:]
    module.BATCH_DOCUMENTS = 20
    encoded = module._encoded
    def slowly(*args):
        for batch in encoded(*args):
            yield batch
            time.sleep(float(pause))
    module._encoded = slowly
    module.pack([corpus], Path(out), Path(tokenizer), 64, rows_per_shard=10, buffer_tokens=2000, shuffle_seed=1,
                workers=int(workers))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: str, tokenizer_path: Path) -> Path:
    """The dataset of a run of one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_DOCUMENTS", 20)
        options = {"rows_per_shard": 10, "buffer_tokens": 2000, "shuffle_seed": 1}
        pack([corpus], out, tokenizer_path, 64, workers=1, **options)
    return out


def start(
    tmp_path: Path, corpus: str, tokenizer_path: Path, workers: int, pause: float, **how: Any
) -> subprocess.Popen[bytes]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [corpus, str(tmp_path / "data"), str(tokenizer_path), str(workers), str(pause)]
    return subprocess.Popen([sys.executable, str(script), *words], **how)


def test_workers_and_kills_change_nothing(tmp_path: Path, whole: Path, corpus: str, tokenizer_path: Path) -> None:
    """Killed twice with two workers, finished by three: and what was done before is not done again."""
    scratch, data = tmp_path / "data" / ".packing", tmp_path / "data"
    for needed in ("batch-000002.json", "shard-000001.json"):
        run = start(tmp_path, corpus, tokenizer_path, 2, 0.15)
        try:
            deadline = time.monotonic() + 120
            while not (scratch / needed).exists():
                assert run.poll() is None and time.monotonic() < deadline, f"no {needed}"
                time.sleep(0.01)
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait(60)
    assert not (data / "manifest.json").exists()
    shard = data / "shard-000000.tar"
    before = shard.stat().st_mtime_ns, (scratch / "batch-000001.json").stat().st_mtime_ns
    run = start(tmp_path, corpus, tokenizer_path, 3, 0)
    try:
        assert run.wait(120) == 0
    finally:
        run.kill()
    assert contents(data) == contents(whole)
    assert shard.stat().st_mtime_ns == before[0], "a finished shard was written again"


def test_ctrl_c_is_for_the_packing_alone(tmp_path: Path, whole: Path, corpus: str, tokenizer_path: Path) -> None:
    """A terminal sends it to the workers as well: they finish what they have, and print no stack of theirs."""
    run = start(tmp_path, corpus, tokenizer_path, 2, 0.3, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "data" / ".packing" / "batch-000002.json").exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
        said = run.communicate(timeout=60)[1].decode()
    finally:
        run.kill()
    assert run.returncode and said.rstrip().endswith("KeyboardInterrupt") and said.count("Traceback") == 1, said
    run = start(tmp_path, corpus, tokenizer_path, 2, 0)
    assert run.wait(120) == 0 and contents(tmp_path / "data") == contents(whole)


def interrupted(
    tmp_path: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> Path:
    """A run that ends, as if killed, when it asks for batch number `batches`."""
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 20)
    encode = Worker.encode

    def failing(worker: Worker, number: int, *args: object) -> object:
        if number == batches:
            raise KeyboardInterrupt
        return encode(worker, number, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            run_again(tmp_path, corpus, tokenizer_path)
    return tmp_path / "data"


def run_again(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    options = {"rows_per_shard": 10, "buffer_tokens": 2000, "shuffle_seed": 1, "workers": 1}
    pack([corpus], tmp_path / "data", tokenizer_path, 64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["none", "batch", "batch's record", "shard", "shard's record"])
def test_what_an_earlier_run_left_is_verified(
    tmp_path: Path, whole: Path, corpus: str, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = interrupted(tmp_path, corpus, tokenizer_path, monkeypatch, 14)
    kept = sorted((data / ".packing").glob("batch-*.bin"))
    assert (data / "shard-000002.tar").exists() and kept[0].name == "batch-000000.bin", "the head is kept"
    assert len(kept) < 14, "and batches that stand in shards are not"
    target = {
        "batch": kept[-1],
        "batch's record": data / ".packing" / "batch-000013.json",
        "shard": data / "shard-000001.tar",
        "shard's record": data / ".packing" / "shard-000001.json",
    }.get(damage)
    if target:
        bad = bytearray(target.read_bytes())
        bad[len(bad) // 2] ^= 1
        target.write_bytes(bad)
    encoded: list[int] = []
    encode = Worker.encode
    monkeypatch.setattr(Worker, "encode", lambda worker, *args: encoded.append(args[0]) or encode(worker, *args))
    run_again(tmp_path, corpus, tokenizer_path)
    assert contents(data) == contents(whole)
    again = {"none": 14, "batch": 13, "batch's record": 13}.get(damage, 0)
    assert encoded == list(range(again, 20)), damage
    assert ("packing starts again" in " ".join(capsys.readouterr().err.split())) == ("shard" in damage)


def test_another_recipe_or_text_starts_from_nothing(
    tmp_path: Path, whole: Path, texts: list[str], tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    data = interrupted(tmp_path, str(corpus), tokenizer_path, monkeypatch, 9)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run_again(tmp_path, str(corpus), tokenizer_path)
    assert not (data / ".packing").exists()
    rows = [[row.tokens.tolist() for row in PackedDataset(folder)] for folder in (data, whole)]
    assert rows[0] == rows[1]
    os.remove(data / "manifest.json")
    with pytest.raises(InputError, match="is not a packed dataset; name a new or empty --out"):
        run_again(tmp_path, str(corpus), tokenizer_path)
