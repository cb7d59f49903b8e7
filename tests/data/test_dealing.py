"""Dealing: every row once, as many for each rank, and balanced on the corpus that the promise names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.pretrain import presets
from perilune.pretrain.data.dealing import CostModel, cost_model, deal
from perilune.pretrain.data.packing import Piece, plan
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.schema import Vision

SEQ_LEN = 8192


def lognormal_squares(documents: int, sigma: float) -> np.ndarray:
    """Sums of squared lengths of packed rows: documents of lognormal length, median 600 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(600), sigma, documents)).astype(int)
    rows, _ = plan([Piece(i, 0, int(n)) for i, n in enumerate(lengths)], SEQ_LEN)
    squares = np.array([sum(p.length**2 for p in row) for row in rows])
    return squares[rng.permutation(squares.size)]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.randoms())
def test_every_row_once_and_the_same_number_for_all(ranks: int, size: int, micros: int, rng) -> None:
    costs = np.array([rng.choice([1.0, 2.0, 7.5, 100.0]) for _ in range(ranks * size * micros)])
    dealt = deal(costs, ranks, size)
    assert dealt.shape == (ranks, micros, size)
    assert sorted(dealt.reshape(-1).tolist()) == list(range(costs.size))
    assert (np.diff(costs[dealt].sum(-1), axis=1) <= 1e-9).all(), "micro-batches in order of cost"
    assert np.array_equal(dealt, deal(costs.copy(), ranks, size))


@pytest.mark.parametrize("sigma", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("rows", [128, 512])
def test_sixteen_ranks_within_two_percent(sigma: float, rows: int) -> None:
    """On the squares alone; the linear part, equal for all rows, only brings the ratio nearer to 1."""
    squares = lognormal_squares(20_000, sigma)
    worst, in_order = [], []
    for begin in range(0, squares.size - rows + 1, rows):
        costs = CostModel(token=0.0, square=1.0).of(squares[begin : begin + rows], np.zeros(rows), SEQ_LEN)
        loads = costs[deal(costs, 16, 1)].sum((1, 2))
        worst.append(loads.max() / loads.mean())
        in_order.append(costs.reshape(16, -1).sum(1).max() / loads.mean())
    assert max(worst) <= 1.02 < min(in_order)


def test_the_cost_of_a_row_is_its_flops() -> None:
    model, lengths = presets.get("deepseek_v3").model, [100, 1000, 3000]
    squares = np.array([sum(n * n for n in lengths)])
    expected = flops_per_token(model, 4100, document_lengths=lengths).training * 4100
    assert cost_model(model).of(squares, np.zeros(1), 4100) == pytest.approx(expected, rel=1e-9)
    with_images = cost_model(model, Vision(num_layers=27)).of(squares, np.array([1000]), 4100)
    projector = (4608 * 4608 + 4608 * 7168) / 4  # weights, shared by the four patches of a cell
    assert with_images - expected == pytest.approx(1000 * 6 * (411.2e6 + 0.7e6 + projector), rel=1e-3), (
        "MoonViT has 0.41B weights in its blocks"
    )


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"24 rows does not divide by 5 data-parallel ranks x .* 1 rows = 5"):
        deal(np.ones(24), 5, 1)
