"""The schedules of a run over its tokens, drawn: a panel for each that varies or is not what anybody expects."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.pretrain import schedule
from perilune.pretrain.data.blend import Blend
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config
from perilune.pretrain.timetable import Timetable

_POINTS = 1000


@dataclass(frozen=True)
class Panel:
    """Lines over tokens: one without a name, or one for each name."""

    what: str  # with its unit
    lines: dict[str, list[float]]
    parts: bool = False  # of a whole: drawn one on the other


def draw(config: Config, dp: int, file: Path) -> list[str]:
    """Write the picture to `file`; returns what each panel shows. Raises InputError where it cannot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install -e '.[scaling]' in the checkout")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    at, panels = panels_of(config, dp)
    unit, size = _unit(at[-1])
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.5, 0.6 + 1.75 * len(panels)), sharex=True, squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw(axis, [tokens / size for tokens in at], panel)
    axes[-1, 0].set_xlabel(f"tokens{f', {unit}' if unit else ''}")
    axes[-1, 0].set_xlim(0, at[-1] / size)
    figure.align_ylabels()
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {file} cannot be written: {error}") from error
    finally:
        plt.close(figure)
    return [panel.what for panel in panels]


def panels_of(config: Config, dp: int) -> tuple[list[int], list[Panel]]:
    """(tokens, panels) of a run on `dp` data-parallel ranks. What is constant and plain has none."""
    plan = Timetable(config, dp)
    end, train, s, m = plan.total_tokens, config.train, config.schedule, config.model
    weights = config.data.blend
    at = _points(config, end)
    panels = [Panel("learning rate", {"": [schedule.learning_rate(config.optim, s, t, end) for t in at]})]
    if train.batch_ramp_tokens:
        rows = [float(plan.rows(t) * config.data.seq_len) for t in at]
        unit, size = _unit(max(rows))
        panels.append(Panel(f"tokens a batch{f', {unit}' if unit else ''}", {"": [row / size for row in rows]}))
    if m.n_routed_experts and s.bias_update_speed:
        panels.append(Panel("router-bias speed", {"": [schedule.bias_update_speed(s, t, end) for t in at]}))
    if m.num_nextn_predict_layers and (s.mtp_weight or s.mtp_weight_late):
        panels.append(Panel("weight of the MTP loss", {"": [schedule.mtp_weight(s, t, end) for t in at]}))
    if len(weights) > 1:
        shares = {name: [row[i] for row in _shares(config, at)] for i, name in enumerate(_names(list(weights)))}
        panels.append(Panel("part of the data", shares, parts=True))
        if images := _images(config, at):
            panels.append(images)
    return at, panels


def _points(config: Config, end: int) -> list[int]:
    """Tokens at which the schedules are asked: evenly, and on both sides of where one jumps or bends."""
    s, train = config.schedule, config.train
    parts = [s.bias_freeze_ratio, s.mtp_switch_ratio, *s.milestones, 1 - s.decay_ratio]
    bends = [round(part * end) for part in parts] + [s.warmup_tokens, train.batch_ramp_tokens]
    bends += [tokens for weight in config.data.blend.values() if isinstance(weight, dict) for tokens in weight]
    found = {round(i * end / _POINTS) for i in range(_POINTS + 1)}
    found |= {tokens + step for tokens in bends for step in (-1, 0, 1)}
    return sorted(tokens for tokens in found if 0 <= tokens <= end)


def _shares(config: Config, at: list[int]) -> list[list[float]]:
    """Each dataset's part of the rows, at each of `at`."""
    blend, length = Blend(config.data.blend, config.data.seq_len), config.data.seq_len
    return [blend.shares(t // length) for t in at]


def _names(paths: list[str]) -> list[str]:
    """As few last parts of the paths as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _images(config: Config, at: list[int]) -> Panel | None:
    """Text beside images, in tokens, where the datasets are seen here and some have images."""
    shares = []
    for path in config.data.blend:
        try:
            manifest = read_manifest(path)
        except InputError:
            return None
        merged = (manifest["images"] or {}).get("merge_size", 1) ** 2
        patches = sum(sample[5] for shard in manifest["shards"] for sample in shard["samples"])
        shares.append(patches / merged / manifest["tokens"])
    if not any(shares):
        return None
    images = [sum(part * share for part, share in zip(row, shares, strict=True)) for row in _shares(config, at)]
    return Panel("part of the tokens", {"text": [1 - part for part in images], "images": images}, parts=True)


def _draw(axis: Any, at: list[float], panel: Panel) -> None:
    if panel.parts:
        axis.stackplot(at, *panel.lines.values(), labels=list(panel.lines), lw=0)
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:
        (values,) = panel.lines.values()
        axis.plot(at, values, color="C0")
        axis.set_ylim(0, 1.12 * max(values) if max(values) else 1)
        if max(values) < 0.01:
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axis.grid(alpha=0.3)
    axis.set_ylabel(panel.what, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _unit(most: float) -> tuple[str, float]:
    for name, size in (("trillions", 1e12), ("billions", 1e9), ("millions", 1e6), ("thousands", 1e3)):
        if most >= 2 * size:
            return name, size
    return "", 1.0
