"""The texts that images are compared with: a bidirectional encoder of the tower's kind of layers.

Texts stand end to end, none padded; each token sees its own text alone, and RoPE counts from its beginning. Of no use
beyond the vision stage, so that its weights have no place in a published model's.

X tokens of all texts, H hidden, D head dim.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from perilune.vision.moonvit import PackedImages, VisionConfig, block, transformer_config


class TextEncoder(MegatronModule):
    """Embedding (split over the vocabulary by tensor parallelism) and encoder."""

    def __init__(self, config: VisionConfig) -> None:
        mc = transformer_config(config, config.contrastive)
        super().__init__(config=mc)
        self.rope_theta = config.vision.rope_theta
        group = parallel_state.get_tensor_model_parallel_group()
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, mc.hidden_size, init_method=mc.init_method, config=mc, tp_group=group
        )
        self.encoder = TransformerBlock(mc, block(mc.num_layers), pre_process=True, post_process=True)
        self.encoder.to(config.dtype)  # as the tower's

    def forward(self, tokens_X: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        """[X, H] of texts that begin and end at `cu_seqlens` ([texts + 1], int32), the longest of `longest` tokens."""
        places_X = torch.arange(len(tokens_X), device=tokens_X.device)
        places_X = places_X - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(tokens_X))
        turned = _turns(places_X, self.config.hidden_size // self.config.num_attention_heads, self.rope_theta)
        packed = PackedImages(qkv_format="sbhd", images=cu_seqlens, longest=longest, turns=turned[:, None])
        hidden_X1H = self.encoder(self.embedding(tokens_X)[:, None], attention_mask=None, packed_seq_params=packed)
        out: torch.Tensor = hidden_X1H.squeeze(1)
        return out


def _turns(places_X: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """[X, D / 2] complex, RoPE's: frequency i turns pair i."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=places_X.device) / dim)
    angles = places_X[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
