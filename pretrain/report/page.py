"""Runs into one HTML file: figures drawn by the file's own script, everything else plain HTML, nothing from a network.

Text reaches the page through Jinja2's escaping or, in the data of the figures, as JSON that no `<` can end; the script
sets it as text only. A Content-Security-Policy in the page forbids every request and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from perilune.pretrain import config as configs
from perilune.pretrain import doctor
from perilune.pretrain.errors import InputError
from perilune.pretrain.report import describe, evaluation, thin
from perilune.pretrain.report.read import MAX_OWN_KEYS, Load, Run, read_runs

MAX_RUNS = 8  # as many colours as can be told apart
BUCKETS = 6000  # of all runs together: a series takes some 30 bytes each
SPANS = 240  # of expert load along the steps
LOAD_BYTES = 1_500_000  # of all heat maps together
SCRIPTS = ("lines.js", "heat.js", "page.js")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """A line plot: `series` are (key in metrics.jsonl, label); values are multiplied by `scale` to be in `unit`."""

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    scale: float = 1.0
    log: bool = False
    zero: bool = False  # the axis begins at 0
    smooth: bool = True  # worth smoothing: noisy, and recorded every step


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Loss": (
        Plot("Training loss", "nats/token", (("loss", "next token"), ("mtp_loss", "MTP, mean over depths"))),
        Plot("Balance loss", "1 = balanced; before α", (("aux_loss", "sequence-wise balance loss"),)),
        Plot("Validation loss", "nats/token", (("valid_loss", "validation loss"),), smooth=False),
        Plot("Validation bits per byte", "bits/byte", (("valid_bpb", "bits per byte"),), smooth=False),
    ),
    "Optimisation": (
        Plot("Learning rate", "", (("lr", "learning rate"),), zero=True, smooth=False),
        Plot("Gradient norm before clipping", "", (("grad_norm", "gradient norm"),), log=True),
    ),
    "Speed and memory": (
        Plot("Throughput", "tokens/s", (("tokens_per_s", "tokens/s"),), zero=True),
        Plot("Model FLOPs utilisation", "%", (("mfu", "MFU"),), scale=100.0, zero=True),
        Plot("Wait for data", "ms/step", (("data_wait_s", "wait for data"),), scale=1e3, log=True),
        Plot(
            "Peak memory of the largest rank", "GiB", (("memory", "memory"),), scale=2.0**-30, zero=True, smooth=False
        ),
    ),
    "Experts": (
        Plot(
            "MaxVio over the expert layers",
            "fullest expert / mean − 1",
            (("max_vio_mean", "mean of layers"), ("max_vio_max", "worst layer")),
            zero=True,
        ),
    ),
}
_KEYS = [key for plots in SECTIONS.values() for plot in plots for key, _ in plot.series]


def write_report(run: Path, compare: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write the report on `run`, beside those of `compare`, to `out` (default `run`/report.html), whole or not at all.

    Returns the file's path. Raises InputError for a folder that is no run, for more than MAX_RUNS runs, and where
    the file cannot be written.
    """
    paths = [run, *compare]
    if len(paths) > MAX_RUNS:
        raise InputError(f"{len(paths)} runs: a report compares at most {MAX_RUNS}, more cannot be told apart")
    text = render(read_runs(paths, SPANS))
    file = (out if out is not None else run / "report.html").absolute()
    partial = file.with_name(f".{file.name}.partial.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be Unicode
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error.strerror}; name another file by --out") from error
    return file


def render(runs: list[Run]) -> str:
    """The page as text."""
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    sections = _sections(runs)
    evaluations = evaluation.read_evaluations(runs)
    one = runs[0]
    same_data: dict[str, list[Run]] = {}
    for of in runs:
        same_data.setdefault(json.dumps([of.config.data.path, of.config.data.blend]), []).append(of)
    return templates.get_template("page.html").render(
        title=one.name if len(runs) == 1 else f"{one.name} and {describe.count(len(runs) - 1, 'other run')}",
        runs=runs,
        summaries=[describe.summary(of) for of in runs],
        states=[describe.state(of) for of in runs],
        sections=sections,
        absent=_absent(runs),
        evaluations=evaluations,
        evaluated=evaluation.table(evaluations),
        data=[(describe.data(group), [of.name for of in group]) for group in same_data.values()],
        counts=describe.counts(runs),
        differences=describe.differences(runs),
        yamls=[configs.to_yaml(of.config) for of in runs],
        environments=describe.environments(runs),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=doctor.installed("perilune") or "",
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=embedded({"runs": _figures(runs), "sections": sections}),
        is_bar=lambda cell: isinstance(cell, describe.Bar),
    )


