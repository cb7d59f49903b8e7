"""Images beside their texts: what the vision stage trains, and the decoder's captions are beside (Kimi-VL, 2.3).

The loss is CLIP's or SigLIP's over all pairs that data-parallel ranks hold together, so a step is one micro-batch on
each of them. A rank without a pair computes a blank text (and image, as `vision.vlm` has it) that counts nothing, so
that all ranks have the same collectives, and gradients of the same weights.

B pairs, I images, M = P / 4 merged cells, X tokens of all texts, H hidden, D feature dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from perilune.vision.contrastive import SigmoidScale, Temperature, clip, siglip
from perilune.vision.moonvit import VisionConfig, transformer_config
from perilune.vision.pooling import AttentionPool
from perilune.vision.text_encoder import TextEncoder


@dataclass(frozen=True)
class Pairs:
    """Which images of a micro-batch have a text, and these texts end to end."""

    images_B: torch.Tensor  # int64: the pair's image among those of the micro-batch
    tokens_X: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # [B + 1] int32: where each pair's text begins and ends in [X]

    def __len__(self) -> int:
        return len(self.images_B)

    def to(self, device: torch.device | str) -> Pairs:
        """The same on `device`."""
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in vars(self).items()})


class Contrastive(MegatronModule):
    """Text encoder, a pool for images and one for texts, and the scale of the loss."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config=transformer_config(config))
        c, v = config.contrastive, config.vision
        eps, dtype = v.layer_norm_eps, config.dtype
        self.text_encoder = TextEncoder(config)
        self.image_pool = AttentionPool(v.hidden_size, v.num_attention_heads, c.feature_dim, eps, dtype)
        self.text_pool = AttentionPool(c.hidden_size, c.num_attention_heads, c.feature_dim, eps, dtype)
        self.scale = Temperature() if c.loss == "clip" else SigmoidScale()

    def images(self, cells_M4H: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Features [I, D] of the tower's, for images of `grids` ([I, 2], patches)."""
        return self.image_pool(cells_M4H.flatten(0, 1), _bounds(grids.prod(-1)).to(cells_M4H.device))  # type: ignore[no-any-return]

    def texts(self, tokens_X: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Features [texts, D] of texts that begin and end at `cu_seqlens` ([texts + 1], int32), none of them empty."""
        longest = int(cu_seqlens.diff().max())
        return self.text_pool(self.text_encoder(tokens_X, cu_seqlens, longest), cu_seqlens)  # type: ignore[no-any-return]

    def forward(
        self, cells_M4H: torch.Tensor, grids: torch.Tensor, pairs: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum over this rank's pairs, their count, what the scale's module gives: [1] for CLIP, [2] for SigLIP).

        The whole batch is what the data-parallel ranks hold at this call.
        """
        tokens_X, cu_seqlens = pairs.tokens_X, pairs.cu_seqlens
        if not len(pairs):
            tokens_X, cu_seqlens = tokens_X.new_zeros(1), cu_seqlens.new_tensor([0, 1])
        images_BD = self.images(cells_M4H, grids)[pairs.images_B]
        texts_BD = self.texts(tokens_X, cu_seqlens)[: len(pairs)]
        group = parallel_state.get_data_parallel_group()
        if isinstance(self.scale, Temperature):
            scale = self.scale()
            loss, count = clip(images_BD, texts_BD, scale, group)
            return loss, count, scale.detach()[None]
        scale, bias = self.scale()
        loss, count = siglip(images_BD, texts_BD, scale, bias, group)
        return loss, count, torch.stack((scale, bias)).detach()


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    """[len + 1] int32: where segments of these lengths begin and end."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
