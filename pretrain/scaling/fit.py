"""Every law that a set of trials supports, each constant with its interval: what `fit.json` holds.

Intervals are the 2.5th and 97.5th percentiles of refits: of trials drawn with replacement (parametric law, learning
rate and batch size), of profiles with resampled noise (the power laws of their minima).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling import isoflop, parametric
from perilune.pretrain.scaling.isoflop import PowerLaw, Profile, power_law
from perilune.pretrain.scaling.laws import Constant, Law
from perilune.pretrain.scaling.trials import Trial, Trials, budgets, tuned

NEAR = 0.0025  # near-optimal: within so much of a budget's least loss (arXiv 2401.02954, section 3.1)
_OUTLIER = 5.0  # of the median residual's deviations
_SURE = 0.95  # of the refits of a budget must have a minimum near the sizes tried
_DRAWS = 400

Progress = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True)
class Best:
    """A budget's profile and its minimum."""

    profile: Profile
    size: Constant


@dataclass(frozen=True)
class Fit:
    """What was found; a law that the trials do not support lacks, and `warnings` says why."""

    trials: tuple[Trial, ...]
    per: str  # params or flops_per_token
    bests: tuple[Best, ...]
    parametric: dict[str, Constant]
    laws: dict[str, Law]  # m_opt, d_opt, loss, lr_opt, batch_opt
    warnings: tuple[str, ...]
    outliers: tuple[str, ...]
    refits: np.ndarray  # of the parametric law [draws, 5]

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
            # What belongs together, for intervals of what a law says: all to as many digits as they are good for.
            "draws": {
                **({"parametric": _short(self.refits)} if self.parametric else {}),
                **{name: _short(law.draws) for name, law in self.laws.items()},
            },
        }


def _short(rows: Iterable[Sequence[float]]) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in rows]


def fit(trials: Trials, *, seed: int = 0, draws: int = _DRAWS, progress: Progress = lambda done, of: None) -> Fit:
    """All laws of `trials`. Raises InputError where they support none."""
    if not trials.all:
        raise InputError("no trials to fit: " + ("; ".join(trials.warnings) or "the files have none"))
    rng = np.random.default_rng(seed)
    best = tuned(trials.all)
    warnings = list(trials.warnings)
    constants, outliers, refits = dict[str, Constant](), list[str](), np.zeros((0, 5))
    try:
        constants, outliers, told, refits = _parametric(best, rng, draws, progress)
        warnings += told
    except InputError as error:
        warnings.append(str(error))
    bests, laws, told = _isoflop(budgets(best), trials.all[0].per, rng, draws)
    warnings += told
    for name, of in (("lr_opt", _lr), ("batch_opt", _batch)):
        law, told = _near_optimal(budgets(trials.all), name, of, rng, draws)
        warnings += told
        if law is not None:
            laws[name] = law
    if not constants and not laws:
        raise InputError("; ".join(warnings))
    return Fit(trials.all, trials.all[0].per, tuple(bests), constants, laws, tuple(warnings), tuple(outliers), refits)


def _parametric(
    trials: Sequence[Trial], rng: np.random.Generator, draws: int, progress: Progress
) -> tuple[dict[str, Constant], list[str], list[str], np.ndarray]:
    """(constants, outliers, warnings, constants of refits [draws, 5]).

    Raises InputError where `trials` do not determine them.
    """
    if len(groups := budgets(trials)) < parametric.LEAST_BUDGETS:
        raise InputError(
            f"E + A/N^alpha + B/D^beta needs trials of {parametric.LEAST_BUDGETS} budgets of compute or more, not of "
            f"{len(groups)}: within one, tokens follow from the size"
        )
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
    constants = {name: Constant(float(v), float(lo), float(hi)) for name, v, lo, hi in found}
    bounds = [parametric.at_bounds(again) for again in refits]
    vague = [
        name
        for name, value in parametric.at_bounds(theta).items()
        if value or sum(bool(bound[name]) for bound in bounds) > (1 - _SURE) / 2 * draws
    ]
    told = f"{' and '.join(vague)} cannot be told from these trials: the value, or an end of the interval, is a bound"
    return constants, outliers, [told] if vague else [], np.array(refits)


