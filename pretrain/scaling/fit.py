"""Every law that a set of trials supports, each constant with its interval: what `fit.json` holds.

Intervals are the 2.5th and 97.5th percentiles of refits: of trials drawn with replacement (parametric law, learning
rate and batch size), of profiles with resampled noise (the power laws of their minima).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling import isoflop, parametric, power, settings
from perilune.pretrain.scaling.isoflop import Minima, Profile
from perilune.pretrain.scaling.laws import Constant, Law, ends
from perilune.pretrain.scaling.settings import NEAR, Grid
from perilune.pretrain.scaling.trials import Trial, Trials, budgets, passed_over, tuned

FLOOR_BUDGETS = 4  # E + k C^exponent has three constants
_OUTLIER = 5.0  # of the median residual's deviations
_SURE = 0.95  # of refits have what is told
_DRAWS = 400


@dataclass(frozen=True)
class Budget:
    """Trials of about equal compute, and what their profile says."""

    trials: tuple[Trial, ...]  # of the profile
    outliers: tuple[Trial, ...]
    profile: Profile | None
    refits: Minima | None = field(repr=False)
    size: Constant | None  # the best; None where it cannot be told from noise
    left_out: dict[str, str]  # of m_opt (and d_opt) and of loss: why

    @property
    def compute(self) -> float:
        """FLOPs: the geometric mean."""
        return float(np.exp(np.mean(np.log([trial.compute for trial in self.trials]))))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "compute": self.compute,
            "trials": len(self.trials),
            "size": None if self.size is None else self.size.to_dict(),
            "loss": None if self.profile is None else self.profile.least,
            "inside": self.profile is not None and self.profile.inside,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Minimum:
    """What the profiles of budgets say."""

    budgets: tuple[Budget, ...]
    laws: dict[str, Law]  # m_opt, d_opt, loss: each through the budgets that it does not leave out
    warnings: tuple[str, ...]
    outliers: dict[str, str]  # of a trial's name: what is wrong with it


@dataclass(frozen=True)
class Fit:
    """What was found; a law that the trials do not support lacks, and `warnings` says why."""

    trials: tuple[Trial, ...]
    per: str  # params or flops_per_token
    minimum: Minimum
    parametric: dict[str, Constant]
    laws: dict[str, Law]  # m_opt, d_opt, loss, lr_opt, batch_opt
    warnings: tuple[str, ...]
    outliers: tuple[str, ...]
    grids: dict[str, list[Grid]]  # of lr_opt, batch_opt: each budget's near-optimal values
    refits: np.ndarray  # of the parametric law [draws, 5]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "trials": len(self.trials),
            "per": self.per,
            "compute": {"least": min(t.compute for t in self.trials), "most": max(t.compute for t in self.trials)},
            "budgets": [budget.to_dict() for budget in self.minimum.budgets],
            "parametric": {name: constant.to_dict() for name, constant in self.parametric.items()},
            **{name: law.to_dict() for name, law in self.laws.items()},
            "near_optimal": {name: [grid.to_dict() for grid in grids] for name, grids in self.grids.items()},
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


def fit(trials: Trials, *, seed: int = 0, draws: int = _DRAWS) -> Fit:
    """All laws of `trials`. Raises InputError where they support none."""
    if not trials.all:
        raise InputError("no trials to fit: " + ("; ".join(trials.warnings) or "the files have none"))
    rng = np.random.default_rng(seed)
    per, best = trials.all[0].per, tuned(trials.all)
    warnings = [*trials.warnings, *_untuned(trials.all)]
    constants, outliers, refits = dict[str, Constant](), dict[str, str](), np.zeros((0, 5))
    try:
        constants, outliers, told, refits = _parametric(best, rng, draws)
        warnings += told
    except InputError as error:
        warnings.append(str(error))
    minimum = minima_laws(budgets(best), per, rng, draws)
    laws = dict(minimum.laws)
    warnings += minimum.warnings
    grids = dict[str, list[Grid]]()
    for name, key in (("lr_opt", "lr"), ("batch_opt", "batch_tokens")):
        grids[name] = settings.grids(budgets(trials.all), key)
        law, said = settings.settings_law(grids[name], key, rng, draws)
        warnings += said
        if law is not None:
            laws[name] = law
    if not constants and not laws:
        raise InputError("; ".join(warnings))
    named = tuple((outliers | minimum.outliers).values())
    return Fit(trials.all, per, minimum, constants, laws, tuple(warnings), named, grids, refits)


def _untuned(trials: Sequence[Trial]) -> list[str]:
    """A warning where sizes are compared at settings that are worse than the best of a grid that only some have."""
    if not (found := [(part, compute) for compute, part in passed_over(trials) if part > NEAR]):
        return []
    part, compute = max(found)
    return [
        f"at {len(found)} budgets some sizes alone have a grid of settings: sizes are compared at what they share, and "
        f"the laws of size and loss are of that; the best of a grid has up to {100 * part:.2g}% less loss (budget "
        f"{compute:.3g})"
    ]


def _parametric(
    trials: Sequence[Trial], rng: np.random.Generator, draws: int
) -> tuple[dict[str, Constant], dict[str, str], list[str], np.ndarray]:
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
    refits = parametric.refit(theta, sizes, tokens, losses, rng.integers(0, len(trials), (draws, len(trials))))
    low, high = np.percentile(refits, [2.5, 97.5], axis=0)
    off = np.log(losses) - np.log(parametric.loss(theta, sizes, tokens))
    spread = 1.4826 * float(np.median(np.abs(off - np.median(off))))
    outliers = {
        trial.name: f"{trial.name}: loss {trial.loss:g}, {100 * (np.exp(o) - 1):+.1f}% of what the law says"
        for trial, o in zip(trials, off, strict=True)
        if abs(o - np.median(off)) > _OUTLIER * max(spread, parametric.DELTA)
    }
    found = zip(parametric.NAMES, theta, low, high, strict=True)
    constants = {name: Constant(float(v), float(lo), float(hi)) for name, v, lo, hi in found}
    at_bounds = parametric.at_bounds(np.vstack([theta, refits]))
    vague = [name for name, bound in at_bounds.items() if bound[0] or bound[1:].mean() > (1 - _SURE) / 2]
    told = f"{' and '.join(vague)} cannot be told from these trials: the value, or an end of the interval, is a bound"
    return constants, outliers, [told] if vague else [], refits


def minima_laws(groups: Sequence[Sequence[Trial]], per: str, rng: np.random.Generator, draws: int = _DRAWS) -> Minimum:
    """Each budget's best size and least loss, and the power laws through them."""
    kept, out, outliers = isoflop.without_outliers(groups)
    found = [_budget(trials, beside, rng, draws) for trials, beside in zip(kept, out, strict=True)]
    sized, flat = ([budget for budget in found if law not in budget.left_out] for law in ("m_opt", "loss"))
    size_laws, of_size = _size_laws(sized, 6.0 if per == "params" else 1.0)
    loss_laws, of_loss = _loss_law(flat)
    laws = {
        name: replace(law, compute=ends([trial.compute for budget in used for trial in budget.trials]))
        for laws, used in ((size_laws, sized), (loss_laws, flat))
        for name, law in laws.items()
    }
    return Minimum(tuple(found), laws, (*_left_out(found), *of_size, *of_loss), outliers)


