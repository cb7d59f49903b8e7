"""What the one-GPU checks compare, and how far apart it may be; device by device, so that a CPU can stand for the GPU.

The reference is one process on the CPU in fp32, from the same weights on the same batch (`pretrain/parity/fixture.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_process import Process

from perilune.pretrain import presets
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.schema import Config, Precision

# Largest deviations from the CPU in fp32: relative for losses and norm, of a tensor's own norm for `gradient` (the
# worst tensor, first step) and `update` (the worst, all steps), of all gradients' norm for `gradients`, else absolute.
FP32 = {
    "loss": 1e-5,
    "mtp": 1e-5,
    "balance": 1e-5,
    "grad_norm": 1e-4,
    "gradient": 1e-4,
    "gradients": 1e-4,
    "counts": 0.0,  # no token chooses by less than `fixture.MARGIN`
    "biases": 1e-7,  # they move by the sign of the counts' differences
    "update": 1e-2,  # Adam amplifies tiny gradients; a wrong optimizer is off by 1
}
# bf16 keeps 8 bits. On a CPU (2 cores, torch 2.14.1, 2026-11-24) the same comparison of five fixtures gave, at most:
# losses 6e-4, norm 0.014; in the dense model gradient 0.025 and gradients 0.019; with experts some tokens choose others
# (counts 5), which moves an expert that few tokens chose by 0.61 and all gradients by 0.078.
BF16_DENSE = {"loss": 3e-3, "mtp": 3e-3, "grad_norm": 2e-2, "gradient": 6e-2, "gradients": 4e-2}
BF16 = {"loss": 3e-3, "mtp": 3e-3, "balance": 2e-2, "grad_norm": 3e-2, "gradient": 0.9, "gradients": 0.2, "counts": 16}
# One operation beside the formula in fp32, relative L2.
KERNEL = {"fp32": 1e-4, "bf16": 1e-2}


def outside(numbers: dict[str, Any], tolerances: dict[str, float]) -> dict[str, Any]:
    """The numbers that are beyond their tolerance (a nan is); those without one are not looked at."""
    return {key: numbers[key] for key in tolerances if key in numbers and not numbers[key] <= tolerances[key]}


def config(name: str, compute: str, lr: float | None = None) -> Config:
    """A fixture's run; with `lr` one that learns, where the fixture's own moves by hairs."""
    base = replace(fixture.config(name), precision=Precision(compute=compute))  # type: ignore[arg-type]
    return base if lr is None else replace(base, optim=replace(base.optim, lr=lr, eps=1e-8, clip=1.0))


def batch(name: str) -> list[Any]:
    """A fixture's global batch as one micro-batch."""
    return fixture.batches(name, fixture.ROWS)


def bench(preset: str, compute: str, seq_len: int) -> Config:
    """The shape that tests/bench/step.py measures: a preset without MTP and balance loss."""
    run = presets.get(preset)
    model = replace(run.model, num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0)
    precision = Precision(compute=compute)  # type: ignore[arg-type]
    return replace(run, model=model, precision=precision, data=replace(run.data, seq_len=seq_len))


@dataclass(frozen=True)
class Reference:
    """A fixture's steps on the CPU in fp32."""

    weights: str  # file of the weights it started from, by their Hugging Face names
    start: dict[str, torch.Tensor]
    trained: probe.Trained


class References:
    """Each fixture's reference, made when first asked for; `folder` takes the weights."""

    def __init__(self, cpu: Process, folder: Path) -> None:
        self._cpu, self._folder = cpu, folder
        self._made: dict[str, Reference] = {}

    def __getitem__(self, name: str) -> Reference:
        if name not in self._made:
            run, rows = config(name, "fp32"), batch(name)
            start = probe.named(run, [self._cpu.run("draw", run, rows[0])])
            path = self._folder / f"{name}.pt"
            torch.save(start, path)
            trained = self._cpu.run("train", run, str(path), rows, fixture.STEPS)
            if trained.margin < fixture.MARGIN:
                raise RuntimeError(f"fixture {name}: a choice of experts is won by {trained.margin:.1e} only")
            self._made[name] = Reference(str(path), start, trained)
        return self._made[name]


def compare(process: Process, references: References, name: str, compute: str) -> dict[str, Any]:
    """How far a fixture's steps in `process` are from its reference; keys as FP32's, and the worst tensor's name."""
    want = references[name]
    run = config(name, compute)
    return deviations(run, want, process.run("train", run, want.weights, batch(name), fixture.STEPS))


def deviations(run: Config, reference: Reference, got: probe.Trained) -> dict[str, Any]:
    """As `compare`, of steps that were made."""
    want = reference.trained
    found: dict[str, Any] = {}
    steps = list(zip(got.steps, want.steps, strict=True))
    for key, field in (("loss", "loss"), ("mtp", "mtp_loss"), ("balance", "aux_loss"), ("grad_norm", "grad_norm")):
        if getattr(want.steps[0], field) is not None:
            found[key] = max((abs(getattr(g, field) / getattr(w, field) - 1) for g, w in steps), key=_nan_last)
    if want.steps[0].load_LE is not None:
        found["counts"] = max((float((g.load_LE - w.load_LE).abs().max()) for g, w in steps), key=_nan_last)
    mine, theirs = (probe.named(run, [one.gradients], part=True) for one in (got, want))
    apart = {name: _distance(mine[name], theirs[name]) for name in theirs}
    worst = max(apart, key=lambda name: _nan_last(apart[name]))
    found |= {"gradient": apart[worst], "worst": worst, "tensors": len(apart)}
    found["gradients"] = _distance(*(torch.cat([one[name].flatten() for name in theirs]) for one in (mine, theirs)))
    if run.precision.compute == "fp32":  # the fixture's weights move by less than a digit of bf16
        end, aim = (probe.named(run, [one.weights], part=True) for one in (got, want))
        moved = [_distance(end[name] - reference.start[name], aim[name] - reference.start[name]) for name in aim]
        found["update"] = max(moved, key=_nan_last)
    biases, right = (probe.named(run, [one.biases], part=True) for one in (got, want))
    if right:
        found["biases"] = max((float((biases[name] - right[name]).abs().max()) for name in right), key=_nan_last)
    found["margin"] = want.margin
    return found


def _nan_last(value: float) -> float:
    """For `max`, which would pass over a nan."""
    return value if value == value else float("inf")


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; where nothing is wanted (an expert without tokens), nothing else will do."""
    size = float(want.double().norm())
    away = float((got.double() - want.double()).norm())
    return away / size if size else away
