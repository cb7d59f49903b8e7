"""The order is a bijection computed by index, looks shuffled, and depends on the key alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.pretrain.data.order import permute


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5000), st.integers(), st.integers(0, 100))
def test_bijection(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(st.integers(1, 10**10), st.data())
def test_an_index_alone_gives_what_it_gives_among_others(n: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(indices, n, 7)
    assert [int(permute(np.array(i), n, 7)) for i in indices] == together.tolist()
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(set(indices.tolist()))


@pytest.mark.parametrize("n", [1000, 4097, 10**10])
def test_it_looks_shuffled(n: int) -> None:
    take = min(n, 100_000)
    x, y = np.arange(take), permute(np.arange(take), n, 1)
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(take)
    assert abs(np.corrcoef(y[:-1], y[1:])[0, 1]) < 4 / np.sqrt(take), "neighbours stay together"
    assert abs(np.corrcoef(y, permute(x, n, 2))[0, 1]) < 4 / np.sqrt(take), "two seeds go together"
    counts = np.histogram(y, bins=20, range=(0, n))[0]
    assert ((counts - take / 20) ** 2 / (take / 20)).sum() < 50, "chi-squared of 19 degrees: beyond 50, p < 1e-3"


def test_out_of_range() -> None:
    with pytest.raises(ValueError, match="out of range"):
        permute(np.array([5]), 5, 1)


def test_quality_at_ten_billion() -> None:
    """Where a run of a dataset of 10^10 rows looks: any stretch, any stride, any bit, is as random draws would be."""
    n, take = 10**10, 1 << 16
    edges = 64
    for first, stride in ((0, 1), (n - take, 1), (n // 3, 1), (5, 1 << 17), (0, n // take)):
        at = first + stride * np.arange(take)
        y = permute(at, n, 3, 0, "data")
        counts = np.histogram(y, bins=edges, range=(0, n))[0]
        assert ((counts - take / edges) ** 2 / (take / edges)).sum() < 120, "63 degrees: beyond 120, p < 2e-5"
        pairs = np.histogram2d(y[:-1], y[1:], bins=16, range=((0, n), (0, n)))[0]
        assert ((pairs - take / 256) ** 2 / (take / 256)).sum() < 360, "255 degrees: beyond 360, p < 2e-5"
        bits = (y[:, None] >> np.arange(20)) & 1  # the low bits; n is no power of two for the others
        assert (abs(bits.mean(0) - 0.5) < 4.5 / (2 * np.sqrt(take))).all()
        gaps = np.sort(np.diff(np.sort(y))) * take / n  # of random points: exponential
        cdf = 1 - np.exp(-gaps)
        assert abs(cdf - (np.arange(gaps.size) + 0.5) / gaps.size).max() < 2.3 / np.sqrt(take), "Kolmogorov-Smirnov"
    one, other = (permute(np.arange(take), n, 3, epoch, "data") for epoch in (0, 1))
    assert np.intersect1d(one, other).size < 6, "two epochs begin with different rows: 0.4 in common are expected"
