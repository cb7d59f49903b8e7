"""Muon's update by the paper's formula, of the matrices that the paper means; and as torch's own where they agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optim_ranks as ranks
import pytest
import torch

from perilune.kernels.newton_schulz import reference
from perilune.parallel.workers import Workers
from perilune.pretrain.optim import exchange
from perilune.pretrain.optim.matrices import Box, Name, cut_of
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.schema import Config

STEPS = 6
ADAMWS = ("embed_tokens.weight", "lm_head.weight", "patch_embed.proj.weight", "pos_emb.weight")


def apart(got: torch.Tensor, want: torch.Tensor, start: torch.Tensor) -> float:
    """Of two updates, beside the update."""
    return float((got.double() - want.double()).norm() / (want.double() - start.double()).norm())


def by_formula(steps: int) -> list[torch.Tensor]:
    """Equations 1 and 4 of the paper with Nesterov's momentum, in float64."""
    weights = [torch.ones(shape, dtype=torch.float64) for shape in ranks.SHAPES]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for weight, momentum, gradient in zip(weights, momenta, ranks.gradients(step), strict=False):
            momentum.copy_(0.95 * momentum + gradient)
            update = reference(gradient.double() + 0.95 * momentum)
            weight -= 0.02 * (0.2 * math.sqrt(max(weight.shape)) * update + 0.1 * weight)
    return weights


def test_steps_are_the_paper_s_and_torch_s(workers: Workers) -> None:
    """torch's Newton-Schulz is of bf16; its momentum is a mean where the paper's is a sum: the same direction."""
    (ours,) = workers.run(1, ranks.moved, STEPS, torch.float32)
    (rounded,) = workers.run(1, ranks.moved, STEPS, torch.bfloat16)
    theirs, formula = ranks.torchs(STEPS), by_formula(STEPS)
    for index, want in enumerate(formula):
        start = torch.ones_like(want)
        assert apart(ours[index], want, start) < 1e-5
        assert apart(rounded[index], want, start) < 1e-2
        assert apart(rounded[index], theirs[index], start) < 1e-2
    assert torch.equal(ours[3], theirs[3])  # AdamW's, bit for bit
    total, count = ours[-1].tolist()
    assert count == 3 and 0.15 < total / count < 0.22


def matrices(config: Config, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of what the published models call matrices, but for a tower's fused queries, keys and values."""
    if "linear_qkv" in name:
        heads = tensor.unflatten(0, (config.vision.num_attention_heads, 3, -1))
        yield from (heads[:, part].flatten(0, 1) for part in range(3))
    else:
        yield tensor


@pytest.mark.parametrize("name", ["base", "vlm"])
def test_a_model_s_step_moves_each_published_matrix_by_the_formula(name: str, workers: Workers, tmp_path: Path) -> None:
    """Gate and up, each expert, and a projection of all heads, by the names of Hugging Face's checkpoints."""
    config = fixture.config(name, "muon")
    eta, decay = 1e-2, config.optim.weight_decay
    config = replace(config, optim=replace(config.optim, lr=eta))
    whole = fixture.batches(name, fixture.ROWS)
    start = probe.named(config, workers.run(1, probe.draw, config, whole[0]))
    torch.save(start, tmp_path / "start.pt")
    (trained,) = workers.run(1, ranks.one_step, config, str(tmp_path / "start.pt"), whole)
    gradients = probe.named(config, [trained.gradients], part=True)
    end = probe.named(config, [trained.weights], part=True)
    squares = []
    for key, gradient in gradients.items():
        if gradient.ndim < 2 or key.endswith(ADAMWS):
            update = gradient / (gradient.abs() + config.optim.eps)  # AdamW's first
            want = start[key] * (1 - eta * decay) - eta * update
            assert apart(end[key], want, start[key]) < 1e-3, key
            continue
        parts = (matrices(config, key, t) for t in (gradient, start[key], end[key]))
        for g, before, after in zip(*parts, strict=True):
            update = 0.2 * math.sqrt(max(g.shape)) * reference(1.95 * g) if g.any() else g
            squares.append(float(update.square().mean().sqrt()))
            assert apart(after, before - eta * (update + decay * before), before) < 1e-3, key
    assert trained.steps[0].update_rms == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    assert len(squares) > 60


def test_rows_of_a_fused_weight_fall_into_their_matrices() -> None:
    qkv = cut_of("vision_tower.encoder.layers.0.self_attention.linear_qkv.weight", 24, head_dim=4)
    assert list(qkv.segments(6, 9)) == [(1, 2, 6, 2), (2, 0, 8, 4), (0, 4, 12, 3)]
    gated = cut_of("decoder.layers.0.mlp.linear_fc1.weight", 10, head_dim=4)
    assert list(gated.segments(3, 5)) == [(0, 3, 3, 2), (1, 0, 5, 3)]
    plain = cut_of("vision_tower.encoder.layers.0.mlp.linear_fc1.weight", 10, head_dim=4)
    assert list(plain.segments(3, 5)) == [(0, 3, 3, 5)]


@pytest.mark.parametrize(
    ("boxes", "tiled"),
    [
        ([(0, 0, 6, 4)], True),
        ([(0, 0, 2, 4), (2, 0, 4, 1), (2, 1, 1, 3), (3, 1, 3, 3)], True),
        ([(0, 0, 6, 2), (0, 2, 3, 2), (3, 2, 3, 2)], True),
        ([(0, 0, 3, 4), (2, 0, 3, 4)], False),  # as many elements, row 2 twice and row 5 never
        ([(0, 0, 3, 4), (3, 0, 2, 4)], False),
        ([(0, 0, 6, 4), (0, 0, 6, 4)], False),
        ([(0, 0, 7, 4)], False),
        ([(0, 0, 3, 4), (3, 1, 3, 4)], False),
        ([], False),
    ],
)
def test_whether_boxes_tile_a_matrix(boxes: list[tuple[int, int, int, int]], tiled: bool) -> None:
    made = [Box(Name("w", 0, 0), row, column, rows, columns) for row, column, rows, columns in boxes]
    assert exchange._tiled((6, 4), made) == tiled


def test_pieces_that_do_not_make_a_matrix_are_refused(workers: Workers) -> None:
    for said in workers.run(2, ranks.rows_of, 2):
        assert "do not tile it" in said and "6 x 4" in said
