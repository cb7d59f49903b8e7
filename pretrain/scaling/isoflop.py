"""IsoFLOP profiles: at each budget of compute the best size is the minimum of a parabola through loss over log size.

Hoffmann et al., arXiv 2203.15556, section 3.2; DeepSeek LLM, arXiv 2401.02954, section 3.2, whose M is FLOPs a token.
The minima then lie on power laws in C. Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perilune.pretrain.scaling.trials import Trial

LEAST_TRIALS = 4  # of a budget: a parabola has three constants
LEAST_BUDGETS = 3


@dataclass(frozen=True)
class Profile:
    """The trials of one budget, and where their parabola is least."""

    compute: float  # FLOPs: the geometric mean
    log_size_n: np.ndarray
    loss_n: np.ndarray
    curve: np.ndarray  # [3] of numpy.polyval, in log size from the middle of them
    middle: float

    @property
    def log_best(self) -> float:
        """Log of the size at the minimum; not finite where the parabola has none."""
        a, b, _ = self.curve
        return float(self.middle - b / (2 * a)) if a > 0 else float("nan")

    @property
    def least(self) -> float:
        """The loss there."""
        return float(np.polyval(self.curve, self.log_best - self.middle))

    @property
    def inside(self) -> bool:
        """Whether the minimum lies between the smallest and the largest size tried."""
        return bool(self.log_size_n.min() <= self.log_best <= self.log_size_n.max())

    @property
    def near(self) -> bool:
        """Whether there is a minimum no further out than the sizes tried are wide, and a loss there."""
        low, high = self.log_size_n.min(), self.log_size_n.max()
        return bool(2 * low - high <= self.log_best <= 2 * high - low and self.least > 0)  # False for nan

    @cached_property
    def untouched(self) -> np.ndarray:
        """Of each trial [n] the part of its residual that the parabola has not followed."""
        powers = np.vander(self.log_size_n - self.middle, 3)
        return np.asarray(np.maximum(1 - np.einsum("ij,ji->i", powers, np.linalg.pinv(powers)), 1e-3))

    def fitted(self) -> np.ndarray:
        """The parabola at the trials [n]."""
        return np.asarray(np.polyval(self.curve, self.log_size_n - self.middle))


@dataclass(frozen=True)
class PowerLaw:
    """value = k * C^exponent."""

    log_k: float
    exponent: float


def profile(group: Sequence[Trial]) -> Profile | None:
    """Of the trials of a budget; None for fewer than LEAST_TRIALS, or fewer than three sizes."""
    if len(group) < LEAST_TRIALS or len({trial.size for trial in group}) < 3:
        return None
    sizes = np.log([trial.size for trial in group])
    computes = np.log([trial.compute for trial in group])
    return parabola(float(np.exp(computes.mean())), sizes, np.array([trial.loss for trial in group]))


def parabola(compute: float, log_size_n: np.ndarray, loss_n: np.ndarray) -> Profile:
    """Least squares."""
    middle = float(log_size_n.mean())
    return Profile(compute, log_size_n, loss_n, np.polyfit(log_size_n - middle, loss_n, 2), middle)


def resample(found: Profile, rng: np.random.Generator) -> Profile:
    """The same trials with other noise: each residual, as large as it would be without the fit having followed it, with
    a random sign (the wild bootstrap of Liu 1988, HC3 of MacKinnon and White 1985)."""
    residual_n = (found.loss_n - found.fitted()) / found.untouched
    signs_n = rng.choice([-1.0, 1.0], len(residual_n))
    return parabola(found.compute, found.log_size_n, found.fitted() + residual_n * signs_n)


def power_law(compute_n: np.ndarray, value_n: np.ndarray) -> PowerLaw:
    """Least squares of the logarithms."""
    exponent, log_k = np.polyfit(np.log(compute_n), np.log(value_n), 1)
    return PowerLaw(float(log_k), float(exponent))
