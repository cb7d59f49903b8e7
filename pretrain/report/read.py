"""What a run directory holds, read for the report: also while the run goes on, and after it was cut off.

T spans of time, L expert layers (MTP's included), E routed experts.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from perilune.pretrain import config as configs
from perilune.pretrain.errors import InputError
from perilune.pretrain.report import environment
from perilune.pretrain.report.thin import Array
from perilune.pretrain.schema import Config

METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"
WHOLE_LOAD_BYTES = 256 << 20  # of expert_load.jsonl; of a longer one some lines are read, evenly spaced
MAX_OWN_KEYS = 16  # metrics beyond the contract that get a plot


@dataclass(frozen=True)
class Load:
    """Where the tokens went, summed over spans of recorded steps."""

    first: list[int]  # step of each span's first record, T of them
    last: list[int]
    counts: np.ndarray  # float32 [T, L, E]: tokens routed to an expert in the span's records
    max_vio: np.ndarray  # float32 [T, L]: mean over the span's records of the fullest expert over the mean, minus 1


@dataclass(frozen=True)
class Run:
    """A run as recorded. `columns` are float64 [N], NaN for null; `step` and `tokens` are always there."""

    path: Path
    name: str
    config: Config
    columns: dict[str, Array]
    skipped: np.ndarray  # bool [N]: no weight changed, a loss or gradient was not finite
    load: Load | None
    starts: list[dict[str, Any]]
    written: float | None  # when metrics.jsonl was last written, seconds since 1970
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    @property
    def steps(self) -> int:
        """Steps recorded."""
        return len(self.columns["step"])


def read_runs(paths: list[Path], load_spans: int) -> list[Run]:
    """Read the run directories. `load_spans` bounds T. Raises InputError for one that is no run, or is named twice."""
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise InputError(f"{paths[i]} is named twice: a run is compared with others")
    return [read_run(path, name, load_spans) for path, name in zip(real, _names(real), strict=True)]


def read_run(path: Path, name: str, load_spans: int) -> Run:
    """Read one run directory. Raises InputError if it is none, or its config cannot be read."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name a run directory, as `perilune train --run` made it")
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: not a run directory, there is no config.yaml in it; name one of `perilune train`")
    notes: list[str] = []
    columns, skipped = _read_metrics(path / METRICS, notes)
    try:
        starts = environment.read(path)
    except InputError as error:
        starts = []
        notes.append(str(error))
    return Run(
        path=path,
        name=name,
        config=configs.load(path / "config.yaml"),
        columns=columns,
        skipped=skipped,
        load=_read_load(path / EXPERT_LOAD, load_spans, notes),
        starts=starts,
        written=(path / METRICS).stat().st_mtime if (path / METRICS).exists() else None,
        notes=notes,
    )


def _names(paths: list[Path]) -> list[str]:
    """The folders' own names, with as many of the folders above as it takes to tell them apart."""
    depth = 1
    longest = max(len(path.parts) for path in paths)
    while depth < longest and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


# ---------------------------------------------------------------- metrics.jsonl


def _read_metrics(file: Path, notes: list[str]) -> tuple[dict[str, Array], np.ndarray]:
    """Every number of every step. A step that stands twice counts as its later record: the run went back to it."""
    columns: dict[str, array[float]] = {key: array("d") for key in ("step", "tokens", "loss", "skipped")}
    steps = columns["step"]
    for entry in _entries(file, notes):
        row = len(steps)
        while row and steps[row - 1] >= entry["step"]:
            row -= 1
        if row < len(steps):
            for column in columns.values():
                del column[row:]
        for key, value in entry.items():
            if key not in columns and not isinstance(value, int | float):
                continue
            column = columns.setdefault(key, array("d"))
            if len(column) < row:
                column.extend([math.nan] * (row - len(column)))
            column.append(_number(value))
    padded = {
        key: np.concatenate([column, np.full(len(steps) - len(column), np.nan)]) for key, column in columns.items()
    }
    skipped = (np.nan_to_num(padded.pop("skipped")) > 0) | np.isnan(padded["loss"])
    return padded, skipped


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond float's range
        return math.nan
    return number if math.isfinite(number) else math.nan


