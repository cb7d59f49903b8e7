"""The parity matrix: every layout beside one rank, from the same weights on the same batch, in fp32.

The one rank sees the global batch as one micro-batch; a layout sees it cut over ranks and micro-batches whose token
counts differ. What must be equal is listed in TOLERANCES.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from perilune.parallel.workers import WorkerError, Workers
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.parity.layouts import Case

# Largest deviation allowed: relative for losses and norm, of a tensor's norm for gradients and updates, else absolute.
TOLERANCES = {
    "loss": 1e-6,
    "mtp": 1e-6,
    "balance": 1e-6,
    "grad_norm": 1e-6,
    "gradient": 1e-5,
    "counts": 0.0,
    "biases": 0.0,
    "update": 1e-3,  # after three steps: Adam amplifies tiny gradients
    "replicas": 0.0,  # weights that several ranks hold, at the end
}
ROUNDED = 3  # elements of a weight that may end a last digit apart, more than 1e-3 of a small weight's update
Train = Callable[..., probe.Trained]  # what a process runs; a planted error wraps `probe.train`


@dataclass(frozen=True)
class Result:
    """What one case gave beside one rank."""

    name: str
    world: int
    seconds: float
    deviations: dict[str, float]  # of TOLERANCES; what a model lacks is left out
    worst: str = ""  # the tensor whose gradient deviates most
    error: str = ""  # why there are no deviations

    @property
    def failures(self) -> list[str]:
        """What is out of tolerance (a nan is)."""
        bad = [key for key, value in self.deviations.items() if not value <= TOLERANCES[key]]
        return bad + (["error"] if self.error else [])


class FixtureError(RuntimeError):
    """A fixture that rounding could decide."""


@dataclass(frozen=True)
class OneRank:
    """What one process made of a fixture."""

    weights: str  # file of the starting weights
    start: dict[str, torch.Tensor]
    trained: probe.Trained
    gradients: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


class Matrix:
    """Runs cases on processes kept alive between them; `folder` takes the fixtures' weights."""

    def __init__(self, workers: Workers, folder: Path) -> None:
        self._workers, self._folder = workers, folder
        self._one_rank: dict[tuple[str, str], OneRank] = {}

    def run(self, cases: Iterable[Case]) -> Iterator[Result]:
        """Each case's result as it comes."""
        for case in cases:
            yield self.compare(case)

    def compare(self, case: Case, train: Train = probe.train, *extra: Any) -> Result:
        """One case beside one rank; `train` (with `extra` before its arguments) may be one with a planted error."""
        began = time.perf_counter()
        try:
            one = self.one_rank(case.fixture, case.optimizer)
            batch = fixture.batches(case.fixture, case.micro_batch_size)
            ranks = self._workers.run(case.world, train, *extra, case.config, one.weights, batch, fixture.STEPS)
        except (WorkerError, FixtureError) as error:
            return Result(case.name, case.world, time.perf_counter() - began, {}, error=str(error))
        found, worst = deviations(case, one, ranks)
        return Result(case.name, case.world, time.perf_counter() - began, found, worst)

    def one_rank(self, name: str, optimizer: Literal["adamw", "muon"] = "adamw") -> OneRank:
        """What all layouts of a fixture are compared with.

        Raises FixtureError where a choice of experts is won by less than the margin: rounding could decide it.
        """
        if (name, optimizer) not in self._one_rank:
            config = fixture.config(name, optimizer)
            whole = fixture.batches(name, fixture.ROWS)
            start = probe.named(config, self._workers.run(1, probe.draw, config, whole[0]))
            path = self._folder / f"{name}.pt"
            torch.save(start, path)
            (trained,) = self._workers.run(1, probe.train, config, str(path), whole, fixture.STEPS)
            if trained.margin < fixture.MARGIN:
                raise FixtureError(f"fixture {name}: a choice of experts is won by {trained.margin:.1e} only")
            self._one_rank[name, optimizer] = OneRank(
                str(path),
                start,
                trained,
                probe.named(config, [trained.gradients], part=True),
                probe.named(config, [trained.biases], part=True),
                probe.named(config, [trained.weights], part=True),
            )
        return self._one_rank[name, optimizer]


