"""Packing beside its own tokenizer, in one run: bytes of text a second on one core, and how it scales.

    python tests/bench/pack.py --megabytes 60 --workers 2

Text is the standard library's source over and over (the documents numbered, so that no two are equal), as jsonl. The
figure to beat is Hugging Face `tokenizers` (`encode_batch_fast`, one thread) on the same documents, already in memory;
packing reads and parses them, encodes, plans, writes, hashes. With one worker both run in this process alone, and are
timed by its CPU seconds too, which a busy machine changes little; rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.sources import documents
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make_texts(options.megabytes * 1_000_000)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        tokenizer = train_tokenizer(["demo:stdlib"], folder / "tok", options.vocab_size)
        for line, value in packing(corpus, tokenizer, texts, options.workers, options.rounds).items():
            print(f"{line:<60} {value:>10.3f}")


def make_texts(size: int) -> list[str]:
    """`size` bytes of documents."""
    files = [document.text for document in documents(["demo:stdlib"])]
    texts: list[str] = []
    while size > 0:
        texts.append(f"# {len(texts)}\n{files[len(texts) % len(files)]}")
        size -= len(texts[-1].encode())
    return texts


def packing(corpus: Path, tokenizer: Path, texts: list[str], workers: int, rounds: int) -> dict[str, float]:
    """Figures by name: MB of text, and ratios. `corpus` holds `texts`."""
    coder = load_tokenizer(tokenizer)
    size = sum(len(text.encode()) for text in texts) / 1e6
    alone, one, many = [], [], []  # (seconds, CPU seconds)
    for _ in range(rounds):
        alone.append(tokenizer_alone(coder, texts))
        one.append(packed(corpus, tokenizer, 1))
        if workers > 1:
            many.append(packed(corpus, tokenizer, workers))
    median = statistics.median
    out = {}
    for i, clock in enumerate(("second", "CPU second")):
        out[f"HF tokenizers alone, one thread, MB a {clock}"] = size / median(t[i] for t in alone)
        out[f"perilune pack, one worker, MB a {clock}"] = size / median(t[i] for t in one)
        out[f"ratio, by the {clock} (median of rounds)"] = median(a[i] / b[i] for a, b in zip(alone, one, strict=True))
    if many:
        out[f"perilune pack, {workers} workers, MB a second"] = size / median(t[0] for t in many)
        out[f"{workers} workers / one"] = median(a[0] / b[0] for a, b in zip(one, many, strict=True))
    return out


def tokenizer_alone(coder: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """(seconds, CPU seconds) to encode all texts on one thread, ids left where `tokenizers` puts them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), 256):
        coder.inner.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def packed(corpus: Path, tokenizer: Path, workers: int) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) to pack, from the command's first step to its last."""
    out = corpus.parent / "packed"
    start = time.perf_counter(), time.process_time()
    pack([str(corpus)], out, tokenizer, 4096, workers=workers)
    taken = time.perf_counter() - start[0], time.process_time() - start[1]
    shutil.rmtree(out)
    return taken


if __name__ == "__main__":
    main()
