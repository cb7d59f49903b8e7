"""Seconds until Perilune answers: `perilune --help`, and `perilune train demo` to its first step.

    .venv/bin/python tests/bench/start.py [--rounds 3] [--json FILE]

Wall seconds of whole processes, as a user waits for them; the first round, which fills the page cache, is not counted,
and the figure is the median of the others. The demo's tokenizer and shards are made first, as `perilune demo` makes
them; its training command is then timed from its start until its metrics have the line of step 1, and stopped. A
goal's limit stands for the rival, so that a ratio of 1 is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perilune.pretrain import presets

HELP_S, FIRST_STEP_S = 0.5, 15.0  # the limits
PERILUNE = Path(sys.executable).parent / "perilune"
PATIENCE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        helps = [help_seconds() for _ in range(3 * options.rounds + 1)][1:]
        data = packed(folder)
        steps = [first_step_seconds(data, folder / f"run_{i}") for i in range(options.rounds + 1)][1:]
    found = []
    for name, seconds, limit in (("help", helps, HELP_S), ("demo_first_step", steps, FIRST_STEP_S)):
        middle = statistics.median(seconds)
        print(f"{name}: {middle:.2f} s (rounds {min(seconds):.2f} to {max(seconds):.2f}), limit {limit:g} s")
        found.append(
            {"name": f"{name}_seconds", "ours": middle, "rival": limit, "ratio": middle / limit, "unit": "seconds"}
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([PERILUNE, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def packed(folder: Path) -> Path:
    """The demo's shards, of Python's standard library."""
    config = presets.get("demo")
    source, tokenizer = "demo:stdlib", folder / "tokenizer"
    vocabulary, length = str(config.model.vocab_size), str(config.data.seq_len)
    for words in (
        ["tokenizer", "train", "--out", str(tokenizer), "--vocab-size", vocabulary, source],
        ["pack", "--out", str(folder / "packed"), "--tokenizer", str(tokenizer), "--seq-len", length, source],
    ):
        subprocess.run([PERILUNE, *words], stdout=subprocess.DEVNULL, check=True)
    return folder / "packed" / "train"


def first_step_seconds(data: Path, run: Path) -> float:
    """From the command's start until step 1 is in the run's metrics."""
    began = time.perf_counter()
    command = [PERILUNE, "train", "demo", f"data.path={data}", "--run", str(run), "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and b"\n" in metrics.read_bytes()):
            if process.poll() is not None:
                raise RuntimeError(f"training ended with exit code {process.returncode} before its first step")
            if time.perf_counter() - began > PATIENCE_S:
                raise RuntimeError(f"no first step within {PATIENCE_S:.0f} s")
            time.sleep(0.02)
        return time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
