"""How a trial stands and how it ended, from what its run directory holds; and a sweep's folder, which remembers.

DIR/ladder.json     what the trials are, so that a sweep goes on only as what it was begun
DIR/trials.csv      a line for each trial that has ended, rewritten whole after each; `perilune fit` reads it
DIR/runs/TRIAL      an ordinary run directory
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perilune.pretrain.data.manifest import write_atomically
from perilune.pretrain.errors import InputError, make_folder
from perilune.pretrain.scaling.ladder import Planned

COLUMNS = (
    "trial", "state", "budget", "size", "flops_per_token", "tokens", "loss", "bits_per_byte", "lr", "batch_tokens",
    "steps", "compute", "work", "params_total", "params_active", "seed", "tokenizer", "data", "train_seconds",
    "seconds", "why",
)  # fmt: skip
_WORDS = ("trial", "state", "size", "tokenizer", "data", "why")  # columns that are no numbers
_TAIL = 1 << 14  # bytes of a file whose last line is wanted


@dataclass(frozen=True)
class Outcome:
    """How a launch ended, or what an earlier one left."""

    state: Literal["done", "failed", "preempted", "refused", "lost"]
    why: str = ""
    loss: float = math.nan  # on the validation set, after the last step
    bits_per_byte: float = math.nan


@dataclass(frozen=True)
class Pace:
    """How long a trial takes."""

    rate: float  # FLOPs a second, of all its training
    besides: float  # seconds for start, validation and checkpoints

    def seconds(self, trial: Planned) -> float:
        return self.besides + trial.work / self.rate


def progress(run_dir: Path) -> dict[str, Any]:
    """The newest whole line of a run's metrics; {} where there is none."""
    return _last(run_dir / "metrics.jsonl")


def finished(run_dir: Path, steps: int) -> Outcome | None:
    """Of a run that has done all its steps and validated; None for one that has not."""
    entry = progress(run_dir)
    if entry.get("step") != steps or "valid_loss" not in entry:
        return None
    if entry["valid_loss"] is None:
        return Outcome("failed", "its validation loss is not finite")
    return Outcome("done", "", float(entry["valid_loss"]), float(entry["valid_bpb"] or math.nan))


def outcome(run_dir: Path, steps: int, events_before: int, code: int | None) -> Outcome:
    """Of a launch that is over, which found `events_before` events there; `code` is its exit code where it is known."""
    if (found := finished(run_dir, steps)) is not None:
        return found
    events = _events(run_dir)[events_before:]
    last = events[-1] if events else {}
    if last.get("event") in ("preempted", "stopped"):
        return Outcome("preempted", "stopped, with a checkpoint")
    if last.get("event") == "gave_up":
        why = str(last.get("why", "given up"))
        return Outcome("refused" if last.get("kind") == "bad_input" else "failed", why)
    said = _last_words(run_dir)
    if code == 2:
        return Outcome("refused", said)
    if code == 75:
        return Outcome("preempted", "stopped, with a checkpoint")
    how = "" if not code else f" with exit code {code}" if code >= 0 else f" by signal {-code}"
    return Outcome("lost", f"its launch ended{how} and says no more{f': {said}' if said else ''}")


def events_so_far(run_dir: Path) -> int:
    """How many events launches of this run have noted."""
    return len(_events(run_dir))


def train_seconds(run_dir: Path) -> float:
    """Seconds that its steps took, over all launches: what start, validation and checkpoints took is not in it."""
    found, before = 0.0, 0
    for entry in _lines(run_dir / "metrics.jsonl"):
        if entry.get("tokens_per_s"):
            found += (entry["tokens"] - before) / entry["tokens_per_s"]
        before = entry["tokens"]
    return found


def launch_log(run_dir: Path) -> Path:
    """What `perilune launch` said of the run."""
    return run_dir / "launch" / "sweep.log"


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return list(_lines(run_dir / "launch" / "events.jsonl"))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.split("\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _last(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL))
            lines = stream.read().split(b"\n")[:-1]
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_words(run_dir: Path) -> str:
    """The last line that its launch said."""
    try:
        lines = launch_log(run_dir).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line for line in lines if line.strip()]
    return said[-1].removeprefix("perilune: error: ")[:500] if said else ""


