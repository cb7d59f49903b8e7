"""Power laws of learning rate and batch size: through the settings that were near-optimal at each budget of compute.

DeepSeek LLM, arXiv 2401.02954, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perilune.pretrain.scaling import power
from perilune.pretrain.scaling.isoflop import LEAST_BUDGETS
from perilune.pretrain.scaling.laws import Law, ends
from perilune.pretrain.scaling.trials import Trial, averaged

NEAR = 0.0025  # near-optimal: within so much of a budget's least loss
_LEAST_VALUES = 3  # of one size, to be a grid: one value a size is a rule


@dataclass(frozen=True)
class Grid:
    """The near-optimal values of a budget."""

    compute: float
    values: np.ndarray
    step: float  # of the logarithms of the values tried
    inside: bool  # whether worse ones were tried on both sides: else left out
    tried: tuple[float, float]  # the least and the largest
    computes: tuple[float, float]  # of its trials

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the ends of what is near-optimal, and of what was tried."""
        near, tried = ends(map(float, self.values)), ends(map(float, self.tried))
        return {
            "compute": self.compute, "least": near[0], "most": near[1], "tried": list(tried), "inside": self.inside
        }  # fmt: skip


def settings_law(found: Sequence[Grid], key: str, rng: np.random.Generator, draws: int) -> tuple[Law | None, list[str]]:
    """The law through budgets' `grids` of a Trial's `key`, lr or batch_tokens, and warnings; None where fewer than
    LEAST_BUDGETS budgets tried values on both sides of their best.

    What is best is known no better than the steps of the grid: refits move each value by up to half of one.
    """
    what = {"lr": "lr_opt", "batch_tokens": "batch_opt"}[key]
    warnings = [
        f"{what}: budget {grid.compute:.3g}: the near-optimal values reach the edge of those tried "
        f"({grid.tried[0]:g} to {grid.tried[1]:g}): left out; try beyond it"
        for grid in found
        if not grid.inside
    ]
    inside = [grid for grid in found if grid.inside]
    if len(inside) < LEAST_BUDGETS:
        need = f"{what}: a law needs {LEAST_BUDGETS} budgets with values on both sides of the best; {len(inside)} have"
        return None, [*warnings, need] if found else []
    computes = np.concatenate([np.full(len(grid.values), grid.compute) for grid in inside])
    moved = np.concatenate([_moved(grid, rng, draws) for grid in inside], axis=1)
    through = power.power_laws(computes, np.concatenate([grid.values for grid in inside])[None])[0]
    law = power.law(through, power.power_laws(computes, moved))
    return replace(law, compute=ends(compute for grid in inside for compute in grid.computes)), warnings


def grids(groups: Sequence[Sequence[Trial]], key: str) -> list[Grid]:
    """Of the budgets that have one of a Trial's `key`."""
    return [grid for group in groups if (grid := _grid(group, key)) is not None]


def _grid(group: Sequence[Trial], key: str) -> Grid | None:
    """Of a budget's trials; None where no size has _LEAST_VALUES."""
    by_size: dict[float, set[float]] = {}
    for trial in group:
        if (value := getattr(trial, key)) is not None:
            by_size.setdefault(trial.size, set()).add(value)
    sizes = {size for size, values in by_size.items() if len(values) >= _LEAST_VALUES}
    tried = averaged(trial for trial in group if trial.size in sizes and getattr(trial, key) is not None)
    if not tried:
        return None
    values = np.unique([getattr(trial, key) for trial in tried])
    least = min(trial.loss for trial in tried)
    good = [trial for trial in tried if trial.loss <= least * (1 + NEAR)]
    near = np.array([getattr(trial, key) for trial in good])
    inside = bool(values[0] < near.min() and near.max() < values[-1])
    compute, computes = float(np.mean([trial.compute for trial in good])), ends(trial.compute for trial in tried)
    # Of each size alone: where a rule sets sizes a little apart, their values together would look like a fine grid.
    step = float(np.median(np.concatenate([np.diff(np.log(sorted(by_size[size]))) for size in sizes])))
    return Grid(compute, near, step, inside, (values[0], values[-1]), computes)


def _moved(grid: Grid, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Its values drawn with replacement, each moved within its step [draws, values]."""
    drawn = rng.choice(grid.values, (draws, len(grid.values)))
    return np.asarray(drawn * np.exp(grid.step * rng.uniform(-0.5, 0.5, drawn.shape)))
