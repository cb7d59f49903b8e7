"""Validation by source, and the two commands on a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import evaluate_ranks as ranks
import pytest

from perilune.parallel.workers import Workers
from perilune.pretrain.data.mixture import source_of
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.tokenizer import load_tokenizer
from perilune.pretrain.schema import Config, Data, Model, Valid


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, workers: Workers, packed: Path, models: dict[str, Model]
) -> tuple[Path, float, float]:
    """A run with MTP, its validation loss and bits per byte as training computes them."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(
        Config(), model=models["MTP 1"], data=Data(path=str(packed), seq_len=64), valid=Valid(path=str(packed), every=1)
    )
    return folder, *workers.run(1, ranks.make_run, folder, config)[0]


def test_sources_sum_to_training_s_evaluate(run: tuple[Path, float, float], workers: Workers, packed: Path) -> None:
    path, loss, bits = run
    found = workers.run(1, ranks.validated, path, packed, True, 0)[0]
    assert found.rows == len(PackedDataset(packed)) > 3
    names = {Path(name).name for name in found.sources}
    assert names == {"lines.jsonl", "code", "prose"}
    assert found.total.loss == pytest.approx(loss, rel=1e-6)
    assert found.total.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert len({figures.loss for figures in found.sources.values()}) == 3
    for document_mask in (True, False):
        some = workers.run(1, ranks.validated, path, packed, document_mask, 2)[0]
        assert some.rows == 2 and some.total.tokens < found.total.tokens


def test_counts_are_those_of_the_rows(run: tuple[Path, float, float], workers: Workers, packed: Path) -> None:
    """Tokens and bytes by source, counted piece by piece from docs.json and the tokenizer's own decoding."""
    dataset, tokenizer = PackedDataset(packed), load_tokenizer(PackedDataset(packed).manifest["tokenizer"]["path"])
    tokens: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for index in range(len(dataset)):
        row = dataset[index]
        for piece, start, end in zip(row.docs, row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            source = source_of(piece["source"])
            if piece["repeat"]:
                continue
            first = len(tokenizer.inner.id_to_token(int(row.tokens[start]))) if row.tokens[start] > 10 else 0
            tokens[source] = tokens.get(source, 0) + int(end - start) - 1
            sizes[source] = sizes.get(source, 0) + piece["bytes"] - first
    found = workers.run(1, ranks.validated, run[0], packed, True, 0)[0]
    assert {name: figures.tokens for name, figures in found.sources.items()} == tokens
    assert {name: figures.bytes for name, figures in found.sources.items()} == sizes
    assert list(sizes.values()) and list(found.sources) == sorted(found.sources, key=lambda name: -sizes[name])


@pytest.mark.parametrize(
    ("document", "source"),
    [
        ("data/part.jsonl.zst:17", "data/part.jsonl.zst"),
        ("data/part.parquet:1", "data/part.parquet"),
        ("data/pairs.tar:00017", "data/pairs.tar"),
        ("s3://data/pairs.TAR:folder/00017", "s3://data/pairs.TAR"),
        ("https://host/pairs.tar?version=1:a:b", "https://host/pairs.tar?version=1"),
        ("stdlib/asyncio/events.py", "stdlib/asyncio"),
        ("notes.md", "notes.md"),
        ("odd:name/x.txt", "odd:name"),
    ],
)
def test_source_of(document: str, source: str) -> None:
    assert source_of(document) == source


BOTH = """
import json, sys
from perilune.pretrain.cli import main
for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
"""


def test_commands(run: tuple[Path, float, float], tmp_path: Path) -> None:
    """Both in one process of their own: starting takes seconds. What they print is JSON, a line each."""
    path, loss, bits = run
    line = {"task": "moons", "context": "9 moons, 81 ", "choices": ["craters", "perilune"], "answer": 0}
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(line) + "\n" + json.dumps(line | {"answer": 1}) + "\n")
    prompts = ["--prompt", "The Moon", "--prompt", "def ", "--max-new-tokens", "9"]
    words = [["eval", str(path), "--tasks", str(tasks), "--json"], ["generate", str(path), *prompts, "--json"]]
    done = subprocess.run(
        [sys.executable, "-c", BOTH, json.dumps(words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    result, first, second = (json.loads(text) for text in done.stdout.splitlines())
    assert result["step"] == 7
    assert result["validation"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["validation"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert result["tasks"] == {
        "moons": {"questions": 2, "raw": 0.5, "raw_stderr": 0.5, "by_byte": 0.5, "by_byte_stderr": 0.5}
    }
    (written,) = (path / "eval").iterdir()
    assert json.loads(written.read_text()) == result
    assert first["prompt"] == "The Moon" and 0 < len(first["tokens"]) <= 9 and second["prompt"] == "def "


def test_refusals(run: tuple[Path, float, float], workers: Workers, packed: Path) -> None:
    said = workers.run(1, ranks.refusals, run[0], packed)[0]
    expected = [
        "f:1: context and choice are",
        "--prompt 'The Moon' has",
        "--prompt '': the first token is predicted from nothing",
        "--prompt 'The \\udcff': bytes that are not UTF-8",
        "the training data with another",
        "its tokenizer has 400 tokens, the model 300",
        "nor a checkpoint nor a Hugging Face folder (config.json)",
    ]
    assert len(said) == len(expected)
    for message, part in zip(said, expected, strict=True):
        assert part in message
    assert "max_position_embeddings is 128" in said[0] and "max_position_embeddings 128" in said[1]
