"""The smallest vision-language model that still has every part: for tests."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.tiny import tiny
from perilune.pretrain.schema import Config, Vision


def tiny_vl() -> Config:
    """`tiny` without MTP, which a model with images has not, and a tower of two layers.

    Source: this repository.
    Hardware: anything.
    Expected: not yet measured; it is for tests, not for its loss.
    Command: perilune train tiny_vl data.path=DIR
    """
    text = tiny()
    return replace(
        text,
        preset="tiny_vl",
        model=replace(text.model, num_nextn_predict_layers=0),
        vision=Vision(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=64,
            pos_emb_height=4,
            pos_emb_width=4,
        ),
    )