def _entries(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of `file` that are objects with a step; others are counted in `notes`, but an unfinished last one."""
    if not file.exists():
        return
    bad: list[int] = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            entry = _parse(line)
            if entry is not None:
                yield entry
            elif line.endswith(b"\n"):
                bad.append(number)
    if bad:
        lines = "1 line" if len(bad) == 1 else f"{len(bad):,} lines"
        notes.append(f"{file.name}: {lines} could not be read and left out, the first is line {bad[0]:,}")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if isinstance(step, int) and 0 <= step < 1 << 53 else None


# ---------------------------------------------------------------- expert_load.jsonl


class _Spans:
    """Records summed into at most `limit` spans of equally many, in one pass: joining pairs when they are too many."""

    def __init__(self, limit: int) -> None:
        self.limit, self.each = max(2, limit), 1
        self.first: list[int] = []
        self.last: list[int] = []
        self.counts: list[np.ndarray] = []
        self.max_vio: list[np.ndarray] = []
        self.records: list[int] = []

    def add(self, step: int, load_LE: np.ndarray) -> None:
        vio = load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1e-9) - 1
        if self.records and self.records[-1] < self.each:
            self.last[-1] = step
            self.counts[-1] += load_LE
            self.max_vio[-1] += vio
            self.records[-1] += 1
            return
        if len(self.records) == self.limit:
            self._join_pairs()
            self.add(step, load_LE)
            return
        self.first.append(step)
        self.last.append(step)
        self.counts.append(load_LE)
        self.max_vio.append(vio)
        self.records.append(1)

    def _join_pairs(self) -> None:
        n = len(self.records)
        self.first = self.first[::2]
        self.last = [self.last[min(i + 1, n - 1)] for i in range(0, n, 2)]
        self.records = [sum(self.records[i : i + 2]) for i in range(0, n, 2)]
        self.counts = [np.sum(self.counts[i : i + 2], axis=0) for i in range(0, n, 2)]
        self.max_vio = [np.sum(self.max_vio[i : i + 2], axis=0) for i in range(0, n, 2)]
        self.each *= 2

    def load(self) -> Load:
        records = np.array(self.records, dtype=np.float32)[:, None]
        return Load(self.first, self.last, np.stack(self.counts), np.stack(self.max_vio) / records)


def _read_load(file: Path, spans: int, notes: list[str]) -> Load | None:
    """None where nothing was recorded: a model without experts, or a run before its first record."""
    if not file.exists():
        return None
    whole = file.stat().st_size <= WHOLE_LOAD_BYTES
    summed, shape, newest, odd = _Spans(spans), None, -1, 0
    with file.open("rb") as stream:
        for line in stream if whole else _evenly(stream, file.stat().st_size, 2 * spans):
            entry = _parse(line)
            load_LE = _matrix(entry.get("load")) if entry is not None else None
            shape = shape or (load_LE.shape if load_LE is not None else None)
            if entry is None or load_LE is None or load_LE.shape != shape:
                odd += line.endswith(b"\n")
            elif entry["step"] > newest:
                newest = entry["step"]
                summed.add(newest, load_LE)
    if odd:
        notes.append(f"{file.name}: {odd:,} lines could not be read, or are of another shape, and are left out")
    if not whole:
        read = sum(summed.records)
        notes.append(
            f"{file.name} is {file.stat().st_size / 2**30:.1f} GiB: {read:,} lines of it, evenly spaced, are shown"
        )
    return summed.load() if summed.records else None


def _evenly(stream: BinaryIO, size: int, lines: int) -> Iterator[bytes]:
    """The first line that begins after each of `lines` equally distant places."""
    for i in range(lines):
        stream.seek(size * i // lines)
        if i:
            stream.readline()
        yield stream.readline()


def _matrix(load: Any) -> np.ndarray | None:
    """float32 [L, E], or None for what is not a rectangle of counts."""
    try:
        load_LE = np.array(load, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    return load_LE if load_LE.ndim == 2 and load_LE.size and bool((load_LE >= 0).all()) else None
