"""The blend: largest error first against a plain loop, exact counts at any row, schedules, refusals."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.pretrain.data.blend import MAX_PERIOD, Blend
from perilune.pretrain.errors import InputError


def naive(weights: list[int], rows: int) -> list[int]:
    taken, chosen = [0] * len(weights), []
    for n in range(rows):
        errors = [Fraction(w, sum(weights)) * (n + 1) - t for w, t in zip(weights, taken, strict=True)]
        chosen.append(errors.index(max(errors)))
        taken[chosen[-1]] += 1
    return chosen


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 200), st.integers(1, 60))
def test_it_is_largest_error_first_from_any_row(weights: list[int], first: int, rows: int) -> None:
    names = {str(i): float(w) for i, w in enumerate(weights)}
    expected = naive(weights, first + rows)
    blend = Blend(names, 64)
    assert blend.choose(first, rows).tolist() == expected[first:]
    assert blend.counts(first).tolist() == [expected[:first].count(d) for d in range(len(weights))]
    total = sum(weights)
    errors = blend.counts(first + rows) - np.array(weights) * (first + rows) / total
    assert (errors < 1).all() and (errors > 1 - len(weights) - 1e-9).all()


def test_exact_counts_at_large_rows_take_no_time() -> None:
    weights = {"a": 0.61, "b": 0.28, "c": 0.1, "d": 0.01}
    began = time.perf_counter()
    blend, rows = Blend(weights, 4096), 10**12
    assert blend.counts(rows).tolist() == [610 * 10**9, 280 * 10**9, 100 * 10**9, 10**10]
    assert np.bincount(blend.choose(rows, 100), minlength=4).tolist() == [61, 28, 10, 1]
    assert blend.counts(rows + 77).tolist() == (blend.counts(rows) + np.bincount(blend.choose(rows, 77))).tolist()
    assert time.perf_counter() - began < 1
    odd = Blend({"a": 1 / 3, "b": 2 / 3}, 4096)  # as decimals these have a period of 10^16: rounded
    assert abs(odd.counts(9 * MAX_PERIOD)[0] - 3 * MAX_PERIOD) < 9


def test_weights_follow_a_schedule_by_tokens() -> None:
    blend = Blend({"web": {0: 0.9, 1000: 0.5}, "code": {0: 0.1, 1000: 0.3}, "late": {1000: 0.2}}, 10)
    assert blend.counts(100).tolist() == [90, 10, 0]
    assert blend.counts(200).tolist() == [90 + 50, 10 + 30, 20]
    assert np.bincount(blend.choose(95, 15), minlength=3).tolist() == (blend.counts(110) - blend.counts(95)).tolist()
    assert 2 not in blend.choose(0, 100) and 2 in blend.choose(100, 10)
    # a change inside a row counts from the next one
    assert Blend({"a": {0: 1.0, 11: 0.0}, "b": {11: 1.0}}, 10).counts(5).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": -1.0, "b": 1.0}, "weights must be positive.*a: -1"),
        ({"a": 0.0, "b": 1.0}, "weights must be positive"),
        ({"a": float("inf")}, "weights must be positive"),
        ({"a": {}}, "weights must be positive"),
        ({"a": {-5: 1.0}}, "tokens >= 0"),
        ({"a": {100: 1.0}}, "from 0 tokens on every weight is 0"),
        ({"a": {0: 1.0, 500: 0.0}}, "from 500 tokens on every weight is 0"),
        ({"a": 1.0, "b": 1e-9}, "b has 1e-09 of the weight"),
    ],
)
def test_refusals(weights: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Blend(weights, 10)
