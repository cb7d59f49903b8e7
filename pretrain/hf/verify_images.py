"""`perilune export --verify` of a model with a tower: a prompt with two images, by our model and by transformers'.

transformers has Kimi-K2.5's classes and not Kimi-VL's; its tower with a single frame is the same, so a `kimi_vl` folder
is read by them too, with the projector's names changed on the way and the config.json of the other format.

T tokens, V vocabulary, P patches, M merged features, H hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.config_vision import Media, with_vision
from perilune.pretrain.schema import Model, Vision

FEATURES = 1e-5  # largest |difference| of the tower's features, of their largest value
_GRIDS = ((4, 6), (8, 2))  # patches (down, across) of the two images
_TEXT = 10  # tokens before, between and after them
_RENAMED = {r"^multi_modal_projector\.pre_norm": "mm_projector.pre_norm",
            r"^multi_modal_projector\.linear_1": "mm_projector.proj.0",
            r"^multi_modal_projector\.linear_2": "mm_projector.proj.2"}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Text with two images of different sizes."""

    ids: list[int]
    index: list[int]  # places in it of the merged features
    patches: torch.Tensor  # [P, 3, 14, 14] uint8
    grids: torch.Tensor  # [2, 2] int64


@dataclass(frozen=True)
class Answer:
    """What a model makes of it, in fp32."""

    logits: torch.Tensor  # [T, V]
    cells: torch.Tensor  # [M, 4, H] of the tower


def prompt(model: Model, vision: Vision, pad: int) -> Prompt:
    """Random text and pixels. Raises InputError where the model's rows are too short for it."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = []
    index: list[int] = []
    for grid in (*_GRIDS, None):
        words = torch.randint(0, model.vocab_size - 1, (_TEXT,), generator=generator)
        ids += [word + (word >= pad) for word in words.tolist()]  # any but the placeholder
        if grid is not None:
            count = grid[0] * grid[1] // vision.merge_size**2
            index += range(len(ids), len(ids) + count)
            ids += [pad] * count
    if len(ids) > model.max_position_embeddings:
        raise InputError(
            f"--verify compares a prompt of {len(ids)} tokens; model.max_position_embeddings is "
            f"{model.max_position_embeddings}"
        )
    patches = sum(down * across for down, across in _GRIDS)
    shape = (patches, 3, vision.patch_size, vision.patch_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Prompt(ids, index, pixels, torch.tensor(_GRIDS))


def transformers_answer(folder: Path, vision: Vision, asked: Prompt, complain: Any) -> Answer:
    """By transformers, from the tensors in `folder`. `complain(info, net)` raises for what loading it found."""
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    from perilune.vision.images import normalize

    raw = json.loads((folder / "config.json").read_text())
    kept: dict[str, Any] = {}
    if raw["model_type"] == "kimi_vl":
        pad = raw["media_placeholder_token_id"]
        fields = with_vision(raw["text_config"], vision, "kimi_k25", Media(pad))
        kept = {"config": Kimi_K25Config(**fields), "key_mapping": _RENAMED}
    net, info = Kimi_K25ForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        experts_implementation="eager",
        **kept,
    )
    complain(info, net)
    net.eval()
    frames = torch.cat((torch.ones(len(asked.grids), 1, dtype=torch.int64), asked.grids), dim=1)
    pixels = normalize(asked.patches)
    with torch.no_grad():
        cells = net.model.vision_tower(pixels, grid_thw=frames).pooler_output
        ids = torch.tensor([asked.ids])
        logits = net(input_ids=ids, pixel_values=pixels, image_grid_thw=frames, use_cache=False).logits
    return Answer(logits[0].float(), cells.float())
