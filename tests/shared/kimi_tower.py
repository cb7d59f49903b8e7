"""Our tower's weights (or gradients) under transformers' names of Kimi-K2.5's tower."""

from __future__ import annotations

import torch

from perilune.pretrain.schema import Vision

_OF_A_LAYER = {
    "input_layernorm": "norm1",
    "pre_mlp_layernorm": "norm2",
    "self_attention.linear_proj": "attn.proj",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[N * D, ...] whose heads turn adjacent dims to one whose heads turn dim i with dim i + D / 2."""
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def theirs(weights: dict[str, torch.Tensor], vision: Vision) -> dict[str, torch.Tensor]:
    """`weights` by the names of `MoonViT`, on one rank."""
    H, N, side = vision.hidden_size, vision.num_attention_heads, vision.patch_size
    found = {}
    for name, value in weights.items():
        owner, _, kind = name.rpartition(".")
        if owner == "patch_embed.proj":
            found[name] = value.view(H, 3, side, side) if kind == "weight" else value
        elif owner == "patch_embed.pos_emb":
            key = "patch_embed.pos_emb.position_embeddings"
            found[key] = value.view(vision.pos_emb_height, vision.pos_emb_width, H)
        elif owner == "encoder.final_layernorm":
            found[f"final_layernorm.{kind}"] = value
        else:
            _, _, layer, part = owner.split(".", 3)
            if part == "self_attention.linear_qkv":
                parts = value.view(N, 3, H // N, *value.shape[1:]).unbind(1)  # Megatron-core's: head by head
                for letter, rows in zip("qkv", (p.reshape(H, *value.shape[1:]) for p in parts), strict=True):
                    turned = rows if letter == "v" else pairs_to_halves(rows, N)
                    found[f"layers.{layer}.attn.{letter}_proj.{kind}"] = turned
            else:
                found[f"layers.{layer}.{_OF_A_LAYER[part]}.{kind}"] = value
    return found
