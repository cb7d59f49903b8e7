"""Which dataset gives each row of training: largest error first, in whole numbers, as a pure function of the row.

Between two changes of weight the shares are fractions with a common denominator D, the period. Row n goes to the
dataset furthest behind its share of n+1 rows (the first of equals). After each D rows every count is exact, so the
choice repeats, and counts after any number of rows need at most one period walked: nothing is summed in floats, and a
resume costs the same at row 10^12 as at row 0. Each change of weight begins anew, with no error carried over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from perilune.pretrain.errors import InputError

MAX_PERIOD = 100_000  # rows; shares that need more are rounded to so many parts

Weight = float | Mapping[int, float]  # a number, or tokens consumed -> the weight from there on (0 before the first)


class Blend:
    """The choice for datasets of these `weights`; rows are of `seq_len` tokens.

    Raises InputError for weights that are negative or not finite, a dataset that never has one, a time at which none
    has, and a share too small to count.
    """

    def __init__(self, weights: Mapping[str, Weight], seq_len: int) -> None:
        schedules = {name: dict(w) if isinstance(w, Mapping) else {0: w} for name, w in weights.items()}
        for name, schedule in schedules.items():
            if any(not 0 <= w < math.inf for w in schedule.values()) or not any(schedule.values()):
                raise InputError(
                    f"data.blend: weights must be positive numbers (in a schedule not all 0), not {name}: "
                    f"{weights[name]}"
                )
            if any(tokens < 0 for tokens in schedule):
                raise InputError(f"data.blend: a schedule maps tokens >= 0 to weights, not {name}: {weights[name]}")
        starts = sorted({0, *(tokens for schedule in schedules.values() for tokens in schedule)})
        self._first = [-(-tokens // seq_len) for tokens in starts]  # rows before each stage
        self._stages = []
        for tokens in starts:
            now = [_at(schedule, tokens) for schedule in schedules.values()]
            if not any(now):
                raise InputError(f"data.blend: from {tokens} tokens on every weight is 0: {dict(weights)}")
            self._stages.append(_Stage(_shares(now, list(weights))))

    def shares(self, row: int) -> list[float]:
        """Each dataset's part of the rows where row `row` stands."""
        stage = self._stages[max(i for i, first in enumerate(self._first) if first <= row)]
        return [share / stage.period for share in stage.shares]

    def counts(self, rows: int) -> np.ndarray:
        """Rows of each dataset among the first `rows`: int64 [datasets]."""
        return sum(
            (stage.counts(end - begin) for stage, begin, end in self._parts(0, rows)),
            np.zeros(len(self._stages[0].shares), np.int64),
        )

    def choose(self, first: int, rows: int) -> np.ndarray:
        """The dataset of each of `rows` rows from row `first` on: int64 [rows]."""
        parts = []
        for stage, begin, end in self._parts(first, first + rows):
            parts.append(stage.choose(begin, end))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _parts(self, first: int, last: int) -> list[tuple[_Stage, int, int]]:
        """(stage, begin, end) of rows first..last, counted from each stage's own first row."""
        ends = [*self._first[1:], max(last, self._first[-1])]
        return [
            (stage, max(first, begin) - begin, min(last, end) - begin)
            for stage, begin, end in zip(self._stages, self._first, ends, strict=True)
            if max(first, begin) < min(last, end)
        ]


class _Stage:
    """Constant shares, in whole parts of their sum, the period."""

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares = list(shares)
        self.period = sum(shares)
        # The first choices of the period, as far as they were needed, and after them each dataset's error: share x rows
        # - period x count. One tuple, exchanged as a whole: threads that read ahead ask too.
        self._walked = (np.zeros(0, np.int64), [0] * len(shares))

    def counts(self, rows: int) -> np.ndarray:
        rest = rows % self.period
        part = np.bincount(self._pattern(rest)[:rest], minlength=len(self.shares))
        return rows // self.period * np.array(self.shares, np.int64) + part

    def choose(self, begin: int, end: int) -> np.ndarray:
        at = np.arange(begin, end) % self.period
        return self._pattern(int(at.max()) + 1)[at]

    def _pattern(self, rows: int) -> np.ndarray:
        """At least the first `rows` choices of the period."""
        pattern, error = self._walked
        if rows <= len(pattern):
            return pattern
        chosen = []
        for _ in range(len(pattern), min(self.period, max(rows, 2 * len(pattern)))):
            error = [e + share for e, share in zip(error, self.shares, strict=True)]
            furthest = error.index(max(error))
            error[furthest] -= self.period
            chosen.append(furthest)
        self._walked = (np.concatenate([pattern, np.array(chosen, np.int64)]), error)
        return self._walked[0]


def _at(schedule: Mapping[int, float], tokens: int) -> float:
    """The weight that rules after `tokens` tokens."""
    begun = [start for start in schedule if start <= tokens]
    return schedule[max(begun)] if begun else 0.0


def _shares(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Whole numbers in the ratio of `weights`, as the decimals they were written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in exact))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in exact]
    parts = [share * MAX_PERIOD for share in exact]
    whole = [int(part) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda i: (whole[i] - parts[i], i))
    for i in by_rest[: MAX_PERIOD - sum(whole)]:
        whole[i] += 1
    for name, share, part in zip(names, exact, whole, strict=True):
        if share and not part:
            raise InputError(
                f"data.blend: {name} has {float(share):.2g} of the weight, less than a row in {MAX_PERIOD}; "
                "raise its weight or leave it out"
            )
    return whole
