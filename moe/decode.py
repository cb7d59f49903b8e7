"""Token-by-token decoding on a Backbone, with only the latent of each past token in the cache.

DeepSeek-V3 (arXiv 2412.19437), section 2.1.1: c^KV (kv_lora_rank numbers, here after its norm) and the rotated k^R
(qk_rope_head_dim numbers, one key for all heads) are all that must be kept of a past token, for every layer.

Two forms of one attention, because what is cheap differs:

- A prompt is read in the form of training, by the same kernel: k and v of all heads are up-projected from the latents,
  once a token, and dropped again.
- A single new token attends in the absorbed form: with W^UK moved into the query and W^UV behind the softmax
  (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) it looks at the latents themselves. A cached token costs a head
  2 C + R products, against C (P + v) for up-projecting it again at every step: 1,088 against 131,072 in DeepSeek-V3.

Both are the same sum in another order: equal up to rounding.

Everything else (projections, norms, router, experts, head) is the Backbone's own modules. MTP layers have no part.

Legend: B sequences, T tokens of all prompts end to end, F of them given as vectors, S cached tokens, H hidden, N heads,
C kv_lora_rank, P qk_nope_head_dim, R qk_rope_head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from perilune.kernels.attention import varlen_attention
from perilune.moe.backbone import Backbone


@dataclass
class LatentCache:
    """What is kept of past tokens: [layers, B, capacity, C] and [layers, B, capacity, R], of which each sequence has
    filled its first `lengths` [B].
    """

    latent_LBSC: torch.Tensor
    key_LBSR: torch.Tensor
    lengths_B: torch.Tensor

    @property
    def numbers_per_token(self) -> int:
        """Kept of one token, over all layers."""
        layers = self.latent_LBSC.shape[0]
        return layers * (self.latent_LBSC.shape[-1] + self.key_LBSR.shape[-1])


class Decoder:
    """Next-token logits of a whole Backbone (one process, no layout), with a cache."""

    def __init__(self, net: Backbone) -> None:
        """`net` must be the whole model, in eval mode. Raises ValueError for a part of one."""
        config = net.config
        degrees = {
            "tp": config.tensor_model_parallel_size,
            "pp": config.pipeline_model_parallel_size,
            "cp": config.context_parallel_size,
            "ep": config.expert_model_parallel_size,
        }
        if any(degree > 1 for degree in degrees.values()) or not (net.pre_process and net.post_process):
            raise ValueError(f"decoding needs the whole model in one process, not a part of it ({degrees})")
        self._net = net
        self._layers = list(net.decoder.layers)
        self._C, self._P, self._R = config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim
        self._N, self._v = config.num_attention_heads, config.v_head_dim

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Sequence[int]], capacity: int, given: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, LatentCache]:
        """Logits [B, V] after the last token of each prompt, and the cache, with room for `capacity` tokens each.

        `given` (places [F] in [T], vectors [F, H]) stands there in place of the tokens' embeddings: what an image is
        to the decoder. Raises ValueError for an empty prompt or one that is longer than `capacity`.
        """
        sizes = [len(prompt) for prompt in prompts]
        if not sizes or not 1 <= min(sizes) <= max(sizes) <= capacity:
            raise ValueError(f"prompts of {sizes} tokens; each must have at least 1 and at most {capacity}")
        weight = self._net.embedding.word_embeddings.weight
        device, layers = weight.device, len(self._layers)
        ends = torch.tensor([0, *sizes], device=device).cumsum(0)
        cu_seqlens = ends.to(torch.int32)
        bounds = list(pairwise(ends.tolist()))
        positions_T = torch.cat([torch.arange(n, device=device) for n in sizes])
        cache = LatentCache(
            weight.new_zeros(layers, len(sizes), capacity, self._C),
            weight.new_zeros(layers, len(sizes), capacity, self._R),
            torch.tensor(sizes, device=device),
        )
        tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)

        def attend(at: int, attention: Any, q_TNP: torch.Tensor, q_TNR: torch.Tensor, latent_TC: torch.Tensor,
                   key_TR: torch.Tensor) -> torch.Tensor:  # fmt: skip
            for row, (start, end) in enumerate(bounds):
                cache.latent_LBSC[at, row, : end - start] = latent_TC[start:end]
                cache.key_LBSR[at, row, : end - start] = key_TR[start:end]
            kv_TNX = attention.linear_kv_up_proj(latent_TC)[0].view(-1, self._N, self._P + self._v)
            k_TNP, v_TNV = kv_TNX.split([self._P, self._v], dim=-1)
            q = torch.cat((q_TNP, q_TNR), dim=-1)
            k = torch.cat((k_TNP, key_TR[:, None].expand(-1, self._N, -1)), dim=-1)
            out_TNV = varlen_attention(q, k, v_TNV.contiguous(), cu_seqlens, max(sizes), attention.softmax_scale)
            return out_TNV.flatten(1)

        hidden_T1H = self._embedded(tokens_T)
        if given is not None:
            places_F, given_FH = given
            hidden_T1H = hidden_T1H.index_copy(0, places_F, given_FH.to(hidden_T1H.dtype)[:, None])
        hidden_T1H = self._forward(hidden_T1H, positions_T, capacity, attend)
        return self._logits(hidden_T1H[ends[1:] - 1]), cache

    @torch.no_grad()
    def step(self, tokens_B: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """Logits [B, V] after one more token of each sequence; `cache` takes it up.

        Raises ValueError where a sequence has no room left.
        """
        capacity = cache.latent_LBSC.shape[2]
        longest = int(cache.lengths_B.max())
        if longest >= capacity:
            raise ValueError(f"a sequence has {longest} tokens, and the cache has room for {capacity}")
        positions_B, rows = cache.lengths_B.clone(), torch.arange(len(tokens_B), device=tokens_B.device)
        S = longest + 1
        hidden_BS = torch.arange(S, device=tokens_B.device)[None] > positions_B[:, None]

        def attend(at: int, attention: Any, q_BNP: torch.Tensor, q_BNR: torch.Tensor, latent_BC: torch.Tensor,
                   key_BR: torch.Tensor) -> torch.Tensor:  # fmt: skip
            cache.latent_LBSC[at, rows, positions_B] = latent_BC
            cache.key_LBSR[at, rows, positions_B] = key_BR
            latent_BSC, key_BSR = cache.latent_LBSC[at, :, :S], cache.key_LBSR[at, :, :S]
            up_NXC = attention.linear_kv_up_proj.weight.view(self._N, self._P + self._v, self._C)
            uk_NPC, uv_NVC = up_NXC.split([self._P, self._v], dim=1)
            q_BNC = torch.einsum("bnp,npc->bnc", q_BNP, uk_NPC)
            scores_BNS = q_BNC @ latent_BSC.transpose(1, 2) + q_BNR @ key_BSR.transpose(1, 2)
            scores_BNS = (scores_BNS.float() * attention.softmax_scale).masked_fill(hidden_BS[:, None], float("-inf"))
            seen_BNC = scores_BNS.softmax(-1).to(latent_BSC.dtype) @ latent_BSC
            return torch.einsum("bnc,nvc->bnv", seen_BNC, uv_NVC).flatten(1)

        hidden_B1H = self._forward(self._embedded(tokens_B), positions_B, capacity, attend)
        cache.lengths_B += 1
        return self._logits(hidden_B1H)

    def _embedded(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """[T, 1, H]."""
        embedded_T1H: torch.Tensor = self._net.embedding(input_ids=tokens_T[None], position_ids=None)
        return embedded_T1H

    def _forward(self, hidden: torch.Tensor, positions_T: torch.Tensor, capacity: int, attend: Any) -> torch.Tensor:
        """Hidden states [T, 1, H] before the head, from what is embedded [T, 1, H]; `attend` gives [T, N * v] of a
        layer's queries and latents.
        """
        rope_TR, scale = self._rope(positions_T, capacity)
        cos_TR, sin_TR = (rope_TR.cos() * scale).to(hidden.dtype), (rope_TR.sin() * scale).to(hidden.dtype)
        for at, layer in enumerate(self._layers):
            attention = layer.self_attention
            x_TH = layer.input_layernorm(hidden).squeeze(1)
            q_TNX = self._queries(attention, x_TH)
            q_TNP, q_TNR = q_TNX.split([self._P, self._R], dim=-1)
            latent_TC, key_TR = attention.linear_kv_down_proj(x_TH)[0].split([self._C, self._R], dim=-1)
            latent_TC = attention.kv_layernorm(latent_TC.contiguous())
            q_TNR = _rotate(q_TNR, cos_TR[:, None], sin_TR[:, None])
            out_TX = attend(at, attention, q_TNP, q_TNR, latent_TC, _rotate(key_TR, cos_TR, sin_TR))
            hidden = hidden + attention.linear_proj(out_TX.unsqueeze(1))[0]
            hidden = hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]
        return self._net.decoder.final_layernorm(hidden)

    def _queries(self, attention: Any, x_TH: torch.Tensor) -> torch.Tensor:
        if self._net.config.q_lora_rank is None:
            q_TX = attention.linear_q_proj(x_TH)[0]
        else:
            q_TX = attention.linear_q_up_proj(attention.q_layernorm(attention.linear_q_down_proj(x_TH)[0]))[0]
        return q_TX.view(-1, self._N, self._P + self._R)

    def _rope(self, positions_T: torch.Tensor, capacity: int) -> tuple[torch.Tensor, float]:
        """Angles [T, R / 2] of the model's own RoPE or YaRN, and what YaRN multiplies their cos and sin by."""
        found = self._layers[0].self_attention.rotary_pos_emb.table(capacity, packed_seq=True)
        angles, scale = found if isinstance(found, tuple) else (found, 1.0)
        return angles[positions_T, 0, 0, : self._R // 2], scale

    def _logits(self, hidden_B1H: torch.Tensor) -> torch.Tensor:
        return self._net.output_layer(hidden_B1H)[0].squeeze(1).float()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of the last dim. First members come out before all second ones, as in
    Megatron-core's MLA: an order that queries and keys share.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