class Book:
    """A sweep's folder."""

    def __init__(self, folder: Path, trials: Sequence[Planned], known: Mapping[str, str]) -> None:
        """`known` are the corpus' fingerprints. Raises InputError where the folder is another sweep's."""
        self.folder, self._known = folder, dict(known)
        self._trials = {trial.name: trial for trial in trials}
        self._ladder: dict[str, Any] = {"trials": {trial.name: list(trial.words) for trial in trials}, **known}
        self.rows: dict[str, dict[str, str]] = {}
        self.begun = (folder / "ladder.json").exists()
        if self.begun:
            self._same_ladder()
            self.rows = self._read()
        elif (folder / "trials.csv").exists():
            raise InputError(f"{folder} has a trials.csv, and no ladder.json: another's; name another --out")

    def begin(self) -> None:
        """Make the folder, and write down what the trials are."""
        make_folder(self.folder)
        file = self.folder / "ladder.json"
        if not file.exists():
            write_atomically(file, (json.dumps(self._ladder, indent=1) + "\n").encode())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other sweep writes here meanwhile. Raises InputError if one does."""
        with (self.folder / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"another `perilune sweep` is at work in {self.folder}: wait for it, or end it"
                ) from error
            yield

    def run_dir(self, trial: Planned) -> Path:
        return (self.folder / "runs" / trial.name).resolve()

    def row(self, trial: Planned) -> dict[str, Any]:
        """Its line, numbers as such and None where not known; of one that has not ended its name and an empty state."""
        found: dict[str, Any] = {}
        for key, text in self.rows.get(trial.name, {"trial": trial.name, "state": ""}).items():
            number = math.nan if key in _WORDS else float(text)
            found[key] = text if key in _WORDS else number if math.isfinite(number) else None
        return found

    def state(self, trial: Planned) -> str:
        """done, failed, or empty while it has not ended."""
        return self.rows.get(trial.name, {}).get("state", "")

    def ended(self, trial: Planned, found: Outcome, seconds: float) -> None:
        """Write its line, and the file."""
        row = {
            **trial.facts, **self._known, "state": found.state, "loss": found.loss,
            "bits_per_byte": found.bits_per_byte, "train_seconds": round(train_seconds(self.run_dir(trial)), 2),
            "seconds": round(seconds, 2), "why": " ".join(found.why.split()),
        }  # fmt: skip
        self.rows[trial.name] = {name: str(row[name]) for name in COLUMNS}
        self._write()

    def forget_failed(self) -> None:
        """Trials that failed are to be tried again."""
        self.rows = {name: row for name, row in self.rows.items() if row["state"] != "failed"}
        self._write()

    def pace(self, rate: float | None = None) -> Pace | None:
        """Of the trials done so far, or at `rate`; None where neither is known."""
        done = [row for row in self.rows.values() if row["state"] == "done" and float(row["train_seconds"]) > 0]
        training = sum(float(row["train_seconds"]) for row in done)
        # A trial that was continued took more than the launch that ended it.
        rest = sorted(max(0.0, float(row["seconds"]) - float(row["train_seconds"])) for row in done)
        if rate is None and training:
            rate = sum(float(row["work"]) for row in done) / training
        return Pace(rate, rest[len(rest) // 2] if rest else 0.0) if rate else None

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[name] for name in self._trials if name in self.rows)
        write_atomically(self.folder / "trials.csv", text.getvalue().encode())

    def _read(self) -> dict[str, dict[str, str]]:
        file = self.folder / "trials.csv"
        if not file.exists():
            return {}
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        found = {row["trial"]: row for row in rows if set(row) == set(COLUMNS) and row["trial"] in self._trials}
        if len(found) < len(rows):
            raise InputError(
                f"{file} is not as `perilune sweep` wrote it ({len(rows)} lines, {len(found)} of this sweep)"
            )
        return found

    def _same_ladder(self) -> None:
        file = self.folder / "ladder.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            old = {name: list(words) for name, words in before["trials"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} cannot be read as a sweep's: {error}") from error
        new = self._ladder["trials"]
        told = []
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                told.append(f"{name} is gone")
            elif name not in old:
                told.append(f"{name} is new")
            elif old[name] != new[name]:
                differ = sorted({*map(str, old[name])} ^ {*map(str, new[name])})
                told.append(f"{name}: {', '.join(differ[:4])}")
        for key in ("tokenizer", "data"):
            # Empty: not seen from where a sweep was begun, or is continued.
            if before.get(key) and self._ladder.get(key) and before[key] != self._ladder[key]:
                told.append(f"{key}: {before.get(key)!r} then, {self._ladder.get(key)!r} now")
        if told:
            more = f" and {len(told) - 4} more" if len(told) > 4 else ""
            raise InputError(
                f"{self.folder} was begun with another ladder: {'; '.join(told[:4])}{more}. Take the ladder and the "
                "number of processes that it was begun with, or another --out: `perilune fit` reads several together"
            )


def failed(found: Outcome, why: str) -> Outcome:
    """`found`, given up."""
    return replace(found, state="failed", why=why)
