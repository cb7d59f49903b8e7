"""Every law that a set of trials supports, each constant with its interval: what `fit.json` holds.

Intervals are the 2.5th and 97.5th percentiles of refits: of trials drawn with replacement (parametric law, learning
rate and batch size), of profiles with resampled noise (the power laws of their minima).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling import isoflop, parametric
from perilune.pretrain.scaling.isoflop import PowerLaw, Profile, power_law
from perilune.pretrain.scaling.trials import Trial, Trials, budgets, tuned

NEAR = 0.0025  # near-optimal: within so much of a budget's least loss (arXiv 2401.02954, section 3.1)
_OUTLIER = 5.0  # of the median residual's deviations
_DRAWS = 400

Progress = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True)
class Constant:
    """A constant with its 95% interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Law:
    """value = k * C^exponent."""

    k: Constant
    exponent: Constant

    def __call__(self, compute: float) -> float:
        return float(self.k.value * compute**self.exponent.value)

    def to_dict(self) -> dict[str, Any]:
        return {"k": self.k.to_dict(), "exponent": self.exponent.to_dict()}


@dataclass(frozen=True)
class Best:
    """A budget's profile and its minimum."""

    profile: Profile
    size: Constant


@dataclass(frozen=True)
class Fit:
    """What was found; a law that the trials do not support is None or lacks, and `warnings` says why."""

    trials: tuple[Trial, ...]
    per: str  # params or flops_per_token
    bests: tuple[Best, ...]
    parametric: dict[str, Constant]
    laws: dict[str, Law]  # m_opt, d_opt, loss, lr_opt, batch_opt
    warnings: tuple[str, ...]
    outliers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "trials": len(self.trials),
            "per": self.per,
            "compute": {"least": min(t.compute for t in self.trials), "most": max(t.compute for t in self.trials)},
            "budgets": [
                {
                    "compute": best.profile.compute,
                    "size": best.size.to_dict(),
                    "loss": best.profile.least,
                    "inside": best.profile.inside,
                }
                for best in self.bests
            ],
            "parametric": {name: constant.to_dict() for name, constant in self.parametric.items()},
            **{name: law.to_dict() for name, law in self.laws.items()},
            "warnings": list(self.warnings),
            "outliers": list(self.outliers),
        }


def fit(trials: Trials, *, seed: int = 0, draws: int = _DRAWS, progress: Progress = lambda done, of: None) -> Fit:
    """All laws of `trials`. Raises InputError where they support none."""
    rng = np.random.default_rng(seed)
    best = tuned(trials.all)
    warnings, laws = list(trials.warnings), dict[str, Law]()
    constants, outliers = dict[str, Constant](), list[str]()
    refusals = []
    try:
        constants, outliers = _parametric(best, rng, draws, progress)
    except InputError as error:
        refusals.append(str(error))
    bests: list[Best] = []
    try:
        bests, found, told = _isoflop(budgets(best), trials.all[0].per if trials.all else "", rng, draws)
        laws |= found
        warnings += told
    except InputError as error:
        refusals.append(str(error))
    if not constants and not laws:
        raise InputError("; and ".join(refusals))
    warnings += refusals
    for name, of in (("lr_opt", _lr), ("batch_opt", _batch)):
        law, told = _near_optimal(budgets(trials.all), name, of, rng, draws)
        warnings += told
        if law is not None:
            laws[name] = law
    return Fit(trials.all, trials.all[0].per, tuple(bests), constants, laws, tuple(warnings), tuple(outliers))


def _parametric(
    trials: Sequence[Trial], rng: np.random.Generator, draws: int, progress: Progress
) -> tuple[dict[str, Constant], list[str]]:
    sizes = np.array([trial.size for trial in trials])
    tokens = np.array([trial.tokens for trial in trials])
    losses = np.array([trial.loss for trial in trials])
    theta = parametric.fit(sizes, tokens, losses)
    refits = []
    for number in range(draws):
        drawn = rng.integers(0, len(trials), len(trials))
        refits.append(parametric.refit(theta, sizes[drawn], tokens[drawn], losses[drawn]))
        progress(number + 1, draws)
    low, high = np.percentile(refits, [2.5, 97.5], axis=0)
    off = np.log(losses) - np.log(parametric.loss(theta, sizes, tokens))
    spread = 1.4826 * float(np.median(np.abs(off - np.median(off))))
    outliers = [
        f"{trial.name}: loss {trial.loss:g}, {100 * (np.exp(o) - 1):+.1f}% of what the law says"
        for trial, o in zip(trials, off, strict=True)
        if abs(o - np.median(off)) > _OUTLIER * max(spread, parametric.DELTA)
    ]
    found = zip(parametric.NAMES, theta, low, high, strict=True)
    return {name: Constant(float(v), float(lo), float(hi)) for name, v, lo, hi in found}, outliers


