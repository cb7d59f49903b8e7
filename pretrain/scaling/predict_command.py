"""`perilune predict`: a fit asked for a budget, its answer shown, and a configuration written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perilune.pretrain import config as configs
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan import hardware
from perilune.pretrain.plan.counts import parameters
from perilune.pretrain.scaling.laws import read_fit
from perilune.pretrain.scaling.predict import DO_NOT_USE, Prediction, Value, predict, run_of, told_of_corpus
from perilune.pretrain.scaling.sizes import size_of
from perilune.pretrain.scaling.words import short
from perilune.pretrain.schema import Config
from perilune.pretrain.train_command import processes_here

_OURS = ("optim.lr", "train.tokens", "train.steps", "train.global_batch_size", "schedule.warmup_tokens")
_SIZES = {"params": "parameters (active, no vocabulary)", "flops_per_token": "M, FLOPs a token"}


def predict_command(
    fit_json: Path,
    overrides: Sequence[str],
    *,
    compute: float | None,
    gpus: int | None,
    gpu: str | None,
    days: float | None,
    mfu: float,
    out: Path | None,
    preset: str | None,
    as_json: bool,
) -> int:
    """Print what the fit says of a budget, and write `out`; returns the exit code. Raises InputError."""
    laws = read_fit(fit_json)
    found = predict(laws, _compute(compute, gpus, gpu, days, mfu))
    config, world = None, 1
    if out is not None:
        if preset is None:
            raise InputError("--out needs --preset: the configuration that is made larger or smaller, as --preset demo")
        base = configs.resolve(preset, _not_ours(overrides))
        world = gpus or processes_here(base, 0)
        config = run_of(found, base, world)
        found = replace(found, warnings=(*found.warnings, *told_of_corpus(config)))
        _write(config, out)
    elif preset or overrides:
        raise InputError(
            f"{preset or overrides[0]}: a preset and its keys are for a configuration; say --out CONFIG.yaml"
        )
    if as_json:
        more = {} if config is None else {"config": configs.to_dict(config), "processes": world}
        print(json.dumps(found.to_dict() | more, indent=1, allow_nan=False))
        return 0
    absurd = [warning for warning in found.warnings if warning.startswith(DO_NOT_USE)]
    for warning in absurd:  # before any number
        print(f"warning: {warning}")
    print(_table(found))
    for warning in found.warnings:
        if warning not in absurd:
            print(f"warning: {warning}")
    if config is not None:
        print(_told(config, found, out, world))
    return 0


def _not_ours(overrides: Sequence[str]) -> Sequence[str]:
    """`overrides`, none of which is what a prediction is of."""
    for word in overrides:
        if (key := word.partition("=")[0]) in _OURS:
            raise InputError(f"{word}: {key} is what the fit says of this compute; leave it out, or set it for `train`")
    return overrides


def _compute(compute: float | None, gpus: int | None, gpu: str | None, days: float | None, mfu: float) -> float:
    parts = {"--gpus": gpus, "--gpu": gpu, "--days": days}
    if compute is not None:
        if given := [name for name, value in parts.items() if value is not None and name != "--gpus"]:
            raise InputError(f"--compute {compute:g} and {given[0]}: give C, or --gpus, --gpu and --days")
        return compute
    if missing := [name for name, value in parts.items() if value is None]:
        raise InputError(
            f"how much compute? --compute C, or --gpus N --gpu NAME --days D; missing: {', '.join(missing)}"
        )
    assert gpus is not None and gpu is not None and days is not None
    return gpus * hardware.flops_per_s(gpu) * mfu * days * 86400


def _write(config: Config, out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} is there already and is not written over; name another with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        configs.save(config, out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from error


def _table(found: Prediction) -> str:
    rows = [
        (_SIZES[found.per], found.size, short),
        ("tokens", found.tokens, short),
        ("tokens a batch", found.batch_tokens, short),
        ("learning rate", found.lr, lambda value: f"{value:.3g}"),
        *(("loss", loss, lambda value: f"{value:.4f}") for loss in found.losses),
    ]
    lines = [f"for {found.compute:.4g} FLOPs: value, 95% interval, by what"]
    for name, value, shown in rows:
        lines.append(f"{name:<36}{shown(value.value):>10}  {_interval(value, shown):<22}{value.by}")
    return "\n".join(lines)


def _interval(value: Value, shown: object) -> str:
    if value.interval is None:
        return "not known"
    assert callable(shown)
    return f"[{shown(value.interval[0])}, {shown(value.interval[1])}]"


def _told(config: Config, found: Prediction, out: Path | None, world: int) -> str:
    """What was written, and what to do with it."""
    m, count = config.model, parameters(config.model)
    size = size_of(m, config.data.seq_len, found.per)
    needs = "" if config.data.path or config.data.blend else " data.path=DIR"
    beside = Path(config.data.path).parent / "valid" if config.data.path else None
    if config.valid.every and not config.valid.path and not (beside and beside.is_dir()):
        needs += " valid.path=DIR"
    off = f"{100 * (size / found.size.value - 1):+.1f}%"
    return (
        f"{out}: {m.num_layers} layers, hidden size {m.hidden_size}, {short(count.total)} parameters, "
        f"{short(count.active)} active; {found.per} {size:.4g}, {off} beside the best; {config.train.tokens:,} tokens, "
        f"{config.train.global_batch_size} rows a batch, learning rate {config.optim.lr:g}\n"
        f"next: perilune train {config.preset} --config {shlex.quote(str(out))}{needs} --nproc {world} --dry-run"
    )