def _budget(trials: Sequence[Trial], outliers: Sequence[Trial], rng: np.random.Generator, draws: int) -> Budget:
    """A size that cannot be told is no reason to doubt the least loss, which is flat around it; but where the optimum
    lies beyond the sizes tried the least loss does too."""
    profile = isoflop.profile(trials)
    if profile is None:
        few = f"fewer than {isoflop.LEAST_TRIALS} trials of three sizes, too few for a parabola"
        return Budget(tuple(trials), tuple(outliers), None, None, None, {"m_opt": few, "loss": few})
    refits = isoflop.resample(profile, rng, draws)
    sure = int(refits.near.sum())
    size, left_out = None, dict[str, str]()
    if profile.near and sure >= _SURE * draws:
        low, high = np.exp(np.percentile(refits.log_best[refits.near], [2.5, 97.5]))
        size = Constant(float(np.exp(profile.log_best)), float(low), float(high))
    else:
        noise = f"no minimum near the sizes tried can be told from noise ({sure} of {draws} refits have one)"
        left_out["m_opt"] = noise
    beyond = f"the optimum lies beyond the {'largest' if profile.edge > 0 else 'smallest'} size tried"
    if profile.edge and (refits.edge == profile.edge).mean() >= _SURE:
        left_out = {"m_opt": beyond, "loss": beyond}
    elif size is not None and profile.edge:
        left_out["m_opt"] = beyond
    return Budget(tuple(trials), tuple(outliers), profile, refits, size, left_out)


