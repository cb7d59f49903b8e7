"""What a fit says of a budget of compute: size, tokens, batch, learning rate, loss; and a run of that size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perilune.pretrain import rules
from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling.laws import DEEPSEEK, Laws, Range
from perilune.pretrain.scaling.sizes import scaled, size_of
from perilune.pretrain.scaling.tokens import OtherLength, of_length, rows_of, short_of
from perilune.pretrain.scaling.words import some
from perilune.pretrain.schema import Config
from perilune.pretrain.timetable import rows_multiple

_OF = {"m_opt": "the best size", "loss": "the loss", "lr_opt": "the learning rate", "batch_opt": "the batch size"}
_ALIKE = 0.05  # in log compute: ends of the same budget
DO_NOT_USE = "DO NOT USE THESE NUMBERS"
_ABSURD = 1e6  # times the largest trial, where a fit's exponents, off by a little, give any answer
_FAR = 1000.0  # times the largest trial: as far as DeepSeek LLM's laws were tried (arXiv 2401.02954, section 3.2)


@dataclass(frozen=True)
class Value:
    """A quantity with its 95% interval, and what says so."""

    value: float
    interval: Range
    by: str

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {"value": self.value, "low": low, "high": high, "by": self.by}


@dataclass(frozen=True)
class Prediction:
    """For `compute` FLOPs, C = times * size * tokens."""

    compute: float
    per: str
    size: Value
    tokens: Value
    batch_tokens: Value
    lr: Value
    losses: tuple[Value, ...]  # by each law that says one
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `loss` is the first law's."""
        return {
            "compute": self.compute,
            "per": self.per,
            "size": self.size.to_dict(),
            "tokens": self.tokens.to_dict(),
            "batch_tokens": self.batch_tokens.to_dict(),
            "lr": self.lr.to_dict(),
            "loss": self.losses[0].to_dict() if self.losses else None,
            "losses": [loss.to_dict() for loss in self.losses],
            "warnings": list(self.warnings),
        }


def predict(laws: Laws, compute: float) -> Prediction:
    """Of `compute` training FLOPs. Raises InputError where the fit says no best size, or no number that can be held."""
    try:
        return _predict(laws, compute)
    except OverflowError as error:
        raise InputError(f"{laws.file}: its laws give no number that can be held at {compute:g} FLOPs") from error


def _predict(laws: Laws, compute: float) -> Prediction:
    size, sizes, by = laws.best_size(compute)
    tokens = compute / (laws.times * size)
    of_tokens = None if sizes is None else (compute / (laws.times * sizes[1]), compute / (laws.times * sizes[0]))
    warnings = [*_absurd(laws, compute), *laws.warnings, *_beyond(laws, compute)]
    settings = {}
    for name, key, what in (("lr_opt", "lr", "learning rate"), ("batch_opt", "batch", "batch size")):
        law = laws.laws.get(name)
        source = name if law else "DeepSeek LLM"
        law = law or DEEPSEEK[key]
        settings[key] = Value(law(compute), law.interval(compute), source)
        if source != name:
            warnings.append(
                f"{laws.file} has no law of the {what}: {law.k.value:g} C^{law.exponent.value:g} of DeepSeek LLM "
                "(arXiv 2401.02954, section 3.1), fitted to dense models, stands in for it"
            )
    losses = []
    if laws.loss is not None:
        # At the best size; which size that is, is no reason to doubt the loss, which is flat there.
        losses.append(Value(laws.loss(size, tokens), laws.loss.interval(size, tokens), "L(N, D)"))
    if law := laws.laws.get("loss"):
        losses.append(Value(law(compute), law.interval(compute), law.form))
    warnings += _apart(losses, floor=law is None or law.E is not None)
    return Prediction(
        compute, laws.per, Value(size, sizes, by), Value(tokens, of_tokens, by), settings["batch"], settings["lr"],
        tuple(losses), tuple(warnings),
    )  # fmt: skip


def _absurd(laws: Laws, compute: float) -> list[str]:
    """The warning above all others: nothing of a prediction so far beyond its trials is to be used."""
    if compute <= _ABSURD * laws.most:
        return []
    return [
        f"{DO_NOT_USE}: {compute:.3g} FLOPs are {_times(compute / laws.most)} times the largest trial, "
        f"{laws.most:.3g}, and nothing is known of laws beyond {_ABSURD:,.0f} times; fit larger trials, or take a "
        "smaller budget"
    ]