def _isoflop(
    groups: Sequence[Sequence[Trial]], per: str, rng: np.random.Generator, draws: int
) -> tuple[list[Best], dict[str, Law], list[str]]:
    warnings, bests, usable = [], [], []
    for group in groups:
        profile = isoflop.profile(group)
        where = f"budget {group[0].compute:.3g}"
        if profile is None:
            warnings.append(
                f"{where}: {len(group)} trials of {len({t.size for t in group})} sizes are too few for a parabola "
                f"({isoflop.LEAST_TRIALS} of 3)"
            )
            continue
        drawn = np.array([isoflop.resample(profile, rng).log_best for _ in range(draws)])
        low, high = np.exp(np.nanpercentile(drawn, [2.5, 97.5])) if np.isfinite(drawn).any() else (np.nan, np.nan)
        if not np.isfinite(profile.log_best):
            warnings.append(f"{where}: loss does not rise on both sides of any size: its parabola has no minimum")
            continue
        bests.append(Best(profile, Constant(float(np.exp(profile.log_best)), float(low), float(high))))
        if profile.inside:
            usable.append((profile, drawn))
        else:
            side = "largest" if profile.log_best > profile.log_size_n.max() else "smallest"
            warnings.append(f"{where}: the optimum lies beyond the {side} size tried: not used for the power laws")
    if len(usable) < isoflop.LEAST_BUDGETS:
        raise InputError(
            f"power laws of the best size need {isoflop.LEAST_BUDGETS} budgets of compute, each with "
            f"{isoflop.LEAST_TRIALS} trials or more on both sides of its optimum; there are {len(usable)}"
        )
    computes = np.array([profile.compute for profile, _ in usable])
    size = power_law(computes, np.exp([profile.log_best for profile, _ in usable]))
    loss = power_law(computes, np.array([profile.least for profile, _ in usable]))
    sizes, losses = [], []
    for _ in range(draws):
        again = [isoflop.resample(profile, rng) for profile, _ in usable]
        if all(np.isfinite(profile.log_best) for profile in again):
            sizes.append(power_law(computes, np.exp([profile.log_best for profile in again])))
            losses.append(power_law(computes, np.array([profile.least for profile in again])))
    times = 6.0 if per == "params" else 1.0  # C = times * size * tokens
    tokens, all_tokens = _rest(size, times), [_rest(law, times) for law in sizes]
    laws = {"m_opt": _law(size, sizes), "d_opt": _law(tokens, all_tokens), "loss": _law(loss, losses)}
    return bests, laws, warnings


def _rest(size: PowerLaw, times: float) -> PowerLaw:
    """Tokens, where C = times * size * tokens."""
    return PowerLaw(-size.log_k - float(np.log(times)), 1 - size.exponent)


def _law(found: PowerLaw, refits: Sequence[PowerLaw]) -> Law:
    ks, exponents = np.exp([law.log_k for law in refits]), np.array([law.exponent for law in refits])
    k, e = np.percentile(ks, [2.5, 97.5]), np.percentile(exponents, [2.5, 97.5])
    return Law(
        Constant(float(np.exp(found.log_k)), float(k[0]), float(k[1])),
        Constant(found.exponent, float(e[0]), float(e[1])),
    )


def _lr(trial: Trial) -> float | None:
    return trial.lr


def _batch(trial: Trial) -> float | None:
    return trial.batch_tokens


def _near_optimal(
    groups: Sequence[Sequence[Trial]],
    name: str,
    of: Callable[[Trial], float | None],
    rng: np.random.Generator,
    draws: int,
) -> tuple[Law | None, list[str]]:
    """The power law through the settings of trials within NEAR of their budget's least loss, and warnings; None where
    fewer than LEAST_BUDGETS budgets tried three settings or more."""
    near: list[tuple[float, np.ndarray]] = []
    warnings = []
    for group in groups:
        tried = [trial for trial in group if of(trial) is not None]
        settings = sorted({float(of(trial) or 0) for trial in tried})
        if len(settings) < 3:
            continue
        least = min(trial.loss for trial in tried)
        good = [trial for trial in tried if trial.loss <= least * (1 + NEAR)]
        values = np.array([float(of(trial) or 0) for trial in good])
        if values.min() == settings[0] or values.max() == settings[-1]:
            warnings.append(
                f"{name}: at budget {group[0].compute:.3g} the near-optimal values reach the edge of those tried "
                f"({settings[0]:g} to {settings[-1]:g}); try beyond it"
            )
        near.append((float(np.mean([trial.compute for trial in good])), values))
    if len(near) < isoflop.LEAST_BUDGETS:
        return None, warnings

    def through(parts: Sequence[np.ndarray]) -> PowerLaw:
        computes = np.concatenate([np.full(len(v), c) for (c, _), v in zip(near, parts, strict=True)])
        return power_law(computes, np.concatenate(parts))

    refits = [through([rng.choice(values, len(values)) for _, values in near]) for _ in range(draws)]
    return _law(through([values for _, values in near]), refits), warnings
