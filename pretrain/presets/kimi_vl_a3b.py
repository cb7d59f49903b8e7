"""Kimi-VL-A3B: Moonlight with MoonViT-SO-400M before it, 16.4B parameters (arXiv 2504.07491)."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.moonlight_16b_a3b import moonlight_16b_a3b
from perilune.pretrain.schema import Config, Train, Vision


def kimi_vl_a3b() -> Config:
    """The joint stage: all parts train on text and images, 1.4T tokens, going on from the text run at 5.2T.

    Source: arXiv 2504.07491, section 2.1 (model) and table 1 (stages); the tower's sizes from ports of the published
        modelling code and the published tensors' sizes; the decoder is Moonlight's at 5.2T tokens.
    Hardware: not published. Here: not yet measured.
    Expected: not yet measured.
    Command: perilune train kimi_vl_a3b data.path=DIR --init-from TEXT_RUN_CHECKPOINT

    Published, and different here:
    - The learning rate goes on along the text run's cosine; here the schedule is this run's own, at its end.
    - The part of text starts at all of it and falls; write it as a schedule of `data.blend`.
    - Batch sizes and degrees of parallelism were not published: Moonlight's are kept.
    """
    moonlight = moonlight_16b_a3b()
    return replace(
        moonlight,
        preset="kimi_vl_a3b",
        vision=Vision(num_layers=27),
        train=Train(tokens=1_400_000_000_000, global_batch_size=4096, save_every=500),
        schedule=replace(moonlight.schedule, lr="constant", warmup_tokens=0),
        optim=replace(moonlight.optim, lr=0.1 * moonlight.optim.lr),
    )
