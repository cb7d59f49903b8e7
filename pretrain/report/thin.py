"""Long series made short: equal buckets of recorded steps, each with mean, lowest and highest: no spike is lost.

N recorded steps, B buckets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 6  # significant ones in the page

Array = NDArray[np.float64]


def frame(columns: dict[str, Array], keys: list[str], scales: dict[str, float], buckets: int) -> dict[str, Any] | None:
    """The series `keys` over the steps where at least one of them was recorded, in at most `buckets` buckets.

    columns: float64 [N] each, NaN where null, `step` and `tokens` among them; a key that is absent is left out.
    Returns {"first", "last": steps of each bucket, "tokens": mean of each bucket, "series": {key: {"mean", "low",
    "high"}}}, lists of B, with null where a bucket holds no number; `low` and `high` only where buckets hold more than
    one step. A series without a single number is left out; None if all are.
    """
    keys = [key for key in keys if key in columns and not np.isnan(columns[key]).all()]
    if not keys:
        return None
    recorded = ~np.all([np.isnan(columns[key]) for key in keys], axis=0)
    step = columns["step"][recorded]
    starts = _starts(len(step), buckets)
    ends = np.append(starts[1:], len(step)) - 1
    single = len(starts) == len(step)
    series = {}
    for key in keys:
        values = columns[key][recorded] * scales.get(key, 1.0)
        series[key] = {"mean": rounded(_mean(values, starts))}
        if not single:
            series[key]["low"] = rounded(np.fmin.reduceat(values, starts))
            series[key]["high"] = rounded(np.fmax.reduceat(values, starts))
    return {
        "first": step[starts].astype(int).tolist(),
        "last": step[ends].astype(int).tolist(),
        "tokens": rounded(_mean(columns["tokens"][recorded], starts), digits=9),
        "series": series,
    }


def spans(steps: Array) -> list[list[int]]:
    """Ascending steps as [first, last] of each stretch of neighbours."""
    if not len(steps):
        return []
    whole = steps.astype(int)
    cuts = np.flatnonzero(np.diff(whole) > 1)
    firsts, lasts = whole[np.append(0, cuts + 1)], whole[np.append(cuts, len(whole) - 1)]
    return [[int(a), int(b)] for a, b in zip(firsts, lasts, strict=True)]


def rounded(values: Array, digits: int = DIGITS) -> list[float | None]:
    """Plain numbers of `digits` significant digits, None for what is not finite; a whole number is an int."""
    short = [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]
    return [int(v) if v is not None and v.is_integer() and abs(v) < 1e15 else v for v in short]


def _starts(n: int, buckets: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n, min(n, buckets), endpoint=False).astype(np.int64))


def _mean(values: Array, starts: NDArray[np.int64]) -> Array:
    """Mean of the numbers of each bucket, NaN where there is none."""
    there = ~np.isnan(values)
    total = np.add.reduceat(np.where(there, values, 0.0), starts)
    count = np.add.reduceat(there.astype(np.float64), starts)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
