"""What a sweep has found, one line a training run; and what cannot be put together in one fit."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling.words import some

_NUMBERS = ("params", "flops_per_token", "tokens", "loss", "lr", "batch_tokens")
_AS_MANY = 0.75  # of the settings of another size, to have been tuned like it
_ALIKE = ("tokenizer", "data")  # a loss is comparable only where these are equal


@dataclass(frozen=True)
class Trial:
    """A training run that has ended."""

    name: str  # where it stands: FILE:LINE
    size: float  # `per`: parameters, or FLOPs a token
    per: str  # params or flops_per_token
    tokens: float
    loss: float  # nats a token, or bits a byte: all of one kind
    lr: float | None = None
    batch_tokens: float | None = None

    @property
    def compute(self) -> float:
        """Training FLOPs: 6 N D of parameters (arXiv 2001.08361), M D of FLOPs a token (arXiv 2401.02954)."""
        return self.size * self.tokens * (6 if self.per == "params" else 1)


@dataclass(frozen=True)
class Trials:
    """Those that can be fitted, and what was left out."""

    all: tuple[Trial, ...]
    warnings: tuple[str, ...] = ()


def read_csv(paths: Sequence[Path], mixed: bool = False) -> Trials:
    """The trials of files whose first line names their columns: `params` or `flops_per_token`, `tokens`, `loss`, and if
    they are there `lr`, `batch_tokens`, `tokenizer`, `data`; others are not read.

    Losses that are not finite, or as high as a model's that has learned nothing beside the others, are left out with a
    warning of each kind. Raises InputError for a file that cannot be read, a column that is missing, a value that is no
    positive number, the same trial twice, sizes of two kinds, and unless `mixed`, tokenizers or data of two kinds, or
    that only some trials name.
    """
    trials: list[Trial] = []
    alike: dict[str, dict[str, str]] = {name: {} for name in _ALIKE}  # value -> where it stands first
    not_finite: list[str] = []
    seen: dict[tuple[Trial | str, ...], tuple[str, Trial]] = {}
    unnamed: dict[str, str] = {}  # column -> the first trial that says nothing there
    for path in paths:
        for name, row in _rows(path):
            trial = _trial(name, row)
            if trial is None:
                not_finite.append(f"{name} ({row['loss'].strip()})")
                continue
            for same in _told_by(trial, row):
                if same in seen:
                    raise InputError(_again(trial, *seen[same]))
                seen[same] = name, trial
            trials.append(trial)
            for column in _ALIKE:
                if row.get(column):
                    alike[column].setdefault(row[column].strip(), name)
                else:
                    unnamed.setdefault(column, name)
    for column, values in alike.items():
        if values and column in unnamed and not mixed:
            value, where = next(iter(values.items()))
            raise InputError(
                f"column {column}: {value!r} ({where}), and nothing for {unnamed[column]}: losses of different "
                f"{column}s cannot be compared; name it for all, or say --mixed if they are the same in fact"
            )
        if len(values) > 1 and not mixed:
            told = ", ".join(f"{value!r} ({where})" for value, where in list(values.items())[:4])
            raise InputError(
                f"column {column}: {told}: losses of different {column}s cannot be compared; fit one kind at a time, "
                "or say --mixed if they are the same in fact"
            )
    kinds = {trial.per: trial.name for trial in trials}
    if len(kinds) > 1:
        told = ", ".join(f"{per} ({name})" for per, name in kinds.items())
        raise InputError(f"sizes of two kinds: {told}; give all trials one of them")
    kept, diverged = _without_diverged(trials)
    high = [f"{trial.name} ({trial.loss:g})" for trial in diverged]
    out = ((not_finite, "is not finite"), (high, "is far above the others of its compute"))
    return Trials(tuple(kept), tuple(f"loss {what}: left out: {some(found)}" for found, what in out if found))


def _told_by(trial: Trial, row: dict[str, str]) -> list[tuple[Trial | str, ...]]:
    """What no two runs have in common: all their values, the loss to its last digit among them; and without the loss,
    where a name or a seed is said, all others with these two."""
    seed, name, *others = (row.get(column, "").strip() for column in ("seed", "trial", *_ALIKE))
    told: list[tuple[Trial | str, ...]] = [(replace(trial, name=""), seed, *others)]
    if seed or name:
        told.append((replace(trial, name="", loss=0.0), seed, name, *others))
    return told


def _again(trial: Trial, where: str, before: Trial) -> str:
    """Of a trial that stands at `where` already."""
    if trial.name == where:
        return f"{where} is read twice: its file is named twice; name each once"
    losses = "" if trial.loss == before.loss else f" with loss {trial.loss:g} in place of {before.loss:g}"
    return (
        f"{trial.name} is {where} again{losses}: the same size, tokens, settings and seed; a run counts once: remove "
        "one, or tell them apart by a column `seed`"
    )


def budgets(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials of about equal compute together, the least first: steps of up to 5%, in all up to 25%."""
    found: list[list[Trial]] = []
    for trial in sorted(trials, key=lambda trial: trial.compute):
        if found and trial.compute <= min(1.05 * found[-1][-1].compute, 1.25 * found[-1][0].compute):
            found[-1].append(trial)
        else:
            found.append([trial])
    return found


