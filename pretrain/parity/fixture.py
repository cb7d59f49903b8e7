"""The model, batch and weights on which layouts are compared: small, with every feature, and no tie that decides.

Gates are drawn until every choice of an expert or a group, of every token in every layer, is won by a margin. So a
layout that sums in another order chooses the same experts, and a difference in routing is an error.

T tokens, E experts, G groups, K chosen experts, M chosen groups.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from perilune.pretrain import presets
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row, RowImage
from perilune.pretrain.schema import Config, Model, Optim, Parallel

ROWS, SEQ_LEN, STEPS = 8, 32, 3
MTP_WEIGHT, BIAS_SPEED = 0.3, 1e-5
LR = {"adamw": 1.5e-6, "muon": 5e-6}  # a matrix moves about as far by either: Muon's updates are 0.2 of the rate
MARGIN = 1e-4  # between the last choice taken and the first one left, at every step of the one rank
_DRAWN_MARGIN = 1e-3  # of the weights drawn, so that MARGIN is left after some steps
_TRIES = 100_000

_BASE = replace(
    presets.get("tiny").model,
    num_layers=4,
    num_attention_heads=8,
    vocab_size=256,
    num_nextn_predict_layers=1,
    max_position_embeddings=SEQ_LEN,
    original_max_position_embeddings=SEQ_LEN,
    seq_aux_loss_alpha=0.05,  # far above the recipe's, so that a wrong balance loss shows in the gradients
    init_std=0.2,
)
_MODELS: dict[str, Model] = {
    "base": _BASE,
    "mtp2": replace(_BASE, num_nextn_predict_layers=2),
    "no-mtp": replace(_BASE, num_nextn_predict_layers=0),
    "moonlight": replace(_BASE, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rms_norm_eps=1e-5),
    "dense": replace(_BASE, n_routed_experts=0, first_k_dense_replace=4),
    "yarn": replace(_BASE, rope_scaling_factor=4.0, original_max_position_embeddings=8),
    "whole-rows": _BASE,  # without a mask between documents, as DeepSeek-V3 was trained
    "vlm": replace(_BASE, num_nextn_predict_layers=0),  # with images in some rows
}
_TOWER = replace(presets.get("tiny_vl").vision, hidden_size=64, num_attention_heads=8, init_std=0.2)
_GRIDS = {1: [(2, 4)], 2: [(4, 2), (2, 2)], 3: [(4, 6)], 6: [(2, 2), (6, 4), (2, 2)]}  # row -> its images' patches
NAMES = tuple(_MODELS)


def config(name: str, optimizer: Literal["adamw", "muon"] = "adamw") -> Config:
    """The run of a fixture, on one rank."""
    base = presets.get("tiny")
    return replace(
        base,
        preset=f"parity {name}",
        model=_MODELS[name],
        vision=_TOWER if name == "vlm" else base.vision,
        train=replace(base.train, steps=STEPS, global_batch_size=ROWS, micro_batch_size=ROWS),
        data=replace(base.data, seq_len=SEQ_LEN, document_mask=name != "whole-rows"),
        # Steps so small that choices keep their margin; eps above the rounding noise of a gradient of almost nothing,
        # which Adam would make a whole step of; clip below the norm, so that clipping is compared too.
        optim=Optim(name=optimizer, lr=LR[optimizer], eps=1e-6, clip=0.5),
        parallel=Parallel(),
    )


def batches(name: str, micro_batch_size: int) -> list[PackedBatch]:
    """The global batch, the same every step, in micro-batches whose counts of tokens differ (one row counts none)."""
    depth = _MODELS[name].num_nextn_predict_layers
    rows = _rows_with_images() if name == "vlm" else _rows()
    found = []
    for i in range(0, ROWS, micro_batch_size):
        micro = rows[i : i + micro_batch_size]
        patches = [_patches(image) for row in micro for image in row.images]
        found.append(collate(micro, depth, config(name).data.document_mask, patches=patches))
    return found


@cache
def _rows() -> tuple[Row, ...]:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(ROWS):
        cuts = np.sort(rng.choice(np.arange(1, SEQ_LEN), size=index % 5, replace=False))
        bounds = np.array([0, *cuts, SEQ_LEN], np.int32)
        mask = np.ones(SEQ_LEN, np.uint8)
        if index % 2:  # tails: a mask at the head of a document hides a wrong normaliser of MTP
            mask[bounds[-2] + (SEQ_LEN - bounds[-2]) // 2 :] = 0
        if index == 5:
            mask[:] = 0
        tokens = rng.integers(0, _BASE.vocab_size, SEQ_LEN).astype(np.uint16)
        rows.append(Row(f"{index}", tokens, bounds, mask))
    return tuple(rows)


@cache
def _rows_with_images() -> tuple[Row, ...]:
    """Images anywhere in a row, so that context parallelism cuts some, and most micro-batches of a rank have none."""
    rows = []
    for index, row in enumerate(_rows()):
        images, at = [], 3 + index
        for grid in _GRIDS.get(index, []):
            tokens = grid[0] * grid[1] // 4
            images.append(RowImage(f"{index}{at}".encode(), "png", at, tokens, grid))
            at += tokens + 2
        mask = row.loss_mask.copy()
        for image in images:
            mask[image.start : image.start + image.tokens] = 0
        rows.append(replace(row, loss_mask=mask, images=tuple(images)))
    return tuple(rows)


def _patches(image: RowImage) -> np.ndarray:
    rng = np.random.default_rng(int(image.data))
    return rng.integers(0, 256, (image.grid[0] * image.grid[1], 3, 14, 14)).astype(np.uint8)


def margin(raw_TE: torch.Tensor, bias_E: torch.Tensor, model: Any) -> float:
    """The least distance, over tokens, by which a choice is made: of groups, of experts, and of the balance loss."""
    K, M, G = model.num_experts_per_tok, model.topk_group, model.n_group
    biased_TE = raw_TE + bias_E
    gaps = [_gap(raw_TE, K)]  # the balance loss counts raw scores (V3 eq. 18)
    if G > 1:
        groups_TGX = biased_TE.view(len(raw_TE), G, -1)
        score_TG = groups_TGX.topk(K // M, dim=-1).values.sum(-1)
        gaps.append(_gap(score_TG, M))
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, score_TG.topk(M, dim=-1).indices, True)
        biased_TE = groups_TGX.masked_fill(~kept_TG[:, :, None], float("-inf")).flatten(1)
    gaps.append(_gap(biased_TE, K))
    return min(gaps)


def _gap(scores: torch.Tensor, chosen: int) -> float:
    if chosen == scores.shape[-1]:
        return float("inf")
    best = scores.topk(chosen + 1, dim=-1).values
    return float((best[:, chosen - 1] - best[:, chosen]).min())


def draw_gate(x_TH: torch.Tensor, model: Model, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate [E, H] and bias [E] that decide on these tokens by the margin.

    Raises RuntimeError where none is found.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    for _ in range(_TRIES):
        gate_EH = torch.randn(model.n_routed_experts, x_TH.shape[-1], generator=generator)
        bias_E = torch.randn(model.n_routed_experts, generator=generator) * 0.05
        if margin(torch.sigmoid(x_TH.float() @ gate_EH.T), bias_E, model) >= _DRAWN_MARGIN:
            return gate_EH, bias_E
    raise RuntimeError(f"no gate decides {len(x_TH)} tokens by {_DRAWN_MARGIN} in {_TRIES} tries")