def embedded(value: Any) -> Markup:
    """JSON for a script element of type application/json: nothing in it can end the element or open another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


# ---------------------------------------------------------------- figures


def _sections(runs: list[Run]) -> list[dict[str, Any]]:
    """The plots that at least one run has numbers for, by section; metrics beyond the contract come last."""
    own = sorted({key for of in runs for key in of.columns} - {*_KEYS, "step", "tokens"})[:MAX_OWN_KEYS]
    plots = {**SECTIONS, "Other metrics": tuple(Plot(key, "", ((key, key),)) for key in own)}
    sections = []
    for name, group in plots.items():
        drawn = [asdict(plot) for plot in group if any(_recorded(of, key) for of in runs for key, _ in plot.series)]
        if drawn or (name == "Experts" and any(of.load is not None for of in runs)):
            sections.append({"name": name, "plots": drawn})
    return sections


def _recorded(run: Run, key: str) -> bool:
    return key in run.columns and not np.isnan(run.columns[key]).all()


def _absent(runs: list[Run]) -> str:
    """What no run recorded, in words: an empty plot would look like a fault of the page."""
    missing = [
        label
        for plots in SECTIONS.values()
        for plot in plots
        for key, label in plot.series
        if not any(_recorded(run, key) for run in runs)
    ]
    if not any(run.load is not None for run in runs):
        missing.append("expert load")
    return ", ".join(missing)


def _figures(runs: list[Run]) -> list[dict[str, Any]]:
    """What the script draws, by run."""
    scales = {key: plot.scale for plots in SECTIONS.values() for plot in plots for key, _ in plot.series}
    buckets = max(250, min(1000, BUCKETS // len(runs)))
    figures = []
    for run in runs:
        # Validation has few points at steps of its own: it would vanish in the buckets of all steps.
        keys = [key for key in run.columns if key not in ("step", "tokens")]
        of_steps = [key for key in keys if not key.startswith("valid_")]
        frames = [
            thin.frame(run.columns, chosen, scales, buckets)
            for chosen in (of_steps, [key for key in keys if key.startswith("valid_")])
        ]
        figures.append(
            {
                "name": run.name,
                "frames": [frame for frame in frames if frame is not None],
                "skipped": thin.spans(run.columns["step"][run.skipped])[:2000],
                "starts": [start["step"] for start in run.starts if isinstance(start.get("step"), int)],
                "clip": run.config.optim.clip,
                "load": _load(run, LOAD_BYTES // len(runs)) if run.load is not None else None,
            }
        )
    return figures


def _load(run: Run, limit: int) -> dict[str, Any]:
    """Expert load for the heat maps, in at most `limit` bytes of codes: see `codes`."""
    load = run.load
    assert load is not None
    T, L, E = load.counts.shape
    load = _join(load, -(-T * L * E // limit))
    ratio = load.counts / np.maximum(load.counts.mean(-1, keepdims=True), 1e-9)
    steps, tokens = run.columns["step"], run.columns["tokens"]
    known = ~np.isnan(tokens)
    at = np.interp(load.last, steps[known], tokens[known]) if known.any() else np.zeros(len(load.last))
    return {
        "layers": _layer_names(run, L),
        "experts": E,
        "first": load.first,
        "last": load.last,
        "tokens": thin.rounded(at, digits=9),
        "codes": base64.b64encode(codes(ratio.transpose(1, 2, 0)).tobytes()).decode(),
        "end": [[float(f"{of(row):.3g}") for of in (np.min, np.max)] for row in ratio[-1]],
        "maxVio": [thin.rounded(row, digits=4) for row in load.max_vio.T.astype(np.float64)],
    }


def _join(load: Load, each: int) -> Load:
    """`each` neighbouring spans made one."""
    if each <= 1:
        return load
    starts = np.arange(0, len(load.first), each)
    ends = np.minimum(starts + each, len(load.first))
    return Load(
        first=[load.first[i] for i in starts],
        last=[load.last[i - 1] for i in ends],
        counts=np.add.reduceat(load.counts, starts),
        max_vio=np.add.reduceat(load.max_vio, starts) / (ends - starts)[:, None].astype(np.float32),
    )


def codes(ratio: np.ndarray) -> np.ndarray:
    """uint8 of load over the even share: 0 for no token, else log2 of it from -3 (1) to 3 (255), in equal steps."""
    with np.errstate(divide="ignore"):
        exponent = np.clip(np.log2(ratio), -3.0, 3.0)
    return np.where(ratio > 0, np.round(1 + (exponent + 3) / 6 * 254), 0).astype(np.uint8)


def _layer_names(run: Run, layers: int) -> list[str]:
    """Decoder layers count from 0, as in checkpoints; the MTP layers follow. Without a match, just their order."""
    model = run.config.model
    decoder = [f"layer {i}" for i in range(model.first_k_dense_replace, model.num_layers)]
    names = decoder + [f"MTP layer {i + 1}" for i in range(model.num_nextn_predict_layers)]
    return names if len(names) == layers else [f"expert layer {i + 1}" for i in range(layers)]