def _isoflop(
    groups: Sequence[Sequence[Trial]], per: str, rng: np.random.Generator, draws: int
) -> tuple[list[Best], dict[str, Law], list[str]]:
    """(each budget's best size, laws, warnings); no laws where fewer than LEAST_BUDGETS have theirs inside."""
    warnings: list[str] = []
    bests: list[Best] = []
    usable: list[Profile] = []
    few = 0
    for group in groups:
        profile = isoflop.profile(group)
        where = f"budget {group[0].compute:.3g}"
        if profile is None:
            few += 1
            continue
        sure = [again.log_best for again in (isoflop.resample(profile, rng) for _ in range(draws)) if again.near]
        if not profile.near or len(sure) < _SURE * draws:
            warnings.append(
                f"{where}: no minimum near the sizes tried can be told from noise ({len(sure)} of {draws} refits have "
                "one): left out"
            )
            continue
        low, high = np.exp(np.percentile(sure, [2.5, 97.5]))
        bests.append(Best(profile, Constant(float(np.exp(profile.log_best)), float(low), float(high))))
        if profile.inside:
            usable.append(profile)
        else:
            side = "largest" if profile.log_best > profile.log_size_n.max() else "smallest"
            warnings.append(f"{where}: the optimum lies beyond the {side} size tried: not used for the power laws")
    if few:
        warnings.append(
            f"{few} budgets have fewer than {isoflop.LEAST_TRIALS} trials of three sizes, too few for a parabola"
        )
    if len(usable) < isoflop.LEAST_BUDGETS:
        need = (
            f"power laws of the best size need {isoflop.LEAST_BUDGETS} budgets of compute, each with "
            f"{isoflop.LEAST_TRIALS} trials or more on both sides of its optimum; there are {len(usable)}"
        )
        return bests, {}, [*warnings, need]
    computes = np.array([profile.compute for profile in usable])
    size = power_law(computes, np.exp([profile.log_best for profile in usable]))
    loss = power_law(computes, np.array([profile.least for profile in usable]))
    sizes, losses = [], []
    for _ in range(draws):
        again = [isoflop.resample(profile, rng) for profile in usable]
        if all(profile.near for profile in again):
            sizes.append(power_law(computes, np.exp([profile.log_best for profile in again])))
            losses.append(power_law(computes, np.array([profile.least for profile in again])))
    if len(sizes) < _SURE ** len(usable) * draws:
        return bests, {}, [*warnings, "noise hides the budgets' minima: no power law of the best size"]
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
        tuple(zip(ks.tolist(), exponents.tolist(), strict=True)),
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
    fewer than LEAST_BUDGETS budgets tried three settings or more at one size.

    What is best is known no better than the steps of the grid: refits move each value by up to half of one.
    """
    near: list[tuple[float, np.ndarray, float]] = []  # compute, settings, a step of the grid's logarithms
    warnings = []
    for group in groups:
        shapes: dict[float, set[float]] = {}  # size -> settings: a rule of lr by size is no grid
        for trial in group:
            if (value := of(trial)) is not None:
                shapes.setdefault(trial.size, set()).add(value)
        tried = [trial for trial in group if of(trial) is not None and len(shapes[trial.size]) >= 3]
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
        step = float(np.median(np.diff(np.log(settings))))
        near.append((float(np.mean([trial.compute for trial in good])), values, step))
    if len(near) < isoflop.LEAST_BUDGETS:
        return None, warnings

    def through(parts: Sequence[np.ndarray]) -> PowerLaw:
        computes = np.concatenate([np.full(len(v), c) for (c, _, _), v in zip(near, parts, strict=True)])
        return power_law(computes, np.concatenate(parts))

    def moved(values: np.ndarray, step: float) -> np.ndarray:
        drawn = rng.choice(values, len(values))
        return np.asarray(drawn * np.exp(step * rng.uniform(-0.5, 0.5, len(drawn))))

    refits = [through([moved(values, step) for _, values, step in near]) for _ in range(draws)]
    return _law(through([values for _, values, _ in near]), refits), warnings
