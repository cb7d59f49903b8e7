"""Reading and dealing of packed rows, each figure beside what it is compared with, in one run.

    .venv/bin/python tests/bench/data.py [--rows 2048] [--rounds 5] [--json FILE]

Rows of 8192 tokens hold documents of lognormal length (median 600, sigma 1.2), packed best-fit decreasing, in uint32
(a vocabulary of 129,280), shards of 256 rows, read from the page cache by one thread. Rounds alternate between the
readers, so that a machine whose speed drifts is fair to all; the figure is the median of the rounds, the ratio that of
the rounds' ratios. Perilune reads in the order of training (a random row at a time) and verifies CRC-32, member names,
types, shapes, token ids and boundaries of every row; stock `webdataset` reads the shards from front to back and
verifies nothing: with its `.decode()` (numpy and json, the least that makes tokens of it), and bare (bytes of members).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
import webdataset
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset

from perilune.pretrain import presets, schema
from perilune.pretrain.data.assemble import assemble
from perilune.pretrain.data.dealing import CostModel, cost_model, deal
from perilune.pretrain.data.order import permute
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.stream import Stream, open_stream
from perilune.pretrain.plan.counts import flops_per_token

SEQ_LEN, VOCAB = 8192, 129_280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the ratios there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = lognormal_lengths(options.rows * SEQ_LEN // 1000)
    pieces = packed_lengths(lengths, SEQ_LEN)[: options.rows]
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(Path(folder) / "data", random_rows(pieces, VOCAB), SEQ_LEN, VOCAB)
        figures = {"machine": f"{os.cpu_count()} cores, one used", "rows": len(pieces), "seq_len": SEQ_LEN}
        figures |= reading(path, len(pieces), options.rounds)
    figures |= dealing(lognormal_lengths(60_000), 16) | ordering() | padding(lognormal_lengths(20_000, median=200))
    for name, value in figures.items():
        print(f"{name:58} {value:,.4g}" if isinstance(value, float) else f"{name:58} {value}")
    if options.json:
        options.json.write_text(json.dumps(entries(figures), indent=2))


def entries(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios among the figures, as tests/bench/run.py collects them."""

    def entry(name: str, ours: float, rival: float, ratio: float, unit: str) -> dict[str, Any]:
        return {"name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit}

    def rate(reader: str) -> float:
        return 1e6 * float(figures[f"{reader}: M tokens/s"])

    mine = rate("read, checksums on")
    found = [entry("read_vs_20m_tokens_a_second", mine, 20e6, mine / 20e6, "tokens/s")]
    for name, other in (("decoded", "stock webdataset, decoded"), ("bare_bytes", "stock webdataset, bare bytes")):
        found.append(entry(f"read_vs_webdataset_{name}", mine, rate(other), figures[f"read / {other}"], "tokens/s"))
    dealt, in_order = (
        figures[f"max/mean over 16 ranks, 128 rows, DeepSeek-V3, {how}"] for how in ("dealt", "in order")
    )
    return [*found, entry("dealing_vs_in_order", dealt, in_order, dealt / in_order, "busiest rank / mean")]


def reading(path: Path, rows: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each reader, and Perilune's over webdataset's."""
    dataset = PackedDataset(path)
    order = permute(np.arange(rows), rows, 1).tolist()
    shards = sorted(map(str, path.glob("*.tar")))
    stream = open_stream(schema.Data(path=str(path), seq_len=SEQ_LEN, workers=1), 1, depth=1)

    def ours() -> int:
        return sum(dataset[i].tokens.size for i in order)

    def assembled() -> int:
        return sum(assemble([dataset[i]], 1, True).positions.size for i in order)

    def decoded() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).decode()
        return sum(sample["tokens.npy"].size for sample in samples)

    def bare() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
        return sum(len(sample["tokens.npy"]) // 4 for sample in samples)

    readers: dict[str, Callable[[], int]] = {
        "read, checksums on": ours,
        "read and laid out for MTP depth 1": assembled,
        "read ahead by one process, as training gets it": lambda: through(stream, rows),
        "stock webdataset, decoded": decoded,
        "stock webdataset, bare bytes": bare,
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for round_number in range(rounds + 1):
        for name, reader in readers.items():
            began = time.perf_counter()
            tokens = reader()
            if round_number:  # the first fills the page cache
                rates[name].append(tokens / (time.perf_counter() - began))
    stream.close()
    found = {f"{name}: M tokens/s": statistics.median(values) / 1e6 for name, values in rates.items()}
    mine = rates["read, checksums on"]
    for other in ("stock webdataset, decoded", "stock webdataset, bare bytes"):
        ratios = [a / b for a, b in zip(mine, rates[other], strict=True)]
        found[f"read / {other}"] = statistics.median(ratios)
    return found


def through(stream: Stream, rows: int) -> int:
    """Tokens of an epoch of global batches of 32 rows, from the reading process to tensors here."""
    state, tokens = stream.initial_state(), 0
    while state.samples + 32 <= rows:
        batches, state = stream.read(state, 32, 0, 1, 1)
        tokens += sum(batch.positions.numel() for batch in batches)
        state = stream.advance(state, 32)
    return tokens


def dealing(lengths: list[int], ranks: int) -> dict[str, float]:
    """Work of the busiest rank over the mean, the worst global batch of an epoch in random order."""
    squares = np.array([sum(n * n for n in row) for row in packed_lengths(lengths, SEQ_LEN)])
    squares = squares[permute(np.arange(squares.size), squares.size, 1)]
    costs = {
        "attention alone": CostModel(0.0, 1.0).of(squares, np.zeros(squares.size), SEQ_LEN),
        "DeepSeek-V3": cost_model(presets.get("deepseek_v3").model).of(squares, np.zeros(squares.size), SEQ_LEN),
    }
    found = {}
    for name, cost in costs.items():
        for rows in (8 * ranks, 32 * ranks):
            for how in ("in order", "dealt"):
                worst = 0.0
                for begin in range(0, cost.size - rows + 1, rows):
                    batch = cost[begin : begin + rows]
                    places = deal(batch, ranks, 1) if how == "dealt" else np.arange(rows)
                    loads = batch[places].reshape(ranks, -1).sum(1)
                    worst = max(worst, float(loads.max() / loads.mean()))
                found[f"max/mean over {ranks} ranks, {rows} rows, {name}, {how}"] = worst
    began = time.perf_counter()
    deal(np.resize(squares, 15360).astype(float), 1024, 1)
    found["dealing 15,360 rows to 1,024 ranks: ms"] = 1e3 * (time.perf_counter() - began)
    return found


def ordering() -> dict[str, float]:
    """The order of 10^10 samples, by index."""
    at = np.arange(15360) * 651_041  # spread over the whole
    began = time.perf_counter()
    permute(at, 10**10, 1, 0)
    return {"order of 15,360 of 10^10 samples: ms": 1e3 * (time.perf_counter() - began)}


def padding(lengths: list[int]) -> dict[str, float]:
    """What a batch of one short document a row, padded to 2048 tokens, would compute beside packed rows."""
    lengths = [min(n, 2048) for n in lengths]
    packed = packed_lengths(lengths, 2048)
    model = presets.get("deepseek_v3").model
    linear = flops_per_token(model, 2048, document_lengths=[n for row in packed for n in row]).training
    padded = flops_per_token(model, 2048).training
    return {
        "documents of median 200, tokens padded to 2048 / packed": len(lengths) / len(packed),
        "the same in training FLOPs of DeepSeek-V3": len(lengths) * padded / (len(packed) * linear),
    }


if __name__ == "__main__":
    main()
