"""Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, section 2.1.1) on packed rows.

Megatron-core's MLASelfAttention with its repairs, and an attention core of ours as its submodule.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from perilune.kernels.attention import varlen_attention


class LatentAttention(MLASelfAttention):
    """MLA whose decoupled RoPE key gets its whole gradient under tensor parallelism.

    Megatron-core 0.19 gathers the sharded key-value latent over TP ranks and uses its RoPE part in every head of the
    rank; the gather's backward only splits, so what the other ranks' heads send to that key is lost (the worst
    gradient is off by 8e-2). Here the latent is handed on split by sequence, as a replicated projection would leave
    it: Megatron-core then gathers the RoPE key along the sequence, whose backward sums over the ranks.
    """

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            if not self.config.sequence_parallel:
                raise ValueError("tensor parallelism without sequence parallelism is not supported for MLA")
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined, group=self.pg_collection.tp)
            kv_combined = scatter_to_sequence_parallel_region(kv_combined, group=self.pg_collection.tp)
        return q_compressed, kv_combined

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # The spec says all. Megatron-core would give a model without q latent (Moonlight) a second norm before q.
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _run_core_attention(
        self, query: Any, key: Any, value: Any, attention_mask: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        # Megatron-core pads v to the head dim of q for the sake of kernels that want them equal; ours does not.
        if isinstance(self.core_attention, PackedCoreAttention):
            return self.core_attention(query, key, value, packed_seq_params)
        return super()._run_core_attention(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params, **kwargs
        )


class PackedCoreAttention(torch.nn.Module):
    """Attention on packed rows by `kernels/attention.py`; takes Megatron-core's arguments for a core attention."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float, **kwargs: Any) -> None:
        super().__init__()
        del config, layer_number, kwargs
        self.softmax_scale = softmax_scale

    def forward(self, q_TND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, packed: Any) -> torch.Tensor:
        """Returns [T, N * E]."""
        out_TNE = varlen_attention(
            q_TND, k_TND, v_TNE, packed.cu_seqlens_q, int(packed.max_seqlen_q), self.softmax_scale
        )
        return out_TNE.flatten(1)
