"""FLOPs of training with frozen parts, against those that torch counts in the reference and in tower and projector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
from torch.utils.flop_counter import FlopCounterMode
from vision_ranks import GRIDS, TINY, trained_flops

from perilune.parallel.workers import Workers
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.frozen import training_flops
from perilune.pretrain.schema import Config, Vision

TOWER, PROJECTOR, TEXT = "vision_tower", "multi_modal_projector", "language_model"
ROW = 48


def frozen(*parts: str, vision: Vision = TINY.vision) -> Config:
    data = replace(TINY.data, seq_len=ROW)
    return replace(TINY, vision=vision, data=data, train=replace(TINY.train, freeze=parts))


@pytest.mark.parametrize("before", [True, False])
def test_a_frozen_language_model(before: bool) -> None:
    """The embedding's gradient stands for that of features in its place. The reference computes whole squares."""
    weights = reference.init_weights(TINY.model, seed=0)
    weights["model.embed_tokens.weight"].requires_grad_(before)
    batch = reference.packed_batch([[list(range(ROW))]], 0)
    with FlopCounterMode(display=False) as counter:
        out = reference.forward(TINY.model, weights, batch, 0.0)
        if before:
            out.objective.backward()
    whole = flops_per_token(TINY.model, ROW, causal=False)
    causal = flops_per_token(TINY.model, ROW)
    parts = (TEXT,) if before else (TEXT, TOWER, PROJECTOR)
    spared = (3 if before else 1) * (whole.attention_scores - causal.attention_scores)
    assert counter.get_total_flops() == pytest.approx(ROW * (training_flops(frozen(*parts)).token + spared), rel=1e-12)


def test_what_trains_is_three_forwards() -> None:
    for config in (frozen(), frozen(TOWER), frozen(PROJECTOR), frozen(vision=Vision())):
        assert training_flops(config).token == flops_per_token(TINY.model, ROW).training


def test_frozen_tower_and_projector(workers: Workers) -> None:
    cases = [(), (TEXT,), (TOWER,), (PROJECTOR,), (TOWER, PROJECTOR)]
    counted = workers.run(1, trained_flops, cases)[0]
    H, vision = TINY.vision.hidden_size, TINY.vision
    table = vision.pos_emb_height, vision.pos_emb_width
    interpolated = sum(2 * H * (d * table[0] * table[1] + d * a * table[1]) for d, a in GRIDS if (d, a) != table)
    pixels = sum(2 * 3 * vision.patch_size**2 * H * d * a for d, a in GRIDS)
    for parts, found in zip(cases, counted, strict=True):
        trains = TOWER not in parts  # then nobody wants the gradient of the pixels, which the count has
        expected = sum(map(training_flops(frozen(*parts)).image.forward, GRIDS))
        assert found == pytest.approx(expected - pixels * trains + interpolated * (1 + trains), rel=1e-9), parts
