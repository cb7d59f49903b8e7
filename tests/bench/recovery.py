"""Seconds until a fault is noticed and until training is on its way again, for `perilune launch local`.

    .venv/bin/python tests/bench/recovery.py [--hang 5] [--json FILE]

The preset `tiny` in two processes, a checkpoint every second step. Each fault strikes the run under way; "noticed" is
the event in launch/events.jsonl, "again" the first step that the next attempt records.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PERILUNE = str(Path(sys.executable).parent / "perilune")
PATIENCE_S = 120.0
AGAIN_S = 60.0  # within which training is to be on its way again, the start of Python and torch included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hang", type=float, default=5.0, help="--hang-after of the run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = packed(folder)
        run = folder / "run"
        process = launch(data, run, options.hang)
        until(lambda: steps_of(run, 0))
        faults = (
            ("killed_rank", "kill -9 of a rank", signal.SIGKILL, lambda: ranks(process.pid)[1]),
            ("killed_agent", "kill -9 of the agent", signal.SIGKILL, lambda: children(process.pid)[0]),
            (
                "stopped_rank",
                f"SIGSTOP of a rank, --hang-after {options.hang:g}",
                signal.SIGSTOP,
                lambda: ranks(process.pid)[1],
            ),
        )
        for attempt, (key, name, number, victim) in enumerate(faults):
            os.kill(victim(), number)
            began = time.monotonic()
            until(lambda attempt=attempt: len(events(run, "restart")) > attempt)
            noticed = time.monotonic() - began
            until(lambda attempt=attempt: steps_of(run, attempt + 1))
            again = time.monotonic() - began
            print(f"{name}: noticed after {noticed:.1f} s, again after {again:.1f} s", flush=True)
            about = {"ours": again, "rival": AGAIN_S, "ratio": again / AGAIN_S, "unit": "s"}
            entries.append({"name": f"recovery_{key}_seconds", **about})
        process.terminate()
        began = time.monotonic()
        code = process.wait(PATIENCE_S)
        print(f"SIGTERM: exit code {code} after {time.monotonic() - began:.1f} s", flush=True)

        process = launch(data, run, options.hang)
        until(lambda: steps_of(run, 0))
        pids = [*ranks(process.pid), *children(process.pid)]
        process.kill()
        began = time.monotonic()
        process.wait(PATIENCE_S)
        until(lambda: not any(map(alive, pids)))
        print(f"kill -9 of the launcher: its {len(pids)} processes gone after {time.monotonic() - began:.2f} s")
    if options.json:
        options.json.write_text(json.dumps(entries, indent=2))


def packed(folder: Path) -> Path:
    sources = str(Path(__file__).parents[2] / "launch")
    for words in (
        ["tokenizer", "train", "--out", "tok", "--vocab-size", "512", sources],
        ["pack", "--out", "packed", "--tokenizer", "tok", "--seq-len", "64", sources],
    ):
        subprocess.run([PERILUNE, *words], cwd=folder, check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)
    return folder / "packed"


def launch(data: Path, run: Path, hang: float) -> subprocess.Popen[bytes]:
    words = ["launch", "local", "--nproc", "2", "--hang-after", str(hang), "--", "train", "tiny", f"data.path={data}"]
    words += ["parallel.ep=2", "train.steps=2000", "train.save_every=2", "valid.every=0", "--run", str(run)]
    return subprocess.Popen([PERILUNE, *words], stdout=subprocess.DEVNULL)


def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S} s")
        time.sleep(0.02)


def steps_of(run: Path, attempt: int) -> bool:
    """Whether attempt number `attempt` has done three steps: a checkpoint is there."""
    try:
        beat = json.loads((run / "launch" / "beats" / "rank_00000.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(beat["attempt"] == attempt and beat["begun"] and beat["step"] >= 3)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "launch" / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ranks(pid: int) -> list[int]:
    return [rank for agent in children(pid) for rank in children(agent)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    main()
