"""A fit drawn: PNG files, which the page shows too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain.scaling import parametric
from perilune.pretrain.scaling.fit import Fit
from perilune.pretrain.scaling.laws import Law
from perilune.pretrain.scaling.trials import Trial, tuned

SIZES = {"params": "parameters that a token meets, without vocabulary", "flops_per_token": "FLOPs a token"}
_LEFT_OUT = "0.7"  # grey
_BEYOND = 10.0  # laws are drawn so far past the largest compute, dashed


def draw(fit: Fit, folder: Path) -> list[tuple[str, Path]]:
    """(what it shows, file) of each picture that the fit has something for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found: list[tuple[str, Path]] = []

    def keep(what: str, name: str) -> None:
        file = folder / f"{name}.png"
        plt.tight_layout()
        plt.savefig(file, dpi=120)
        plt.close()
        found.append((what, file))

    found_of = fit.minimum.budgets
    if any(budget.profile is not None for budget in found_of):
        _profiles(fit, plt)
        keep("Loss over size at each budget of compute, with its parabola and minimum; grey: left out", "isoflop")
    if "m_opt" in fit.laws:
        used = [(b.compute, b.size.value) for b in found_of if b.size is not None and "m_opt" not in b.left_out]
        computes, sizes = np.array(used).T
        tokens = computes / sizes / (6 if fit.per == "params" else 1)
        _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
        _law(left, fit.laws["m_opt"], computes, sizes, f"best size:\n{SIZES[fit.per]}")
        _law(right, fit.laws["d_opt"], computes, tokens, "best tokens")
        keep("Best size and tokens over compute", "best")
    if "loss" in fit.laws:
        _, axes = plt.subplots(figsize=(6, 4.2))
        flat = [(b.compute, b.profile.least) for b in found_of if b.profile is not None and "loss" not in b.left_out]
        computes, losses = np.array(flat).T
        _law(axes, fit.laws["loss"], computes, losses, "loss")
        keep("Loss at the best size over compute", "loss")
    if fit.parametric:
        _seen(fit, plt)
        keep("Every trial's loss beside what E + A/N^alpha + B/D^beta says", "parametric")
    for name, value, what in (("lr_opt", "lr", "learning rate"), ("batch_opt", "batch_tokens", "tokens a batch")):
        if name in fit.laws:
            _, axes = plt.subplots(figsize=(6, 4.2))
            _tried(axes, fit, name, value)
            computes, values = _settings(fit, name, inside=True)
            _law(axes, fit.laws[name], computes, values, what)
            keep(f"The best {what} over compute: through what was near-optimal; grey is the rest that was tried", name)
    return found


def _profiles(fit: Fit, plt: Any) -> None:
    """Budgets that are left out of the laws of the best size are grey, each with a mark of its own."""
    _, axes = plt.subplots(figsize=(8.5, 5))
    used = [budget for budget in fit.minimum.budgets if not budget.left_out]
    colours = iter(plt.get_cmap("viridis")(np.linspace(0, 0.9, len(used))))
    marks = cycle("svD^<>ph")
    for budget in fit.minimum.budgets:
        label, colour, mark = f"{budget.compute:.2g}", _LEFT_OUT, "o"
        if budget.left_out:
            label, mark = f"{label}, left out" + ("" if "loss" in budget.left_out else " of sizes"), next(marks)
        else:
            colour = next(colours)
        axes.plot(*_dots(budget.trials), mark, ms=4, color=colour, label=label)
        axes.plot(*_dots(budget.outliers), "x", ms=7, mew=1.5, color=colour)
        if (profile := budget.profile) is None:
            continue
        ends = [*profile.log_size_n, *([profile.log_best] if budget.size else [])]
        line = np.linspace(min(ends), max(ends), 100)
        axes.plot(np.exp(line), np.polyval(profile.curve, line - profile.middle), color=colour, lw=1)
        if budget.size is not None:
            least = np.polyval(profile.curve, profile.log_best - profile.middle)
            axes.plot(budget.size.value, least, "*", ms=13, color=colour, mec="black", mew=0.5)
    if any(budget.outliers for budget in fit.minimum.budgets):
        axes.plot([], [], "x", ms=7, mew=1.5, color="black", label="outlier, left out")
    axes.set(xscale="log", xlabel=SIZES[fit.per], ylabel="loss")
    _ticks(axes.xaxis)
    axes.legend(title="FLOPs", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)


