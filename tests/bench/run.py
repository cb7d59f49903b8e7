"""`make bench`: every measurement of this folder, one after another, and all their ratios in one table.

    .venv/bin/python tests/bench/run.py [--only step start] [--out bench.json]

Each runs in a process of its own and gives entries `name`, `ours`, `rival`, `ratio` (what the goal is about) and
`unit`; they are collected in `bench.json`. What it leaves out on this machine it names with why (`not_measured`): that
is a row of the table alone. One that fails is named in the table and makes the exit code 1; the others still run. A
goal that is missed is shown, and is no failure: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BENCHES = (
    "start", "step", "floors", "overlap", "checkpoint", "pack", "data", "verify", "vision_data", "vision", "optim",
    "recovery",
)  # fmt: skip
KEYS = {"name", "ours", "rival", "ratio", "unit"}
LEFT_OUT = {"name", "not_measured"}
# What is aimed at, of the ratio: at least, or at most. A name without a goal is shown without one.
AT_LEAST = {
    "step_fp32_vs_transformers": 1.6,
    "step_bf16_vs_transformers": 2.0,
    "step_fp32_vs_megatron": 1.6,
    "step_bf16_vs_megatron": 2.0,
    "step_fp32_matmul_fraction": 0.6,
    "step_bf16_matmul_fraction": 0.6,
    "step_bf16_fp32_matmul_fraction": 0.6,
    "checkpoint_save_vs_dd": 0.7,
    "export_vs_dd": 0.7,
    "pack_vs_tokenizers": 0.8,
    "read_vs_20m_tokens_a_second": 1.0,
    "read_vs_webdataset_decoded": 1.0,
    "read_vs_webdataset_bare_bytes": 1.0,
    "vision_packed_vs_padded": 1.5,
    "vision_tower_vs_transformers": 1.0,
}
AT_MOST = {
    "step_rss_vs_transformers": 0.7,
    "step_rss_bf16_vs_transformers": 0.7,
    "checkpoint_async_stall": 0.1,
    "export_peak_memory": 1.0,
    "help_seconds": 1.0,
    "demo_first_step_seconds": 1.0,
    "recovery_killed_rank_seconds": 1.0,
    "recovery_killed_agent_seconds": 1.0,
    "recovery_stopped_rank_seconds": 1.0,
}


@dataclass
class Outcome:
    """What one bench gave."""

    bench: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # why, by name
    error: str = ""  # why there are none
    seconds: float = 0.0


def run_bench(bench: str) -> Outcome:
    """Run `bench`.py to its end; what it prints goes to this terminal."""
    print(f"\n$ {bench}.py", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "entries.json"
        command = [sys.executable, str(HERE / f"{bench}.py"), "--json", str(path)]
        code = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}).returncode
        outcome = Outcome(bench, seconds=time.monotonic() - began)
        if code:
            outcome.error = f"ended with exit code {code}"
            return outcome
        try:
            entries = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            outcome.error = f"left no JSON: {error}"
            return outcome
    outcome.error = wrong(entries)
    for one in [] if outcome.error else entries:
        if "not_measured" in one:
            outcome.left_out[one["name"]] = one["not_measured"]
        else:
            outcome.entries.append(one)
    return outcome


def wrong(entries: Any) -> str:
    """Why `entries` are not what a bench gives; empty if they are."""
    if not isinstance(entries, list) or not entries:
        return f"its JSON is no list of entries: {str(entries)[:80]}"
    for one in entries:
        if isinstance(one, dict) and set(one) == LEFT_OUT:
            continue
        if not isinstance(one, dict) or set(one) != KEYS:
            return f"an entry has not the keys {', '.join(sorted(KEYS))}: {str(one)[:120]}"
        if not all(isinstance(one[key], int | float) and math.isfinite(one[key]) for key in ("ours", "rival", "ratio")):
            return f"an entry is not of finite numbers: {str(one)[:120]}"
    return ""


def goal(name: str) -> str:
    """As shown; empty without one."""
    if name in AT_LEAST:
        return f">= {AT_LEAST[name]:g}"
    return f"<= {AT_MOST[name]:g}" if name in AT_MOST else ""


def verdict(name: str, ratio: float) -> str:
    """Whether the goal is met; empty without one."""
    if not goal(name):
        return ""
    met = ratio >= AT_LEAST[name] if name in AT_LEAST else ratio <= AT_MOST[name]
    return "[green]met[/]" if met else "[yellow]missed[/]"


def shown(value: float, unit: str) -> str:
    """`value` with its unit, in a size that can be read."""
    if unit == "bytes" or "/s" in unit:
        for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if abs(value) >= power:
                return f"{value / power:.2f} {letter}{unit.replace('bytes', 'B').replace('B/s', 'B/s')}"
    return f"{value:,.4g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def table(outcomes: list[Outcome]) -> Table:
    """Every ratio beside its goal, and every bench that failed."""
    found = Table(title="Perilune beside its rivals (the rival of a time is its limit)")
    for title in ("", "ours", "rival", "ratio", "goal", ""):
        found.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for outcome in outcomes:
        for one in outcome.entries:
            name, ratio = one["name"], one["ratio"]
            numbers = (shown(one[key], one["unit"]) for key in ("ours", "rival"))
            found.add_row(name, *numbers, f"{ratio:.3g}", goal(name), verdict(name, ratio))
        for name in outcome.left_out:
            found.add_row(name, "", "", "", goal(name), "not measured here")
        if outcome.error:
            found.add_row(f"{outcome.bench}.py", "", "", "", "", f"[red]failed[/]: {outcome.error}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="these alone")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    outcomes = [run_bench(bench) for bench in options.only]
    options.out.write_text(json.dumps([one for outcome in outcomes for one in outcome.entries], indent=2) + "\n")
    print()
    Console(width=None if sys.stdout.isatty() else 160).print(table(outcomes))
    for why in dict.fromkeys(why for outcome in outcomes for why in outcome.left_out.values()):
        print(f"not measured here: {why}")
    took = ", ".join(f"{outcome.bench} {outcome.seconds:.0f} s" for outcome in outcomes)
    print(f"{options.out} is written; {took}")
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
