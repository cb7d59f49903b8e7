"""Power laws in compute, fitted: k C^exponent, and for the loss E + k C^exponent, which no compute brings below E.

Least squares: of the logarithms, or with a floor of the relative residuals. They go through minima of budgets, whose
outliers were left out before. (Of so few, the Huber loss of L(N, D) would go through three exactly, and each refit
through some other three.) R sets of values are fitted at once, a law's and its refits'; N budgets, X exponents tried.
Logarithms are natural.
"""

from __future__ import annotations

import numpy as np

from perilune.pretrain.scaling.laws import Constant, Law

_EXPONENTS = (1e-3, 3.0)  # of C^-exponent, between which a law with a floor is looked for
_STARTS, _FINER, _ROUNDS = 120, 30, 6  # exponents tried; then between the best one's neighbours; times that is repeated


def power_laws(compute_N: np.ndarray, value_RN: np.ndarray) -> np.ndarray:
    """(k, exponent) [R, 2]."""
    log_C, log_value_RN = np.log(compute_N), np.log(value_RN)
    x_N = log_C - log_C.mean()
    exponent_R = log_value_RN @ x_N / (x_N @ x_N)
    return np.stack([np.exp(log_value_RN.mean(axis=1) - exponent_R * log_C.mean()), exponent_R], axis=1)


def floor_laws(compute_N: np.ndarray, loss_RN: np.ndarray) -> np.ndarray:
    """(k, exponent, E) [R, 3] with E >= 0 and exponent < 0; nan where no such law falls with compute.

    Of a given exponent the best E and k are linear least squares; so the exponent is all that is searched for, from
    everywhere: the cost is known on a grid, and then on finer ones around its least.
    """
    middle = float(np.log(compute_N).mean())
    x_N, rows = np.log(compute_N) - middle, np.arange(len(loss_RN))
    tried_RX = np.tile(np.geomspace(*_EXPONENTS, _STARTS), (len(loss_RN), 1))
    for left in reversed(range(_ROUNDS)):
        E_RX, k_RX, cost_RX = _given(tried_RX, x_N, loss_RN)
        best_R = cost_RX.argmin(axis=1)
        if left:
            last = tried_RX.shape[1] - 1
            ends = tried_RX[rows, np.maximum(best_R - 1, 0)], tried_RX[rows, np.minimum(best_R + 1, last)]
            tried_RX = np.geomspace(*ends, _FINER, axis=1)
    exponent_R, k_R, E_R = tried_RX[rows, best_R], k_RX[rows, best_R], E_RX[rows, best_R]
    found = np.stack([k_R * np.exp(exponent_R * middle), -exponent_R, E_R], axis=1)
    found[~np.isfinite(cost_RX[rows, best_R])] = np.nan
    return found


def _given(exponent_RX: np.ndarray, x_N: np.ndarray, loss_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, k at the middle of log C, and the cost [R, X]: the least squares of (E + k exp(-exponent x)) / loss - 1."""
    one_RXN = 1 / loss_RN[:, None, :]
    fall_RXN = np.exp(-exponent_RX[:, :, None] * x_N) * one_RXN
    aa, ab, bb = (one_RXN**2).sum(2), (one_RXN * fall_RXN).sum(2), (fall_RXN**2).sum(2)
    a, b = one_RXN.sum(2), fall_RXN.sum(2)
    determinant = aa * bb - ab**2
    E_RX, k_RX = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
    below = E_RX < 0
    E_RX, k_RX = np.where(below, 0.0, E_RX), np.where(below, b / bb, k_RX)
    cost_RX = ((E_RX[:, :, None] * one_RXN + k_RX[:, :, None] * fall_RXN - 1) ** 2).sum(2)
    return E_RX, k_RX, np.where(k_RX > 0, cost_RX, np.inf)


def at_bounds(laws_R3: np.ndarray) -> np.ndarray:
    """Of each law with a floor [R] whether its exponent went as far as it is looked for, so that it says nothing."""
    return np.asarray(np.isclose(-laws_R3[:, 1, None], _EXPONENTS, rtol=1e-3).any(axis=1))


def law(found: np.ndarray, refits_RP: np.ndarray) -> Law:
    """Of the constants (k, exponent) or (k, exponent, E), with the intervals that hold 95% of the refits'."""
    low, high = np.percentile(refits_RP, [2.5, 97.5], axis=0)
    k, exponent, *E = [Constant(float(v), float(lo), float(hi)) for v, lo, hi in zip(found, low, high, strict=True)]
    return Law(k, exponent, tuple(map(tuple, refits_RP.tolist())), E[0] if E else None)
