"""A small corpus of documents of very different lengths, its tokenizer, and its packed dataset."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SEQ_LEN = 64


def make_text(rng: random.Random, words: int) -> str:
    parts = ["def", "return", "lunar", "orbit", "naïve", "漢字", "🙂", "12345", "<|eos|>", "  \t", "\r\n", "\n", "x_1"]
    stems = ["per", "apo", "lune", "gee", "tion", "ing"]
    return " ".join(rng.choice(parts) + rng.choice(stems) + rng.choice(stems) for _ in range(words))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    return [make_text(rng, max(1, int(rng.lognormvariate(2.5, 1.2)))) for _ in range(400)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    return train_tokenizer([corpus], tmp_path_factory.mktemp("tokenizer") / "tok", 400)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, corpus: str, tokenizer_path: Path) -> Path:
    """Rows of SEQ_LEN tokens in several shards."""
    out = tmp_path_factory.mktemp("packed") / "data"
    pack([corpus], out, tokenizer_path, SEQ_LEN, rows_per_shard=50)
    return out