def tuned(trials: Iterable[Trial]) -> list[Trial]:
    """Of each size and number of tokens the trials of one learning rate and batch size, such that those of a budget can
    be compared: a size that alone was tuned looks better than it is.

    Where all sizes of a budget had settings to choose from, about as many (a few may have diverged), each has its own
    best, by the mean of its seeds. Else each has the best of the settings that most sizes have; where they have none in
    common, those with the fewest have their own, and the others what is nearest to it, interpolated over log size.
    Tokens within 2% are as many: whole batches of another size rarely add up to the same.
    """
    return [trial for group in budgets(trials) for shape in _compared(_shapes(group)) for trial in shape]


def passed_over(trials: Iterable[Trial]) -> list[tuple[float, float]]:
    """Of each budget (FLOPs, the largest part of loss by which the best setting of a size beats that of `tuned`)."""
    found = []
    for group in budgets(trials):
        shapes = _shapes(group)
        parts = [1 - _mean(_best(shape)) / _mean(taken) for shape, taken in zip(shapes, _compared(shapes), strict=True)]
        found.append((group[0].compute, max(parts)))
    return found


_Setting = tuple[float | None, float | None]  # learning rate, tokens a batch
_Shape = dict[_Setting, list[Trial]]  # the trials of a size and a number of tokens


def _shapes(group: Iterable[Trial]) -> list[_Shape]:
    """Of a budget, the smallest first."""
    found: list[tuple[Trial, _Shape]] = []
    for trial in sorted(group, key=lambda trial: (trial.size, trial.tokens)):
        if not found or trial.size != found[-1][0].size or trial.tokens > 1.02 * found[-1][0].tokens:
            found.append((trial, {}))
        found[-1][1].setdefault((trial.lr, trial.batch_tokens), []).append(trial)
    return [shape for _, shape in found]


def _compared(shapes: Sequence[_Shape]) -> list[list[Trial]]:
    """Of each shape of a budget the trials of the setting that it is compared at."""
    fewest, most = min(map(len, shapes)), max(map(len, shapes))
    if most == 1 or (fewest > 1 and fewest >= _AS_MANY * most):
        return [_best(shape) for shape in shapes]
    count = Counter(setting for shape in shapes for setting in shape)
    common = {setting for setting, times in count.items() if times == max(count.values())}
    if 2 * max(count.values()) > len(shapes):
        return [_best({s: shape[s] for s in shape if s in common} or _near(shape, common)) for shape in shapes]
    # A rule by size, and a grid at some sizes.
    known = [(math.log(_size(shape)), _best(shape)[0]) for shape in shapes if len(shape) == fewest]
    return [
        _best(_near(shape, [_between(math.log(_size(shape)), known)]) if len(shape) > fewest else shape)
        for shape in shapes
    ]


def _best(shape: _Shape) -> list[Trial]:
    return min(shape.values(), key=_mean)


def _mean(trials: Iterable[Trial]) -> float:
    return fmean(trial.loss for trial in trials)


