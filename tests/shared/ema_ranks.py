"""What the processes of tests/optim/test_ema.py do; each function runs on every rank of a group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_ranks
import torch
from checkpoint_ranks import Trainer, trainer

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, profiling
from perilune.pretrain import checkpoint_optimizer as moments
from perilune.pretrain.evaluate.load import open_model
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim.average import average_of
from perilune.pretrain.schema import Config, Optim

DECAY = 0.75  # so that two steps tell the formula
STEPS = 2


def config_of(compute: str = "fp32", name: str = "adamw", decay: float = DECAY, **parallel: Any) -> Config:
    """`tiny` of two layers, one with experts, that keeps an average, in a layout."""
    optim = Optim(name=name, ema_decay=decay)  # type: ignore[arg-type]
    return replace(checkpoint_ranks.config_of(compute, layers=2, **parallel), optim=optim)


@dataclass(frozen=True)
class Run:
    """What a rank of a run has to tell."""

    paths: list[Path]  # checkpoints of before the first step and after each of `STEPS`
    skipped: bool  # of a step after those, whose loss was infinite
    left: bool  # whether that left the averages
    digests: list[dict[str, str]]  # after `STEPS`, and after one more
    state_bytes: int  # of the optimizer's state, by the account of what fills the memory
    average_bytes: int  # of that, averages


def trained(config: Config, folder: Path) -> Run:
    """Steps with a checkpoint of each, one that is not finite, and one more."""

    def infinite(losses: torch.Tensor, batch: Any, mtp_weight: float) -> Any:
        return next_token(losses * float("inf"), batch, mtp_weight)

    with trainer(config) as one:
        paths = [_saved(one, folder)]
        for _ in range(STEPS):
            one.train(1)
            paths.append(_saved(one, folder))
        digests, before = [one.digest()], [values.clone() for values in _averages(one)]
        with mock.patch.object(checkpoint_ranks, "next_token", infinite):
            skipped = one._one().skipped
        left = all(map(torch.equal, before, _averages(one)))
        one.step -= 1
        one.train(1)
        held = profiling.held(one.model.bare(), one.optimizer)["optimizer state"]
        return Run(paths, skipped, left, [*digests, one.digest()], held, sum(x.nbytes for x in _averages(one)))


def resumed(config: Config, source: Path) -> list[dict[str, str]]:
    """As `Run.digests`, of a run that goes on from its checkpoint."""
    with trainer(config) as one:
        one.step = checkpoint.load(source, one.model, one.optimizer)["step"]
        digests = [one.digest()]
        one.train(1)
        return [*digests, one.digest()]


def _saved(one: Trainer, folder: Path) -> Path:
    config = one.config
    return checkpoint.save(folder, one.step, one.model, one.optimizer, {"step": one.step}, config=config, keep=0)


def _averages(one: Trainer) -> list[torch.Tensor]:
    found = map(average_of, moments.optimizers(one.optimizer))
    return [values for average in found if average is not None for values in average.of.values()]


def copied(config: Config, source: Path, folder: Path) -> Path:
    """`source` loaded in a layout and saved again."""
    with trainer(config) as one:
        one.step = checkpoint.load(source, one.model, one.optimizer)["step"]
        return _saved(one, folder)


def evaluated(path: Path) -> dict[str, torch.Tensor]:
    """What `perilune eval --ema` gives the model, by the names of checkpoints."""
    meshes.start(meshes.Mesh(1))
    net = open_model(path, average=True).net
    state = net.state_dict(keep_vars=True)
    entries = {name: entry for name, entry in net.sharded_state_dict().items() if not name.endswith("_extra_state")}
    return {entry.key: state[name].detach() for name, entry in entries.items()}
