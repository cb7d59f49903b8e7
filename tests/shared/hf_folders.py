"""Hugging Face folders of random weights, written by transformers itself, with MTP tensors added as on the hub."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from perilune.pretrain.schema import Model

TINY = Model(
    num_layers=3, hidden_size=32, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=48, first_k_dense_replace=1, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.7,
    num_nextn_predict_layers=0, vocab_size=512, max_position_embeddings=64, init_std=0.02,
)  # fmt: skip

MODELS = {
    "plain": TINY,
    "q_lora_rank null": replace(TINY, q_lora_rank=None),
    "yarn": replace(
        TINY, rope_scaling_factor=4.0, original_max_position_embeddings=16, mscale_all_dim=0.7, beta_fast=8.0
    ),
    "groups": replace(TINY, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
    "odd sizes": replace(
        TINY, hidden_size=27, num_attention_heads=3, q_lora_rank=13, kv_lora_rank=11, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=7, intermediate_size=35, n_routed_experts=5, num_experts_per_tok=3,
        moe_intermediate_size=9, n_shared_experts=2, vocab_size=301, first_k_dense_replace=0,
    ),
    "mtp 1": replace(TINY, num_nextn_predict_layers=1),
    "mtp 2": replace(
        TINY, num_nextn_predict_layers=2, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
    ),
    "dense": replace(TINY, n_routed_experts=0, first_k_dense_replace=3),
    "dense with mtp": replace(TINY, n_routed_experts=0, first_k_dense_replace=3, num_nextn_predict_layers=1),
    "eps 1e-5": replace(TINY, rms_norm_eps=1e-5, rope_theta=50000.0),
}  # fmt: skip


def config(m: Model, **more: Any) -> Any:
    """transformers' configuration of `m`, field by field (not by the code under test)."""
    from transformers import DeepseekV3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if m.rope_scaling_factor > 1:
        rope |= {
            "rope_type": "yarn", "factor": m.rope_scaling_factor, "beta_fast": m.beta_fast, "beta_slow": m.beta_slow,
            "mscale": m.mscale, "mscale_all_dim": m.mscale_all_dim,
            "original_max_position_embeddings": m.original_max_position_embeddings,
        }  # fmt: skip
    return DeepseekV3Config(
        vocab_size=m.vocab_size, hidden_size=m.hidden_size, intermediate_size=m.intermediate_size,
        moe_intermediate_size=m.moe_intermediate_size, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads, num_key_value_heads=m.num_attention_heads,
        n_shared_experts=m.n_shared_experts, n_routed_experts=m.n_routed_experts,
        routed_scaling_factor=m.routed_scaling_factor, kv_lora_rank=m.kv_lora_rank, q_lora_rank=m.q_lora_rank,
        qk_rope_head_dim=m.qk_rope_head_dim, v_head_dim=m.v_head_dim, qk_nope_head_dim=m.qk_nope_head_dim,
        n_group=m.n_group, topk_group=m.topk_group, num_experts_per_tok=m.num_experts_per_tok,
        first_k_dense_replace=m.first_k_dense_replace, norm_topk_prob=m.norm_topk_prob,
        max_position_embeddings=m.max_position_embeddings, rms_norm_eps=m.rms_norm_eps, rope_parameters=rope,
        num_mtp_layers=m.num_nextn_predict_layers, **more,
    )  # fmt: skip


def write(folder: Path, m: Model, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """`folder`, as `save_pretrained` writes it, of random weights that make every part count."""
    from transformers import DeepseekV3ForCausalLM

    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = DeepseekV3ForCausalLM(config(m)).to(dtype)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if "inv_freq" not in name:
                tensor.copy_(draw(name, tuple(tensor.shape), generator))
    net.save_pretrained(folder, **saving)
    if m.num_nextn_predict_layers:
        held = load_file(folder / "model.safetensors")
        held |= {name: tensor.to(dtype) for name, tensor in _mtp(m, held, generator).items()}
        for name in held:
            if name.endswith("e_score_correction_bias"):
                held[name] = held[name].float()
        save(folder, held)
    return folder


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As one file."""
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms about 1, biases that change choices, matrices that keep the size of what they multiply."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * values
    if "bias" in name:
        return 0.2 * values
    return values if "embed" in name else values / max(shape[-1], 1) ** 0.5


def _mtp(m: Model, held: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Layers after the last: the names of the last layer, and the six of their own (README_WEIGHTS of DeepSeek-V3)."""
    made = {}
    last = f"model.layers.{m.num_layers - 1}."
    for depth in range(m.num_nextn_predict_layers):
        here = f"model.layers.{m.num_layers + depth}."
        for name in [name for name in held if name.startswith(last)]:
            new = name.replace(last, here)
            made[new] = draw(new, tuple(held[name].shape), generator)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            made[f"{here}{name}.weight"] = draw("norm", (m.hidden_size,), generator)
        made[f"{here}eh_proj.weight"] = draw("eh_proj", (m.hidden_size, 2 * m.hidden_size), generator)
        made[f"{here}embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        made[f"{here}shared_head.head.weight"] = held["lm_head.weight"].clone()
    return made


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of every safetensors file."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    tree = json.loads(path.read_text())
    tree = {k: v for k, v in (tree | changes).items() if v is not ...}
    path.write_text(json.dumps(tree))
