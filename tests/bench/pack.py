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
from typing import Any

from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.sources import documents
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the ratios there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make_texts(options.megabytes * 1_000_000)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        tokenizer = train_tokenizer(["demo:stdlib"], folder / "tok", options.vocab_size)
        entries = packing(corpus, tokenizer, texts, options.workers, options.rounds)
    for one in entries:
        numbers = (one[key] for key in ("ours", "rival", "ratio"))
        print(f"{one['name']:<32}" + "".join(f"{number:>10.3f}" for number in numbers), one["unit"])
    if options.json:
        options.json.write_text(json.dumps(entries, indent=2))


def make_texts(size: int) -> list[str]:
    """`size` bytes of documents."""
    files = [document.text for document in documents(["demo:stdlib"])]
    texts: list[str] = []
    while size > 0:
        texts.append(f"# {len(texts)}\n{files[len(texts) % len(files)]}")
        size -= len(texts[-1].encode())
    return texts


def packing(corpus: Path, tokenizer: Path, texts: list[str], workers: int, rounds: int) -> list[dict[str, Any]]:
    """Entries in MB of text, ratios as medians of the rounds'. `corpus` holds `texts`."""
    coder = load_tokenizer(tokenizer)
    size = sum(len(text.encode()) for text in texts) / 1e6
    alone, one, many = [], [], []  # (seconds, CPU seconds)
    for _ in range(rounds):
        alone.append(tokenizer_alone(coder, texts))
        one.append(packed(corpus, tokenizer, 1))
        if workers > 1:
            many.append(packed(corpus, tokenizer, workers))

    def entry(name: str, clock: int, ours: list[tuple[float, float]], rival: list[tuple[float, float]]) -> Any:
        rates = [size / statistics.median(taken[clock] for taken in who) for who in (ours, rival)]
        ratio = statistics.median(b[clock] / a[clock] for a, b in zip(ours, rival, strict=True))
        unit = "MB/s" if clock == 0 else "MB a CPU second"
        return {"name": name, "ours": rates[0], "rival": rates[1], "ratio": ratio, "unit": unit}

    found = [entry("pack_vs_tokenizers", 0, one, alone), entry("pack_cpu_vs_tokenizers", 1, one, alone)]
    return [*found, entry(f"pack_{workers}_workers_vs_one", 0, many, one)] if many else found


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
