"""Communication beside computation changes nothing: the same losses, norms and weights as one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gloo_ranks
import pytest
import torch

from perilune.parallel.workers import Workers
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.schema import Config, Parallel

STEPS = 3


@pytest.fixture(scope="module")
def weights(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = fixture.config("base")
    drawn = workers.run(1, probe.draw, config, fixture.batches("base", fixture.ROWS)[0])
    path = tmp_path_factory.mktemp("weights") / "base.pt"
    torch.save(probe.named(config, drawn), path)
    return str(path)


def trained(workers: Workers, weights: str, **parallel: Any) -> list[probe.Trained]:
    """Both ranks' view of some steps of two micro-batches each, with a learning rate that moves the weights."""
    base = fixture.config("base")
    config: Config = replace(
        base, parallel=Parallel(**parallel), optim=replace(base.optim, lr=1e-3, eps=1e-8, clip=1.0)
    )
    batches = fixture.batches("base", fixture.ROWS // 4)
    assert len(batches) == 4
    found: list[probe.Trained] = workers.run(2, probe.train, config, weights, batches, STEPS)
    return found


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("gather", [False, True], ids=["grad_reduce", "grad_reduce+param_gather"])
def test_overlap_gives_the_same_steps_bitwise(ep: int, gather: bool, workers: Workers, weights: str) -> None:
    plain = trained(workers, weights, ep=ep)
    overlapped = trained(workers, weights, ep=ep, overlap_grad_reduce=True, overlap_param_gather=gather)
    for one, other in zip(plain, overlapped, strict=True):
        assert [step.loss for step in one.steps] == [step.loss for step in other.steps]
        assert [step.grad_norm for step in one.steps] == [step.grad_norm for step in other.steps]
        assert one.steps[0].loss != one.steps[-1].loss
        for mine, theirs in zip(one.weights, other.weights, strict=True):
            assert mine[:3] == theirs[:3] and (mine[3] == theirs[3]).all(), mine[0]


@pytest.mark.parametrize("model", ["base", "vlm"])
def test_no_weight_is_read_before_it_is_gathered(workers: Workers, model: str) -> None:
    """With buckets of one weight each, as a large head or a layer's experts have: no other module waits for them."""
    overlap = Parallel(overlap_grad_reduce=True, overlap_param_gather=True)
    config = replace(fixture.config(model), parallel=overlap)
    assert workers.run(1, gloo_ranks.not_gathered, config, fixture.batches(model, fixture.ROWS // 4)[0]) == [[]]
