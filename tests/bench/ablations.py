"""Three questions of a recipe, each asked of small runs with several seeds: docs/science.md has what they answered.

    .venv/bin/python tests/bench/ablations.py --data PACKED --out DIR [--only balance mtp muon] [--dry-run]

- balance: the router's bias (auxiliary-loss-free, arXiv 2408.15664) beside an auxiliary loss, and beside neither.
- mtp: multi-token prediction on and off; the loss compared is that of the next token alone.
- muon: how many tokens Muon needs for the loss that AdamW ends with. Runs of several lengths, each with its own whole
  schedule; the crossing is interpolated in the logarithm of tokens, seed by seed. Each optimizer gets the best of the
  learning rates RATES by its loss with the first seed.

Every run is `perilune train demo` with the keys that --dry-run prints, one process of one thread, and differs from
its neighbours of the same seed in nothing else: same weights at the start, same rows in the same order. The same
command goes on where it was stopped. A difference is that of runs of one seed, its spread the standard deviation over
seeds. PACKED is a folder as `perilune pack` makes it, of rows of 256 tokens from a vocabulary of 1024.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from perilune.pretrain.scaling.results import finished

STEPS, ROWS, LENGTH = 300, 8, 256
VALID = 40  # batches of the validation set
MODEL = {
    "model.num_layers": 3, "model.hidden_size": 64, "model.num_attention_heads": 2, "model.q_lora_rank": "null",
    "model.kv_lora_rank": 24, "model.qk_nope_head_dim": 24, "model.qk_rope_head_dim": 8, "model.v_head_dim": 24,
    "model.intermediate_size": 168, "model.moe_intermediate_size": 40, "model.n_routed_experts": 16,
    "model.num_experts_per_tok": 2, "model.num_nextn_predict_layers": 0, "model.vocab_size": 1024,
}  # fmt: skip
COMMON = MODEL | {
    "data.seq_len": LENGTH, "train.global_batch_size": ROWS, "train.micro_batch_size": ROWS, "parallel.ep": 1,
    "train.log_every": 50, "valid.steps": VALID, "optim.lr": 8e-3, "model.seq_aux_loss_alpha": 0,
}  # fmt: skip
ONLY_BIAS: dict[str, Any] = {"schedule.bias_update_speed": 1e-2}  # the base of all comparisons


def only_loss(alpha: float) -> dict[str, Any]:
    return {"schedule.bias_update_speed": 0, "model.seq_aux_loss_alpha": alpha}


BALANCE = {"bias": ONLY_BIAS, "loss_1e-3": only_loss(1e-3), "loss_1e-2": only_loss(1e-2), "neither": only_loss(0)}
MTP = {"bias": ONLY_BIAS, "mtp": ONLY_BIAS | {"model.num_nextn_predict_layers": 1}}
RATES = (4e-3, 8e-3, 16e-3)
PARTS = (0.35, 0.5, 0.7, 1.0)  # of STEPS, for Muon
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int
    keys: tuple[tuple[str, Any], ...]
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.arm}_seed{self.seed}"

    def words(self) -> list[str]:
        given = COMMON | dict(self.keys)
        given |= {"train.steps": self.steps, "valid.every": self.steps, "train.save_every": 0, "train.keep": 1,
                  "train.seed": self.seed, "schedule.warmup_tokens": self.steps // 10 * ROWS * LENGTH}  # fmt: skip
        return [f"{key}={value}" for key, value in given.items()]


@dataclass(frozen=True)
class Result:
    loss: float  # validation, nats a token
    bits_per_byte: float
    max_vio: float  # mean over expert layers and the last tenth of the steps
    tokens: int


def balance_and_mtp(arms: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    return [Run(arm, seed, tuple(keys.items())) for arm, keys in arms.items() for seed in SEEDS]


def at_rate(optimizer: str, rate: float, seed: int, part: float = 1.0) -> Run:
    keys = ONLY_BIAS | {"optim.name": optimizer, "optim.lr": rate}
    name = f"{optimizer}_{rate:g}" + (f"_{part:g}" if part < 1 else "")
    return Run(name, seed, tuple(keys.items()), round(part * STEPS))


def do(runs: Iterable[Run], data: Path, out: Path, at_once: int) -> dict[str, Result]:
    """Name -> how it ended, of runs that are done or are done now. Raises RuntimeError naming one that failed."""

    def one(run: Run) -> tuple[str, Result]:
        folder = out / "runs" / run.name
        if finished(folder, run.steps) is None:
            command = [sys.executable, "-m", "perilune.pretrain.cli", "train", "demo", f"data.path={data / 'train'}",
                       "--run", str(folder), "--nproc", "1", *run.words()]  # fmt: skip
            alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
            ended = subprocess.run(command, env=alone, capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"{run.name} ended with exit code {ended.returncode}: {ended.stderr[-2000:]}")
        return run.name, read(folder)

    todo = list(runs)
    with ThreadPoolExecutor(at_once) as threads:
        return dict(track(threads.map(one, todo), total=len(todo), console=Console(stderr=True), description="runs"))


def read(folder: Path) -> Result:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = [line["max_vio_mean"] for line in lines[-len(lines) // 10 :]]
    last = lines[-1]
    return Result(last["valid_loss"], last["valid_bpb"], statistics.fmean(late), last["tokens"])


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def compared(title: str, arms: Iterable[str], found: Mapping[str, Result]) -> list[dict[str, Any]]:
    """A table of arms; differences are from the first, seed by seed."""
    table = Table("", "validation loss", "beside the first", "bits a byte", "MaxVio", title=title)
    rows = []
    first, *_ = arms = list(arms)
    for arm in arms:
        mine = [found[f"{arm}_seed{seed}"] for seed in SEEDS]
        base = [found[f"{first}_seed{seed}"] for seed in SEEDS]
        apart = [a.loss - b.loss for a, b in zip(mine, base, strict=True)]
        table.add_row(arm, spread([r.loss for r in mine]), "" if arm == first else spread(apart),
                      spread([r.bits_per_byte for r in mine]), spread([r.max_vio for r in mine]))  # fmt: skip
        rows.append({"arm": arm, "loss": [r.loss for r in mine], "bits_per_byte": [r.bits_per_byte for r in mine],
                     "max_vio": [r.max_vio for r in mine]})  # fmt: skip
    Console().print(table)
    return rows


def crossing(target: float, curve: list[tuple[int, float]]) -> float:
    """Tokens at which `curve`, (tokens, loss) with falling loss, meets `target`; NaN outside of it."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= target <= high:
            part = (high - target) / (high - low)
            return math.exp(math.log(before) + part * (math.log(after) - math.log(before)))
    return math.nan