def deviations(case: Case, one: OneRank, ranks: list[probe.Trained]) -> tuple[dict[str, float], str]:
    """The largest deviation of each kind, nan where a rank has nan or nothing; and the tensor of the worst gradient."""
    found: dict[str, float] = {}
    pairs = [(got, want) for rank in ranks for got, want in zip(rank.steps, one.trained.steps, strict=True)]
    for key, field in (("loss", "loss"), ("mtp", "mtp_loss"), ("balance", "aux_loss"), ("grad_norm", "grad_norm")):
        if getattr(one.trained.steps[0], field) is not None:
            found[key] = _worst(_relative(getattr(got, field), getattr(want, field)) for got, want in pairs)
    if one.trained.steps[0].load_LE is not None:
        found["counts"] = _worst(_apart(got.load_LE, want.load_LE) for got, want in pairs)
    config = case.config
    gradient: dict[str, float] = {}
    updates, biases = [], []
    for order in (ranks, ranks[::-1]):  # of a tensor that several ranks hold, the first and the last count
        gradients = probe.named(config, [rank.gradients for rank in order], part=True)
        for name, want in one.gradients.items():
            away = _distance(gradients[name], want) if name in gradients else math.nan
            gradient[name] = _worst((gradient.get(name, 0.0), away))
        end = probe.named(config, [rank.weights for rank in order], part=True)
        updates += [_update(end.get(name), want, one.start[name]) for name, want in one.end.items()]
        moved = probe.named(config, [rank.biases for rank in order], part=True)
        biases += [_apart(moved.get(name), want) for name, want in one.biases.items()]
    name = max(gradient, key=lambda key: math.inf if math.isnan(gradient[key]) else gradient[key])
    found["gradient"], found["update"], found["replicas"] = gradient[name], _worst(updates), _replicas(ranks)
    if one.biases:
        found["biases"] = _worst(biases)
    return found, name


def _worst(values: Iterable[float]) -> float:
    """The largest; nan if any is (Python's max passes over some), or there is none: nothing was compared."""
    kept = list(values)
    return math.nan if not kept or any(math.isnan(value) for value in kept) else max(kept)


def _relative(got: float | None, want: float) -> float:
    return math.nan if got is None else abs(got - want) / abs(want)


def _apart(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    if got is None or want is None or got.shape != want.shape:
        return math.nan
    return float((got - want).abs().max())


def _update(got: torch.Tensor | None, want: torch.Tensor, start: torch.Tensor) -> float:
    """How far apart two updates of a weight are, beside the update; a few differences of a last digit are none.

    fp32 resolves an update to about a hundredth of an element. Rounding decides otherwise in an element or two; an
    error of the update would do so in most of them.
    """
    if got is None:
        return math.nan
    away = got.double() - want.double()
    resolved = torch.from_numpy(np.spacing(want.abs().numpy())).double()
    rounded = (away != 0) & (away.abs() <= resolved)  # nan is not
    if int(rounded.sum()) <= ROUNDED:
        away[rounded] = 0.0
    size = float((want.double() - start.double()).norm())
    return float(away.norm()) / size if size else float(away.norm())


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; where nothing is wanted (an expert without tokens), nothing else will do."""
    size = float(want.double().norm())
    away = float((got.double() - want.double()).norm())
    return away / size if size else away


def _replicas(ranks: list[probe.Trained]) -> float:
    """The largest difference between two ranks' copies of one piece of a weight."""
    seen: dict[tuple[Any, ...], np.ndarray] = {}
    apart = [0.0]
    for rank in ranks:
        for key, _, offset, values in rank.weights:
            first = seen.setdefault((key, offset, values.shape), values)
            apart.append(float(np.abs(first - values).max()))
    return _worst(apart)
