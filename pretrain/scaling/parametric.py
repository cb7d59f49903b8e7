"""L(N, D) = E + A/N^alpha + B/D^beta, fitted to trials (Hoffmann et al., arXiv 2203.15556, section 3.3).

As there: the Huber loss (delta 1e-3) of the difference between the logarithms of predicted and seen loss, from a grid
of starts. n trials, 5 constants in the order of NAMES; logarithms are natural.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import least_squares

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling.laws import NAMES

DELTA = 1e-3
LEAST_BUDGETS = 3  # of compute
LEAST_TRIALS = 8  # five constants, and some that say how well they fit

# The starts: E as a part of the least loss, each term at the middle trial as a part of its loss, alpha and beta alike.
_PART_E, _PART_TERM, _EXPONENT = (0.3, 0.6, 0.9), (0.05, 0.3), (0.15, 0.4, 0.8)
_MOST_EXPONENT = 5.0
_TRIED = 12  # starts that are followed


def loss(theta: np.ndarray, sizes_n: np.ndarray, tokens_n: np.ndarray) -> np.ndarray:
    """L(N, D) [n] of constants [5]."""
    E, A, B, alpha, beta = theta
    found: np.ndarray = E + A / sizes_n**alpha + B / tokens_n**beta
    return found


def fit(sizes_n: np.ndarray, tokens_n: np.ndarray, losses_n: np.ndarray) -> np.ndarray:
    """The constants [5]. Raises InputError where there are fewer than LEAST_TRIALS different trials."""
    trials = len({*zip(sizes_n.tolist(), tokens_n.tolist(), strict=True)})
    if trials < LEAST_TRIALS or min(len(set(sizes_n.tolist())), len(set(tokens_n.tolist()))) < 3:
        raise InputError(
            f"E + A/N^alpha + B/D^beta has five constants: it needs {LEAST_TRIALS} trials or more, of three sizes and "
            f"three numbers of tokens at least; these are {trials} of {len(set(sizes_n.tolist()))} sizes and "
            f"{len(set(tokens_n.tolist()))} numbers of tokens"
        )
    problem = _Problem(sizes_n, tokens_n, losses_n)
    # Where each start stands tells most of the bad ones apart; the best of them go down to their minima.
    starts = sorted(problem.starts(), key=problem.cost)
    found = [problem.solve(start) for start in starts[:_TRIED]]
    return problem.constants(min(found, key=problem.cost))


def refit(theta: np.ndarray, sizes_n: np.ndarray, tokens_n: np.ndarray, losses_n: np.ndarray) -> np.ndarray:
    """The constants [5] of trials much like those that `theta` was fitted to: from there alone."""
    problem = _Problem(sizes_n, tokens_n, losses_n)
    E, A, B, alpha, beta = theta
    logs = np.log(np.maximum([E, A, B], 1e-300))
    return problem.constants(problem.solve(problem.centred(np.array([*logs, alpha, beta])), 1e-6))


def at_bounds(theta: np.ndarray) -> dict[str, bool]:
    """Of each constant: whether it went as far as a fit lets it, so that its value says nothing."""
    E, _, _, alpha, beta = theta
    ends = (0.0, _MOST_EXPONENT)
    vague = [bool(np.isclose(value, ends, atol=1e-3).any()) for value in (alpha, beta)]
    return dict(zip(NAMES, (bool(E < 1e-6), vague[0], vague[1], *vague), strict=True))


class _Problem:
    """In the variables (log E, log of each term at the trials' geometric middle, alpha, beta), which hardly depend on
    each other, where A and alpha do wholly."""

    def __init__(self, sizes_n: np.ndarray, tokens_n: np.ndarray, losses_n: np.ndarray) -> None:
        self._middle = np.log(sizes_n).mean(), np.log(tokens_n).mean()
        self._size_n, self._tokens_n = np.log(sizes_n) - self._middle[0], np.log(tokens_n) - self._middle[1]
        self._loss_n = np.log(losses_n)

    def centred(self, x: np.ndarray) -> np.ndarray:
        """(log E, log A, log B, alpha, beta) in the problem's variables."""
        e, a, b, alpha, beta = x
        return np.array([e, a - alpha * self._middle[0], b - beta * self._middle[1], alpha, beta])

    def starts(self) -> list[np.ndarray]:
        """Points to go down from."""
        least, middle = self._loss_n.min(), float(np.median(self._loss_n))
        return [
            np.array([least + np.log(e), middle + np.log(a), middle + np.log(b), alpha, beta])
            for e, a, b, alpha, beta in product(_PART_E, _PART_TERM, _PART_TERM, _EXPONENT, _EXPONENT)
        ]

    def constants(self, x: np.ndarray) -> np.ndarray:
        """E, A, B, alpha, beta."""
        e, a, b, alpha, beta = x
        return np.array([*np.exp([e, a + alpha * self._middle[0], b + beta * self._middle[1]]), alpha, beta])

    def _terms(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the greatest term [n]; the terms over it [3, n]. scipy's logsumexp takes several times as long
        for so few trials, and a fit is little else."""
        found = np.empty((3, len(self._loss_n)))
        found[0], found[1], found[2] = x[0], x[1] - x[3] * self._size_n, x[2] - x[4] * self._tokens_n
        most_n = found.max(axis=0)
        return most_n, np.exp(found - most_n)

    def _off(self, x: np.ndarray) -> np.ndarray:
        most_n, terms = self._terms(x)
        return np.asarray(np.log(terms.sum(axis=0)) + most_n - self._loss_n)

    def _slope(self, x: np.ndarray) -> np.ndarray:
        _, terms = self._terms(x)
        parts = terms / terms.sum(axis=0)
        return np.stack([*parts, -parts[1] * self._size_n, -parts[2] * self._tokens_n], axis=1)

    def cost(self, x: np.ndarray) -> float:
        """Sum of the Huber losses, over delta squared."""
        z = (self._off(x) / DELTA) ** 2
        return float(np.where(z <= 1, z, 2 * np.sqrt(z) - 1).sum() / 2)

    def solve(self, x: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
        """The minimum that lies below `x`."""
        low, high = (
            np.array([-40.0, -40.0, -40.0, 0.0, 0.0]),
            np.array([20.0, 20.0, 20.0, _MOST_EXPONENT, _MOST_EXPONENT]),
        )
        x = np.clip(x, low + 1e-6, high - 1e-6)
        done = least_squares(
            self._off, x, self._slope, bounds=(low, high), loss="huber", f_scale=DELTA, xtol=tolerance, ftol=tolerance,
            gtol=1e-12, max_nfev=200,
        )  # fmt: skip
        return np.asarray(done.x)
