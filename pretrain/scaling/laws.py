"""Power laws in compute, k C^exponent and with a floor E + k C^exponent: those that a fit found, those that were
published, and how sure they are.

Nothing but the standard library: a dry run is to answer at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from perilune.pretrain.errors import InputError

NAMES = ("E", "A", "B", "alpha", "beta")  # of L(N, D) = E + A/N^alpha + B/D^beta
Range = tuple[float, float] | None  # ends of a 95% interval; None where nothing says how sure a value is


@dataclass(frozen=True)
class Constant:
    """A constant with its 95% interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def ends(values: Iterable[float]) -> tuple[float, float]:
    """(the least, the most)."""
    found = sorted(values)
    return found[0], found[-1]


@dataclass(frozen=True)
class Law:
    """value = k * C^exponent, or E + k * C^exponent where there is an E.

    `draws` are the constants of refits, (k, exponent) or (k, exponent, E): only all together say how sure a value is,
    since within one fit each follows the others.
    """

    k: Constant
    exponent: Constant
    draws: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    E: Constant | None = None
    compute: Range = None  # FLOPs of the smallest and the largest trial that it rests on; None where that is not said

    @property
    def form(self) -> str:
        """What it is, to be read."""
        return "k C^exponent" if self.E is None else "E + k C^exponent"

    def __call__(self, compute: float) -> float:
        return _power(compute, self.k.value, self.exponent.value, self.E.value if self.E else 0.0)

    def interval(self, compute: float) -> Range:
        """Of the value at `compute` FLOPs: 95% of the draws; without them all that the constants' intervals allow."""
        if self.draws:
            return percentiles(_power(compute, *row) for row in self.draws)
        ends = [{constant.low, constant.high} for constant in (self.k, self.exponent, self.E) if constant]
        values = [_power(compute, *corner) for corner in product(*ends)]
        return None if min(values) == max(values) else (min(values), max(values))

    def to_dict(self) -> dict[str, Any]:
        floor = {} if self.E is None else {"E": self.E.to_dict()}
        rests_on = {} if self.compute is None else {"compute": dict(zip(("least", "most"), self.compute, strict=True))}
        return {"k": self.k.to_dict(), "exponent": self.exponent.to_dict(), **floor, **rests_on}


def _power(compute: float, k: float, exponent: float, E: float = 0.0) -> float:
    return float(E + k * compute**exponent)


def exactly(k: float, exponent: float) -> Law:
    """A law of which no interval is known."""
    return Law(Constant(k, k, k), Constant(exponent, exponent, exponent))


# arXiv 2401.02954: section 3.1, figure 3 (learning rate; batch in tokens), and section 3.2 (M, training FLOPs a token).
DEEPSEEK = {"lr": exactly(0.3118, -0.1250), "batch": exactly(0.2920, 0.3271), "size": exactly(0.1715, 0.5243)}


@dataclass(frozen=True)
class Loss:
    """L(N, D) = E + A/N^alpha + B/D^beta, with the constants [5] of refits."""

    theta: tuple[float, ...]  # in the order of NAMES
    draws: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def __call__(self, size: float, tokens: float) -> float:
        return _loss(self.theta, size, tokens)

    def interval(self, size: float, tokens: float) -> Range:
        return percentiles(_loss(theta, size, tokens) for theta in self.draws) if self.draws else None

    def best_size(self, times: float, compute: float) -> float:
        """The size of the least loss where C = times * size * tokens (arXiv 2203.15556, equation 4)."""
        return _best(self.theta, times, compute)

    def best_interval(self, times: float, compute: float) -> Range:
        draws = [theta for theta in self.draws if theta[3] + theta[4] > 0 and min(theta[1:]) > 0]
        return percentiles(_best(theta, times, compute) for theta in draws) if draws else None


def _loss(theta: Sequence[float], size: float, tokens: float) -> float:
    E, A, B, alpha, beta = theta
    return E + A / size**alpha + B / tokens**beta


