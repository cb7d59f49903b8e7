"""Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, section 2.1.1) on packed rows.

Megatron-core's MLASelfAttention with its repairs, and an attention core and a RoPE of ours as its submodules.

T tokens of the micro-batch on this rank, N heads, D query and key head dim, E value head dim, R RoPE head dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from perilune.kernels.attention import piecewise_attention, varlen_attention
from perilune.parallel import context


@dataclass
class PackedRows(PackedSeqParams):
    """The documents of a micro-batch, in a form of which Megatron-core's attention reads only that tokens are packed.

    Its own boundaries stay None: it would apply RoPE document by document, and cut every document over
    context-parallel ranks. Here each token carries its position instead. `as_one` is for its Triton RoPE alone.
    """

    documents: torch.Tensor = None  # type: ignore[assignment]  # [documents+1] int32 boundaries in the whole pack
    longest: int = 0  # tokens of the longest document
    positions_T: torch.Tensor = None  # type: ignore[assignment]  # of this rank's tokens in their documents
    cut: context.Cut | None = None  # what this rank holds of the pack; None: all of it

    def as_one(self) -> PackedRows:
        """The same, and the whole pack as what Megatron-core takes for its one document."""
        one = copy.copy(self)
        one.cu_seqlens_q = one.cu_seqlens_kv = self.documents[:: len(self.documents) - 1].contiguous()
        return one

    def for_core(self) -> PackedSeqParams:
        """The same boundaries as Transformer Engine's attention reads them."""
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.documents,
            cu_seqlens_kv=self.documents,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


class PositionRope(torch.nn.Module):
    """Megatron-core's RoPE or YaRN, looked up by each token's position in its document."""

    def __init__(self, table: torch.nn.Module, triton: dist.ProcessGroup | None = None) -> None:
        """`triton`: the context-parallel group where Megatron-core's Triton kernels read cos and sin."""
        super().__init__()
        self.table, self._triton = table, triton

    def get_rotary_seq_len(self, *of_megatron: Any) -> PackedRows:
        """Megatron-core asks for a length here, with the packed rows last, and hands the answer to `forward`."""
        packed: PackedRows = of_megatron[-1]
        return packed

    def forward(self, packed: PackedRows, packed_seq: bool) -> Any:
        """Angles [T, 1, R], whose second half repeats the first; of YaRN also what it scales their cos and sin by."""
        rounded = 1 << (packed.longest - 1).bit_length()  # so that the table's cache is met again
        found = self.table(rounded, packed_seq=packed_seq)
        if isinstance(found, tuple):
            return found[0][packed.positions_T, 0], found[1]
        return found[packed.positions_T, 0]

    def get_cached_cos_sin(
        self, packed: PackedRows, dtype: torch.dtype, packed_seq: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled cos and sin [T, 1, R / 2] of the angles: what Megatron-core asks for where its RoPE is fused.

        In fp32, whatever `dtype` asks for: in bf16 they would be off by up to 1/512. For Triton [T, 1, R].
        """
        del dtype
        found = self(packed, packed_seq)
        angles, scale = found if isinstance(found, tuple) else (found, 1.0)
        if self._triton is None:
            angles = angles[..., : angles.shape[-1] // 2]
        cos, sin = angles.cos().float() * scale, angles.sin().float() * scale
        if self._triton is None:
            return cos, sin
        rank, size = self._triton.rank(), self._triton.size()
        return _where_triton_reads(cos, rank, size), _where_triton_reads(sin, rank, size)


def _where_triton_reads(x_T1R: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Rows of a context-parallel rank's tokens, one after the other, to where Megatron-core's kernels look for them.

    They cut the pack, which they take for one document, into 2 x size chunks, and the rank's tokens for chunks rank and
    2 size - 1 - rank. Returns [size * T, 1, R], of which they read what is written here.
    """
    if size == 1:
        return x_T1R
    half = len(x_T1R) // 2
    out = x_T1R.new_empty(size * len(x_T1R), *x_T1R.shape[1:])
    for chunk, part in ((rank, x_T1R[:half]), (2 * size - 1 - rank, x_T1R[half:])):
        out[chunk * half : (chunk + 1) * half] = part
    return out


class LatentAttention(MLASelfAttention):
    """MLA whose decoupled RoPE key gets its whole gradient under tensor parallelism.

    Megatron-core 0.19 gathers the sharded key-value latent over TP ranks and uses its RoPE part in every head of the
    rank; the gather's backward only splits, so what the other ranks' heads send to that key is lost (the worst
    gradient is off by 8e-2). Here the latent is handed on split by sequence, as a replicated projection would leave
    it: Megatron-core then gathers the RoPE key along the sequence, whose backward sums over the ranks.
    """

    config: Any  # MLATransformerConfig

    def __init__(self, *args: Any, rope: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        on_gpu = torch.cuda.is_available()
        self._triton = on_gpu and rope == "triton"
        group = self.pg_collection.cp if self._triton else None
        self.rotary_pos_emb: torch.nn.Module = PositionRope(self.rotary_pos_emb, group)
        if not on_gpu or self._triton:
            # Fused, on a CPU by parallel/cpu.py: Megatron-core lets only YaRN ask for it, which the table need not be.
            self.config = copy.copy(self.config)
            self.config.apply_rope_fusion, self.config.rope_type = True, "yarn"

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: Any = None,
        position_ids: Any = None,
        packed_seq_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron-core's: its Triton RoPE wants boundaries to find a token's angles by, and finds them one by one in
        a pack of one document."""
        packed = packed_seq_params.as_one() if self._triton else packed_seq_params
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed, *args, **kwargs
        )

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
            query, key, value, attention_mask, packed_seq_params=packed_seq_params.for_core(), **kwargs
        )


class PackedCoreAttention(torch.nn.Module):
    """Attention on packed rows by `kernels/attention.py`; takes Megatron-core's arguments for a core attention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        softmax_scale: float,
        pg_collection: Any,
        by: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        del config, layer_number, kwargs
        self.softmax_scale, self.cp_group, self.by = softmax_scale, pg_collection.cp, by

    def forward(self, q_TND: torch.Tensor, k_TND: torch.Tensor, v_TNE: torch.Tensor, packed: PackedRows) -> Any:
        """Returns [T, N * E]."""
        if packed.cut is None:
            bounds = packed.documents, packed.longest
            return varlen_attention(q_TND, k_TND, v_TNE, *bounds, self.softmax_scale, self.by).flatten(1)
        both = context.gather(torch.cat((k_TND, v_TNE), dim=-1), packed.cut.order_T, self.cp_group)
        k, v = both.split([k_TND.shape[-1], v_TNE.shape[-1]], dim=-1)
        return piecewise_attention(q_TND, k, v, packed.cut.pieces, self.softmax_scale, self.by).flatten(1)
