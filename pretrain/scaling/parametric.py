"""L(N, D) = E + A/N^alpha + B/D^beta, fitted to trials (Hoffmann et al., arXiv 2203.15556, section 3.3).

As there: the Huber loss (delta 1e-3) of the difference between the logarithms of predicted and seen loss, from a grid
of starts. N trials, 5 constants in the order of NAMES, R fits at once: of other starts, or of other trials. Logarithms
are natural.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling.laws import NAMES

DELTA = 1e-3
LEAST_BUDGETS = 3  # of compute
LEAST_TRIALS = 8  # five constants, and some that say how well they fit

# The starts: E as a part of the least loss, each term at the middle trial as a part of its loss, alpha and beta alike.
_PART_E, _PART_TERM, _EXPONENT = (0.3, 0.6, 0.9), (0.05, 0.3), (0.15, 0.4, 0.8)
_MOST_EXPONENT = 5.0
_TRIED = 12  # starts that are followed
_LOW, _HIGH = np.array([-40.0, -40.0, -40.0, 0.0, 0.0]), np.array([20.0, 20.0, 20.0, _MOST_EXPONENT, _MOST_EXPONENT])
_STEPS, _LONGEST = 300, 3.0  # the most, and how far one goes in each variable
_LEAST_GAIN, _CALM = 1e-7, 8  # done: so many steps in a row with so little gain
_CURVED = 0.3  # of a residual beyond delta: between Newton's 0 and the 1 of reweighted squares, which is slow


def loss(theta: np.ndarray, sizes_N: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """L(N, D) [N] of constants [5]."""
    E, A, B, alpha, beta = theta
    found: np.ndarray = E + A / sizes_N**alpha + B / tokens_N**beta
    return found


def fit(sizes_N: np.ndarray, tokens_N: np.ndarray, losses_N: np.ndarray) -> np.ndarray:
    """The constants [5]. Raises InputError where there are fewer than LEAST_TRIALS different trials."""
    trials = len({*zip(sizes_N.tolist(), tokens_N.tolist(), strict=True)})
    if trials < LEAST_TRIALS or min(len(set(sizes_N.tolist())), len(set(tokens_N.tolist()))) < 3:
        raise InputError(
            f"E + A/N^alpha + B/D^beta has five constants: it needs {LEAST_TRIALS} trials or more, of three sizes and "
            f"three numbers of tokens at least; these are {trials} of {len(set(sizes_N.tolist()))} sizes and "
            f"{len(set(tokens_N.tolist()))} numbers of tokens"
        )
    problem = _Problem(sizes_N, tokens_N, losses_N)
    # Where each start stands tells most of the bad ones apart; the best of them go down to their minima.
    starts = problem.starts()
    found = problem.solve(starts[problem.cost(starts).argsort(kind="stable")[:_TRIED]])
    return problem.constants(found[problem.cost(found).argmin()][None])[0]


def refit(
    theta: np.ndarray, sizes_N: np.ndarray, tokens_N: np.ndarray, losses_N: np.ndarray, drawn_RN: np.ndarray
) -> np.ndarray:
    """The constants [R, 5] of trials drawn from those that `theta` was fitted to, by index: from there alone."""
    problem = _Problem(sizes_N, tokens_N, losses_N, drawn_RN)
    start = np.array([*np.log(np.maximum(theta[:3], 1e-300)), *theta[3:]])
    return problem.constants(problem.solve(np.tile(problem.centred(start), (len(drawn_RN), 1))))


def at_bounds(theta_R5: np.ndarray) -> dict[str, np.ndarray]:
    """Of each constant [R]: whether it went as far as a fit lets it, so that its value says nothing."""
    alpha, beta = (np.isclose(theta_R5[:, i, None], [0.0, _MOST_EXPONENT], atol=1e-3).any(axis=1) for i in (3, 4))
    return dict(zip(NAMES, (theta_R5[:, 0] < 1e-6, alpha, beta, alpha, beta), strict=True))


class _Problem:
    """In the variables (log E, log of each term at the trials' geometric middle, alpha, beta), which hardly depend on
    each other, where A and alpha do wholly. Every x is [R, 5]."""

    def __init__(
        self, sizes_N: np.ndarray, tokens_N: np.ndarray, losses_N: np.ndarray, drawn_RN: np.ndarray | None = None
    ) -> None:
        """Of all trials, or of those that each fit has drawn."""
        drawn = np.arange(len(sizes_N))[None] if drawn_RN is None else drawn_RN
        self._middle = np.log(sizes_N).mean(), np.log(tokens_N).mean()
        self._size_RN = (np.log(sizes_N) - self._middle[0])[drawn]
        self._tokens_RN = (np.log(tokens_N) - self._middle[1])[drawn]
        self._loss_RN = np.log(losses_N)[drawn]

    def centred(self, x: np.ndarray) -> np.ndarray:
        """(log E, log A, log B, alpha, beta) in the problem's variables [5]."""
        e, a, b, alpha, beta = x
        return np.array([e, a - alpha * self._middle[0], b - beta * self._middle[1], alpha, beta])

    def starts(self) -> np.ndarray:
        """Points to go down from."""
        least, middle = self._loss_RN.min(), float(np.median(self._loss_RN))
        starts = np.array([*product(_PART_E, _PART_TERM, _PART_TERM, _EXPONENT, _EXPONENT)])
        starts[:, :3] = np.log(starts[:, :3]) + [least, middle, middle]
        return starts

    def constants(self, x_R5: np.ndarray) -> np.ndarray:
        """E, A, B, alpha, beta of each [R, 5]."""
        e, a, b, alpha, beta = x_R5.T
        logs = np.stack([e, a + alpha * self._middle[0], b + beta * self._middle[1]])
        return np.vstack([np.exp(logs), alpha, beta]).T

    def _terms(self, x_R5: np.ndarray) -> np.ndarray:
        """Logarithms of E and the two other terms [3, R, N]."""
        e, a, b, alpha, beta = x_R5.T[:, :, None]
        size, tokens = a - alpha * self._size_RN, b - beta * self._tokens_RN
        return np.stack([np.broadcast_to(e, size.shape), size, tokens])

    def _off(self, x_R5: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log of predicted over seen loss [R, N], each term's part of the predicted [3, R, N])."""
        terms = self._terms(x_R5)
        most = terms.max(axis=0)
        parts = np.exp(terms - most)
        whole = parts.sum(axis=0)
        return np.log(whole) + most - self._loss_RN, parts / whole

    def cost(self, x_R5: np.ndarray) -> np.ndarray:
        """Sum of the Huber losses, over delta squared [R]."""
        return _huber(self._off(x_R5)[0])

    def solve(self, x_R5: np.ndarray) -> np.ndarray:
        """The minimum that lies below each x (Levenberg and Marquardt's steps, held within the bounds)."""
        x, damping = np.clip(x_R5, _LOW, _HIGH), np.full(len(x_R5), 1e-2)
        off, parts = self._off(x)
        cost, calm = _huber(off), np.zeros(len(x), int)
        for _ in range(_STEPS):
            tried = np.clip(x + self._step(x, off, parts, damping), _LOW, _HIGH)
            off_there, parts_there = self._off(tried)
            there = _huber(off_there)
            better = there < cost
            gain = np.where(better, cost - there, 0.0)
            calm = np.where(gain > _LEAST_GAIN * cost, 0, calm + 1)
            x[better], cost[better] = tried[better], there[better]
            off[better], parts[:, better] = off_there[better], parts_there[:, better]
            damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-9, 1e9)
            if (calm >= _CALM).all():
                break
        return x

    def _step(self, x_R5: np.ndarray, off_RN: np.ndarray, parts: np.ndarray, damping_R: np.ndarray) -> np.ndarray:
        """From x, where residuals and parts of the loss are these."""
        slope = np.stack([*parts, -parts[1] * self._size_RN, -parts[2] * self._tokens_RN], axis=2)  # [R, N, 5]
        z_RN = np.abs(off_RN) / DELTA
        weight_RN = 1 / np.maximum(z_RN, 1)
        curvature_RN = np.where(z_RN <= 1, 1.0, _CURVED * weight_RN)
        gradient = ((weight_RN * off_RN)[:, None, :] @ slope)[:, 0]
        normal = (slope * curvature_RN[:, :, None]).transpose(0, 2, 1) @ slope
        held = ((x_R5 <= _LOW) & (gradient > 0)) | ((x_R5 >= _HIGH) & (gradient < 0))
        gradient[held] = 0
        normal[held[:, :, None] | held[:, None, :]] = 0
        diagonal = np.einsum("rpp->rp", normal)  # a view
        diagonal *= 1 + damping_R[:, None]
        diagonal += 1e-12 + held
        return np.clip(-np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], -_LONGEST, _LONGEST)


def _huber(off_RN: np.ndarray) -> np.ndarray:
    z = np.abs(off_RN) / DELTA
    return np.asarray(np.where(z <= 1, z**2 / 2, z - 0.5).sum(axis=1))