def _best(theta: Sequence[float], times: float, compute: float) -> float:
    _, A, B, alpha, beta = theta
    return float((alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (compute / times) ** (beta / (alpha + beta)))


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """The 2.5th and the 97.5th, linear between neighbours."""
    found = sorted(values)

    def at(part: float) -> float:
        place = part * (len(found) - 1)
        below = int(place)
        return found[below] + (place - below) * (found[min(below + 1, len(found) - 1)] - found[below])

    return at(0.025), at(0.975)


@dataclass(frozen=True)
class Laws:
    """What a fit.json says."""

    file: str
    per: str  # params or flops_per_token
    least: float  # FLOPs of the smallest trial
    most: float
    laws: dict[str, Law]  # of m_opt, d_opt, loss, lr_opt, batch_opt those that it has
    loss: Loss | None
    warnings: tuple[str, ...] = ()  # of the fit itself

    @property
    def times(self) -> float:
        """C = times * size * tokens: 6 for parameters (arXiv 2001.08361)."""
        return 6.0 if self.per == "params" else 1.0

    def best_size(self, compute: float) -> tuple[float, Range, str]:
        """(size, its interval, by what) for `compute` FLOPs. Raises InputError where the fit says none."""
        if law := self.laws.get("m_opt"):
            return law(compute), law.interval(compute), "IsoFLOP minima"
        if self.loss is not None and min(self.loss.theta[1:]) > 0:
            found = self.loss.best_size(self.times, compute)
            return found, self.loss.best_interval(self.times, compute), "L(N, D)"
        raise InputError(f"{self.file} says no best size: neither m_opt nor a whole `parametric`; fit more trials")


def read_fit(path: Path) -> Laws:
    """A `fit.json` of `perilune fit`, or one written by hand, where `low`, `high` and `draws` may lack.

    Raises InputError for a file that cannot be read, or whose constants are no numbers or cannot be.
    """
    file = path / "fit.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
        raise InputError(
            f"{file} cannot be read as the fit.json of `perilune fit`: {why}; name the fit.json, or the folder, that "
            "`perilune fit TRIALS.csv --out DIR` wrote"
        ) from error
    try:
        per = found.get("per", "flops_per_token")
        if per not in ("params", "flops_per_token"):
            raise ValueError(f"per={per!r} is neither params nor flops_per_token")
        draws = found.get("draws", {})
        laws = {
            name: _law(name, found[name], draws.get(name, ()))
            for name in ("m_opt", "d_opt", "loss", "lr_opt", "batch_opt")
            if name in found
        }
        loss = None
        if found.get("parametric"):
            theta = tuple(_constant(found["parametric"][name], _not_below_zero).value for name in NAMES)
            rows = [tuple(_not_below_zero(value) for value in row) for row in draws.get("parametric", ())]
            if any(len(row) != len(NAMES) for row in rows):
                raise ValueError(f"draws.parametric: each row has the {len(NAMES)} constants {', '.join(NAMES)}")
            loss = Loss(theta, tuple(rows))
        whole, warnings = found["compute"], tuple(map(str, found.get("warnings", ())))
        return Laws(str(file), per, _positive(whole["least"]), _positive(whole["most"]), laws, loss, warnings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{file} is no fit.json: {told}; `perilune fit` writes them (docs/scaling.md)") from error


def _law(name: str, found: dict[str, Any], rows: Sequence[Sequence[Any]]) -> Law:
    kinds = {"k": _positive, "exponent": _finite, **({"E": _not_below_zero} if "E" in found else {})}
    if any(len(row) != len(kinds) for row in rows):
        raise ValueError(f"draws.{name}: each row has the {len(kinds)} constants {', '.join(kinds)}")
    draws = tuple(tuple(kind(value) for kind, value in zip(kinds.values(), row, strict=True)) for row in rows)
    k, exponent, *E = (_constant(found[constant], kind) for constant, kind in kinds.items())
    rests_on = found.get("compute")
    compute = None if rests_on is None else (_positive(rests_on["least"]), _positive(rests_on["most"]))
    return Law(k, exponent, draws, E[0] if E else None, compute)


def _constant(found: dict[str, Any], kind: Callable[[Any], float]) -> Constant:
    value = kind(found["value"])
    return Constant(value, kind(found.get("low", value)), kind(found.get("high", value)))


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} must be finite")
    return number


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} must be above 0 and finite")
    return number


def _not_below_zero(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} must not be below 0, and finite")
    return number