def _tried(axes: Any, fit: Fit, name: str, value: str) -> None:
    """All values of a setting, and what is near-optimal in budgets that the law leaves out."""
    tried = [(t.compute, getattr(t, value)) for t in fit.trials if getattr(t, value) is not None]
    axes.plot(*np.array(tried).T, "o", ms=3, color=_LEFT_OUT, zorder=1, label="tried")
    computes, values = _settings(fit, name, inside=False)
    if len(values):
        axes.plot(computes, values, "s", ms=6, mfc="none", mec="0.4", label="near-optimal at an edge, left out")


def _settings(fit: Fit, name: str, *, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    """(FLOPs, near-optimal values) of the budgets that the law goes through, or of the others."""
    found = [(grid.compute, value) for grid in fit.grids[name] if grid.inside == inside for value in grid.values]
    computes, values = np.array(found).reshape(-1, 2).T
    return computes, values


def _dots(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [trial.size for trial in trials], [trial.loss for trial in trials]


def _law(axes: Any, law: Law, computes: np.ndarray, values: np.ndarray, what: str) -> None:
    """Through the values that it rests on; dashed beyond them."""
    seen = np.geomspace(computes.min(), computes.max(), 50)
    beyond = np.geomspace(computes.max(), _BEYOND * computes.max(), 50)
    axes.plot(computes, values, "o", ms=5, color="C1", mec="black", mew=0.5, zorder=3, label="what it goes through")
    axes.plot(seen, [law(c) for c in seen], color="C0")
    axes.plot(beyond, [law(c) for c in beyond], "--", color="C0", label="beyond them")
    exponent, floor = law.exponent, law.E
    title = f"{law.k.value:.4g} C^{exponent.value:.4f}   [{exponent.low:.4f}, {exponent.high:.4f}]"
    if floor:
        title = f"{floor.value:.4g} + {title}, E [{floor.low:.4g}, {floor.high:.4g}]"
        if floor.value > law(beyond[-1]) / 2:  # else the rest would be a line at the top
            axes.axhline(floor.value, color="C0", lw=0.7, ls=":", label="E")
    axes.set_title(title, fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel=what)
    _ticks(axes.xaxis)
    _ticks(axes.yaxis)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _ticks(axis: Any) -> None:
    """Five numbers or so along a logarithmic axis, of which matplotlib labels each or none where it is short."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high < 6 * low:
        axis.set_major_locator(ticker.MaxNLocator(5))
    elif high < 600 * low:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 60 * low else (1, 3)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: re.sub(r"e\+?(-?)0?", r"e\1", f"{value:.3g}")))
    axis.set_minor_formatter(ticker.NullFormatter())


def _seen(fit: Fit, plt: Any) -> None:
    theta = np.array([fit.parametric[name].value for name in parametric.NAMES])
    trials = tuned(fit.trials)
    seen = np.array([trial.loss for trial in trials])
    said = parametric.loss(
        theta, np.array([trial.size for trial in trials]), np.array([trial.tokens for trial in trials])
    )
    _, axes = plt.subplots(figsize=(6, 4.2))
    dots = axes.scatter(seen, 100 * (said / seen - 1), c=np.log10([trial.compute for trial in trials]), s=16)
    axes.axhline(0, color="black", lw=0.7)
    axes.set(xlabel="loss of the trial", ylabel="what the law says, % more")
    plt.colorbar(dots, label="log10 FLOPs")
    axes.grid(alpha=0.3)