def muon(data: Path, out: Path, at_once: int) -> dict[str, Any]:
    first = [at_rate(name, rate, SEEDS[0]) for name in ("adamw", "muon") for rate in RATES]
    found = do(first, data, out, at_once)
    best = {name: min(RATES, key=lambda rate: found[at_rate(name, rate, SEEDS[0]).name].loss)
            for name in ("adamw", "muon")}  # fmt: skip
    rest = [at_rate("adamw", best["adamw"], seed) for seed in SEEDS]
    rest += [at_rate("muon", best["muon"], seed, part) for seed in SEEDS for part in PARTS]
    found |= do(rest, data, out, at_once)
    rates = Table("learning rate", "adamw", "muon", title=f"Validation loss, seed {SEEDS[0]}")
    for rate in RATES:
        rates.add_row(f"{rate:g}", *(f"{found[at_rate(n, rate, SEEDS[0]).name].loss:.4f}" for n in ("adamw", "muon")))
    table = Table("seed", "adamw", *(f"muon, {part:.0%} of the tokens" for part in PARTS), "equal loss at")
    parts = []
    for seed in SEEDS:
        target = found[at_rate("adamw", best["adamw"], seed).name]
        ours = [found[at_rate("muon", best["muon"], seed, part).name] for part in PARTS]
        parts.append(crossing(target.loss, [(run.tokens, run.loss) for run in ours]) / target.tokens)
        table.add_row(f"{seed}", f"{target.loss:.4f}", *(f"{run.loss:.4f}" for run in ours), f"{parts[-1]:.1%}")
    Console().print(rates, table)
    print(f"Muon needs {statistics.fmean(parts):.1%} ± {statistics.stdev(parts):.1%} of AdamW's tokens")
    return {"rates": best, "parts": parts, "losses": {name: result.loss for name, result in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="packed rows: a folder with train and valid")
    parser.add_argument("--out", type=Path, required=True, help="for the runs, and results.json")
    parser.add_argument("--only", nargs="+", choices=("balance", "mtp", "muon"), default=("balance", "mtp", "muon"))
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="print the keys of every run, start none")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for run in balance_and_mtp(BALANCE | MTP) + [at_rate(n, r, s) for n in ("adamw", "muon") for r in RATES
                                                     for s in SEEDS]:  # fmt: skip
            print(run.name, *run.words())
        return
    data, out = arguments.data.resolve(), arguments.out.resolve()
    results: dict[str, Any] = {}
    for name, arms in (("balance", BALANCE), ("mtp", MTP)):
        if name in arguments.only:
            found = do(balance_and_mtp(arms), data, out, arguments.at_once)
            results[name] = compared(name, arms, found)
    if "muon" in arguments.only:
        results["muon"] = muon(data, out, arguments.at_once)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