def _beyond(laws: Laws, compute: float) -> list[str]:
    """A warning of each range of compute that laws rest on and that `compute` lies outside of."""
    whole = (laws.least, laws.most)
    used = {"L(N, D)": whole} if laws.loss is not None else {}
    for name, what in _OF.items():
        if law := laws.laws.get(name):
            used[what] = law.compute or whole
    warnings = []
    for most, names in _together({what: high for what, (_, high) in used.items() if compute > high}, whole[1]):
        factor = compute / most
        far = f", further than the {_FAR:,.0f} times that DeepSeek LLM's laws were tried for" if factor > _FAR else ""
        warnings.append(
            f"{compute:.3g} FLOPs are {_times(factor)} times the largest {names} {most:.3g}{far}: intervals hold if "
            "the laws go on as they are"
        )
    for least, names in _together({what: low for what, (low, _) in used.items() if compute < low}, whole[0]):
        warnings.append(
            f"{compute:.3g} FLOPs are {_times(least / compute)} times below the smallest {names} {least:.3g}"
        )
    law = laws.laws.get("loss")
    if law is not None and law.E is None and compute > (law.compute or whole)[1]:
        warnings.append("loss by k C^exponent, which has no floor: too low far beyond the budgets that it rests on")
    return warnings


def _together(ends: dict[str, float], whole: float) -> list[tuple[float, str]]:
    """(end, whose it is) of laws that end within a budget's width of each other, those at the file's `whole` first."""
    found: list[tuple[float, list[str]]] = []
    for what, end in sorted(ends.items(), key=lambda one: abs(math.log(one[1] / whole))):
        if found and abs(math.log(end / found[-1][0])) < _ALIKE:
            found[-1][1].append(what)
        else:
            found.append((end, [what]))
    return [
        (whole, "trial's")
        if abs(math.log(end / whole)) < _ALIKE
        else (end, f"budget in the law of {' and '.join(names)},")
        for end, names in found
    ]


def _apart(losses: Sequence[Value], floor: bool) -> list[str]:
    """A warning where intervals of the loss have nothing in common; `floor`: whether the law in C has one."""
    intervals = [loss.interval for loss in losses if loss.interval is not None]
    if len(intervals) < 2 or max(low for low, _ in intervals) <= min(high for _, high in intervals):
        return []
    told = " and ".join(f"{loss.value:.4f} by {loss.by}" for loss in losses)
    low = "" if floor else "k C^exponent has no floor, and is low far beyond the trials; "
    return [
        f"the laws of the loss disagree by more than their intervals ({told}): {low}L(N, D) is as good as the sizes "
        "that were tried lie far apart"
    ]


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 99.5 else f"{factor:.2g}"


def run_of(found: Prediction, base: Config, world: int) -> Config:
    """`base`, its layers and width scaled to the predicted size, with tokens, batch and learning rate for it.

    Tokens are C over the size that whole layers and widths gave, and schedules in tokens keep their parts of the run.
    Raises InputError for a model that cannot be made, or does not fit `world` processes.
    """
    length = base.data.seq_len
    # A pipeline's map of layers is of one number of them.
    parallel = replace(base.parallel, layout=None)
    model = scaled(base.model, length, found.size.value, found.per)
    times = 6.0 if found.per == "params" else 1.0
    tokens = round(found.compute / (times * size_of(model, length, found.per)))
    multiple = rows_multiple(base, rules.mesh_of(base, world).dp)
    rows = max(1, round(found.batch_tokens.value / length / multiple)) * multiple
    if tokens < rows * length:
        raise InputError(
            f"{tokens:,} tokens are less than a batch of {rows} rows of {length}: {found.compute:g} is too little"
        )
    longer = of_length(base, tokens)
    start = max(1, round(base.train.batch_ramp_start / base.train.global_batch_size * rows))
    train = replace(
        longer.train, global_batch_size=rows,
        batch_ramp_start=start if base.train.batch_ramp_tokens else base.train.batch_ramp_start,
    )  # fmt: skip
    config = replace(
        longer,
        model=model,
        parallel=parallel,
        train=train,
        optim=replace(base.optim, lr=float(f"{found.lr.value:.3g}")),
    )
    rules.check(config, world)
    return config


def told_of_corpus(config: Config) -> list[str]:
    """A warning where the run reads its corpus more than once; none of one that is not seen from here.

    Raises OtherLength for one whose rows are not as long as the run's.
    """
    if not config.data.path and not config.data.blend:
        return []
    try:
        over = short_of(config.data, rows_of(config.data), config.train.tokens)
    except OtherLength:
        raise
    except InputError:
        return []
    again = (
        f"the run would read {config.train.tokens:,} tokens, more than its data hold ({some(over)}). What is "
        "read again teaches less than the laws say, which are of tokens read once; pack more data, or take a smaller "
        "budget"
    )
    return [again] if over else []
