"""What the processes of tests/optim do; each function runs on every rank of a group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_ranks
import torch
import torch.distributed as dist

from perilune.pretrain import checkpoint
from perilune.pretrain.optim.exchange import Exchange
from perilune.pretrain.optim.matrices import Box, Name
from perilune.pretrain.optim.muon import Muon, Piece
from perilune.pretrain.parity import probe
from perilune.pretrain.schema import Config, Optim

SHAPES = ((48, 80), (96, 32), (48, 80))


def config_of(compute: str = "fp32", **parallel: Any) -> Config:
    """`tiny` with Muon in a layout."""
    return replace(checkpoint_ranks.config_of(compute, **parallel), optim=Optim(name="muon"))


def gradients(step: int) -> list[torch.Tensor]:
    """Of the matrices of SHAPES and of a vector."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in (*SHAPES, (16,))]


def moved(steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters that were ones, after some steps of Muon by itself, and its update's mean square's root."""
    parameters = [torch.ones(shape) for shape in (*SHAPES, (16,))]
    boxes = [Box(Name("weight", i, 0), 0, 0, *shape) for i, shape in enumerate(SHAPES)]
    pieces = [Piece(p, box, 0, (box.columns, 1)) for p, box in zip(parameters, boxes, strict=False)]
    shapes = {box.name: (box.rows, box.columns) for box in boxes}
    group = {"params": parameters, "lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    muon = Muon(
        [group],
        pieces,
        shapes,
        dist.group.WORLD,  # type: ignore[arg-type]
        momentum=0.95,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        muon.step()
    return [*parameters, muon.update_rms]


def torchs(steps: int) -> list[torch.Tensor]:
    """The same by torch's own Muon and AdamW."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in (*SHAPES, (16,))]
    muon = torch.optim.Muon(
        parameters[:-1], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(parameters[-1:], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        muon.step()
        adam.step()
    return [parameter.detach() for parameter in parameters]


def one_step(config: Config, weights: str, batch: list[Any]) -> probe.Trained:
    """A step of one rank."""
    return probe.train(config, weights, batch, 1)


def rows_of(world: int) -> str:
    """Whether a matrix whose ranks hold overlapping rows is refused, and what is said."""
    name = Name("weight", 0, 0)
    try:
        Exchange([Box(name, 0, 0, 3, 4)], {name: (3 * world, 4)}, dist.group.WORLD)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return "not refused"


def saved(config: Config, folder: Path) -> dict[str, Any]:
    """Two steps, and the checkpoint; and the loss of the step after."""
    return checkpoint_ranks.train_and_save(config, folder)


def refused(config: Config, source: Path) -> str:
    """What is said where a run of another optimizer is to be resumed."""
    with checkpoint_ranks.trainer(config) as one:
        try:
            checkpoint.load(source, one.model, one.optimizer)
        except checkpoint.CheckpointError as error:
            return str(error)
        return "not refused"