def _left_out(found: Sequence[Budget]) -> list[str]:
    """Warnings of the budgets that laws leave out."""
    warnings = []
    for budget in found:
        if budget.profile is not None and budget.left_out:
            laws = "power laws" if "loss" in budget.left_out else "laws of the best size"
            warnings.append(f"budget {budget.compute:.3g}: {budget.left_out['m_opt']}: left out of the {laws}")
    if few := sum(budget.profile is None for budget in found):
        warnings.append(
            f"{few} budgets have fewer than {isoflop.LEAST_TRIALS} trials of three sizes, too few for a parabola: "
            "left out"
        )
    return warnings


def _size_laws(budgets: Sequence[Budget], times: float) -> tuple[dict[str, Law], list[str]]:
    """(m_opt and d_opt through the best sizes, warnings), where C = times * size * tokens."""
    if len(budgets) < isoflop.LEAST_BUDGETS:
        return {}, [
            f"power laws of the best size need {isoflop.LEAST_BUDGETS} budgets of compute, each with "
            f"{isoflop.LEAST_TRIALS} trials or more on both sides of its optimum; there are {len(budgets)}"
        ]
    profiles, refits = _profiles(budgets)
    whole = np.all([found.near for found in refits], axis=0)
    if whole.sum() < _SURE ** len(budgets) * len(whole):
        return {}, ["noise hides the budgets' minima: no power law of the best size"]
    # The first of each is that of the trials as they are, the others are those of their refits.
    log_sizes = [[one.log_best, *found.log_best[whole]] for one, found in zip(profiles, refits, strict=True)]
    size = power.power_laws(np.array([one.compute for one in profiles]), np.exp(np.array(log_sizes).T))
    tokens = np.stack([1 / (times * size[:, 0]), 1 - size[:, 1]], axis=1)
    return {"m_opt": power.law(size[0], size[1:]), "d_opt": power.law(tokens[0], tokens[1:])}, []


def _loss_law(budgets: Sequence[Budget]) -> tuple[dict[str, Law], list[str]]:
    """(loss through the least losses, warnings): with a floor, where there are FLOOR_BUDGETS.

    A floor that cannot be told from none stays in the law: its refits with and without one say together how sure the
    loss is, where to choose between the two forms first would have the intervals say more than is known.
    """
    if len(budgets) < isoflop.LEAST_BUDGETS:
        need = f"a law of the loss needs {isoflop.LEAST_BUDGETS} budgets whose least loss lies among the sizes tried"
        return {}, [f"{need}; there are {len(budgets)}"]
    profiles, refits = _profiles(budgets)
    computes = np.array([one.compute for one in profiles])
    losses = np.array([[one.least, *found.least] for one, found in zip(profiles, refits, strict=True)]).T
    if len(budgets) < FLOOR_BUDGETS:
        plain = power.power_laws(computes, losses)
        return {"loss": power.law(plain[0], plain[1:])}, [
            f"loss: {len(budgets)} budgets say nothing of a floor, which needs {FLOOR_BUDGETS}: k C^exponent has none, "
            "and is too low far beyond them"
        ]
    found = power.floor_laws(computes, losses)
    falls = np.isfinite(found[:, 0])
    if not falls[0] or falls.mean() < _SURE:
        return {}, ["loss: the budgets' least losses do not fall with compute: no law of it"]
    law = power.law(found[0], found[1:][falls[1:]])
    assert law.E is not None
    warnings = []
    if law.E.low == 0:
        warnings.append(
            f"loss: its floor E cannot be told from these {len(computes)} budgets, whose interval for it is "
            f"[0, {law.E.high:.4g}]: far beyond them the loss is known no better than its own interval says"
        )
    if power.at_bounds(found[falls]).mean() > (1 - _SURE) / 2:
        warnings.append("loss: its exponent cannot be told from these budgets: an end of its interval is a bound")
    return {"loss": law}, warnings


def _profiles(budgets: Sequence[Budget]) -> tuple[list[Profile], list[Minima]]:
    """Of budgets that have one."""
    found = [(b.profile, b.refits) for b in budgets if b.profile is not None and b.refits is not None]
    return [profile for profile, _ in found], [refits for _, refits in found]