def _size(shape: _Shape) -> float:
    return next(iter(shape.values()))[0].size


def _near(shape: _Shape, settings: Iterable[_Setting]) -> _Shape:
    """The part of a shape that is nearest to one of `settings`, by the logarithms of what both name."""

    def off(one: _Setting, other: _Setting) -> float:
        return math.hypot(*(math.log(a / b) for a, b in zip(one, other, strict=True) if a and b))

    distance = {setting: min(off(setting, other) for other in settings) for setting in shape}
    least = min(distance.values())
    return {setting: shape[setting] for setting in shape if distance[setting] <= least + 1e-9}


def _between(log_size: float, known: Sequence[tuple[float, Trial]]) -> _Setting:
    """A setting between those of the next smaller and the next larger of `known`; at the ends that of the next."""
    below = [one for one in known if one[0] <= log_size] or known[:1]
    above = [one for one in known if one[0] >= log_size] or known[-1:]
    (x, low), (y, high) = below[-1], above[0]
    part = (log_size - x) / (y - x) if y > x else 0.0

    def mixed(a: float | None, b: float | None) -> float | None:
        return a ** (1 - part) * b**part if a and b else None

    return mixed(low.lr, high.lr), mixed(low.batch_tokens, high.batch_tokens)


def averaged(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that differ by their seed alone as one, with the mean of their losses."""
    alike: dict[Trial, list[Trial]] = {}
    for trial in trials:
        alike.setdefault(replace(trial, name="", loss=0.0), []).append(trial)
    return [replace(group[0], loss=fmean(trial.loss for trial in group)) for group in alike.values()]


def _rows(path: Path) -> Iterable[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            if twice := sorted({column for column in columns if column and columns.count(column) > 1}):
                raise InputError(f"{path}: column {', '.join(twice)} is there twice")
            missing = [column for column in ("tokens", "loss") if column not in columns]
            if not {"params", "flops_per_token"} & set(columns):
                missing.insert(0, "params or flops_per_token")
            if missing:
                there = ", ".join(columns) or "none"
                raise InputError(f"{path}: no column {', '.join(missing)}; its columns are {there}")
            if {"params", "flops_per_token"} <= set(columns):
                raise InputError(f"{path}: params and flops_per_token are both there; leave one of them out")
            for row in reader:
                name = f"{path}:{reader.line_num}"
                if None in row:
                    raise InputError(f"{name}: more cells than {len(columns)} columns (a comma inside a number?)")
                yield name, {key: value or "" for key, value in row.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path} cannot be read as CSV: {why}; name a table of trials, as the trials.csv of `perilune sweep`"
        ) from error


def _trial(name: str, row: dict[str, str]) -> Trial | None:
    """None where the loss is not finite."""
    found: dict[str, float] = {}
    for column in _NUMBERS:
        text = row.get(column, "").strip()
        if not text and column in ("lr", "batch_tokens", "params", "flops_per_token"):
            continue
        try:
            value = float(text)
        except ValueError as error:
            raise InputError(f"{name}: {column}={text!r} is no number") from error
        if column == "loss" and not math.isfinite(value):
            return None
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}: {column}={text} must be above 0 and finite")
        found[column] = value
    per = "params" if "params" in found else "flops_per_token"
    if per not in found:
        raise InputError(f"{name}: no size: neither params nor flops_per_token has a value")
    trial = Trial(name, found[per], per, found["tokens"], found["loss"], found.get("lr"), found.get("batch_tokens"))
    if not math.isfinite(trial.compute):
        raise InputError(f"{name}: {per}={trial.size:g} and tokens={trial.tokens:g}: more FLOPs than can be held")
    return trial


def _without_diverged(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """(kept, left out): of each compute, those whose loss is more than half above the median of its budget."""
    out = []
    for group in budgets(trials):
        losses = sorted(trial.loss for trial in group)
        if len(group) >= 3:
            out += [trial for trial in group if trial.loss > 1.5 * losses[len(losses) // 2]]
    names = {trial.name for trial in out}
    return [trial for trial in trials if trial.name not in names], out
