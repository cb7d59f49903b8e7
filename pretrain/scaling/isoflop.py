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
_OUTLIER = 5.0  # standard deviations
_LEAST_NOISE = 1e-3  # of the loss: less is no reason to doubt a trial


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
        return float(self._minima.log_best[0])

    @property
    def least(self) -> float:
        """The parabola's least loss between the smallest and the largest size tried."""
        return float(self._minima.least[0])

    @property
    def inside(self) -> bool:
        """Whether the minimum lies between the smallest and the largest size tried."""
        return self.edge == 0

    @property
    def edge(self) -> int:
        """-1, 1 where the parabola is least at the smallest, the largest size tried; else 0."""
        return int(self._minima.edge[0])

    @property
    def near(self) -> bool:
        """Whether there is a minimum no further out than the sizes tried are wide, and a loss there."""
        return bool(self._minima.near[0])

    @cached_property
    def _minima(self) -> Minima:
        return minima(self, self.curve[None])

    @cached_property
    def to_curve(self) -> np.ndarray:
        """The least squares themselves [3, n]: times losses, the curve."""
        return np.asarray(np.linalg.pinv(np.vander(self.log_size_n - self.middle, 3)))

    @cached_property
    def untouched(self) -> np.ndarray:
        """Of each trial [n] the part of its residual that the parabola has not followed."""
        powers = np.vander(self.log_size_n - self.middle, 3)
        return np.asarray(np.maximum(1 - np.einsum("ij,ji->i", powers, self.to_curve), 1e-3))

    @cached_property
    def deviations(self) -> np.ndarray:
        """Residuals [n] as parts of the budget's loss, each as large as its noise would be: those of trials at the
        ends, which a parabola follows most, are small."""
        return np.asarray((self.loss_n - self.fitted()) / np.median(self.loss_n) / np.sqrt(self.untouched))

    def fitted(self) -> np.ndarray:
        """The parabola at the trials [n]."""
        return np.asarray(np.polyval(self.curve, self.log_size_n - self.middle))


@dataclass(frozen=True)
class Minima:
    """Of parabolas through the same sizes, each [draws]."""

    log_best: np.ndarray  # nan where a parabola has no minimum
    least: np.ndarray  # as Profile.least
    near: np.ndarray  # as Profile.near
    edge: np.ndarray  # -1, 1 where it is least at the smallest, the largest size tried, else 0


def profile(group: Sequence[Trial]) -> Profile | None:
    """Of the trials of a budget; None for fewer than LEAST_TRIALS, or fewer than three sizes."""
    if len(group) < LEAST_TRIALS or len({trial.size for trial in group}) < 3:
        return None
    sizes = np.log([trial.size for trial in group])
    losses = np.array([trial.loss for trial in group])
    middle = float(sizes.mean())
    compute = float(np.exp(np.mean(np.log([trial.compute for trial in group]))))
    return Profile(compute, sizes, losses, np.polyfit(sizes - middle, losses, 2), middle)


def minima(found: Profile, curves: np.ndarray) -> Minima:
    """Of `curves` [draws, 3] over the sizes of `found`."""
    a, b, c = curves.T
    opens = np.where(a > 0, a, np.nan)
    log_best, bottom = found.middle - b / (2 * opens), c - b**2 / (4 * opens)
    low, high = found.log_size_n.min(), found.log_size_n.max()
    near = (2 * low - high <= log_best) & (log_best <= 2 * high - low) & (bottom > 0)  # False for nan
    inside = (low <= log_best) & (log_best <= high)
    ends = np.vander([low - found.middle, high - found.middle], 3) @ curves.T
    edge = np.where(inside, 0, np.where(ends[0] <= ends[1], -1, 1))
    return Minima(log_best, np.where(inside, bottom, ends.min(axis=0)), near, edge)


def resample(found: Profile, rng: np.random.Generator, draws: int) -> Minima:
    """Of the same trials with other noise: each residual, as large as it would be without the fit having followed it,
    with a random sign (the wild bootstrap of Liu 1988, HC3 of MacKinnon and White 1985)."""
    residual_n = (found.loss_n - found.fitted()) / found.untouched
    signs = rng.choice([-1.0, 1.0], (draws, len(residual_n)))
    return minima(found, (found.fitted() + residual_n * signs) @ found.to_curve.T)


def without_outliers(groups: Sequence[Sequence[Trial]]) -> tuple[list[list[Trial]], list[list[Trial]], dict[str, str]]:
    """(the groups without outliers, the outliers of each, name -> what is wrong with it).

    An outlier is _OUTLIER standard deviations from the parabola through the rest of its budget, by the noise of all
    budgets and by that of its own rest: one that is noisier than others has none. Within a budget the largest deviation
    is the outlier's own, however far it has drawn the parabola; so one is taken at a time. (Weights that fall with the
    residual, as Huber's, do not help here: among five to eight trials one at an end draws the parabola to itself.)
    """
    profiles = [found for group in groups if (found := profile(group)) is not None]
    seen = np.abs(np.concatenate([found.deviations for found in profiles])) if profiles else np.zeros(1)
    noise = max(_LEAST_NOISE, 1.4826 * float(np.median(seen)))
    kept, out, told = [], [], {}
    for group in groups:
        rest = list(group)
        out.append(list[Trial]())
        while (worst := _outlier(rest, noise)) is not None:
            index, off = worst
            trial = rest.pop(index)
            out[-1].append(trial)
            told[trial.name] = (
                f"{trial.name}: loss {trial.loss:g}, {100 * off:+.1f}% of what the parabola through the rest of its "
                "budget says: left out of it"
            )
        kept.append(rest)
    return kept, out, told


def _outlier(group: Sequence[Trial], noise: float) -> tuple[int, float] | None:
    """(index, how far off as a part of what the others say); None where there is none, or too few others to say so."""
    found = profile(group)
    if found is None or len(group) <= LEAST_TRIALS:
        return None
    worst = int(np.abs(found.deviations).argmax())
    without = profile([*group[:worst], *group[worst + 1 :]])
    if without is None:
        return None
    said = float(np.polyval(without.curve, found.log_size_n[worst] - without.middle))
    free = len(without.loss_n) - 3
    own = float(np.sqrt((((without.loss_n - without.fitted()) / np.median(without.loss_n)) ** 2).sum() / free))
    if abs(found.deviations[worst]) <= _OUTLIER * max(noise, own):
        return None
    return worst, group[worst].loss / said - 1
