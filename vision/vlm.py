"""The vision-language model: MoonViT's features in the place of placeholder tokens (Kimi-VL, arXiv 2504.07491, 2.1).

The first pipeline stage holds the tower, the projector and the embedding. Whoever embeds tokens computes the images
that these belong to: an image whose tokens context parallelism spreads over several ranks is computed by each of them,
from the same patches, and what each of its tokens says of the tower adds up over the ranks as for any other weight. A
micro-batch without images, or of which this rank needs none, sends one blank image of 2 x 2 patches through the tower
whose features count nothing: so every rank has the same collectives, and gradients of the same weights.

T tokens of the micro-batch, Q of them on this context-parallel rank, S on this tensor-parallel rank (sequence
parallelism; else S = Q). P patches, I images, M merged features, F of them in this rank's tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from perilune.moe import backbone
from perilune.moe.backbone import Backbone, BackboneConfig
from perilune.vision.images import normalize
from perilune.vision.moonvit import MoonViT, VisionConfig
from perilune.vision.pairs import Contrastive, Pairs
from perilune.vision.projector import Projector


@dataclass(frozen=True)
class Images:
    """What the first stage needs of a micro-batch's images."""

    patches: torch.Tensor  # [P, 3, 14, 14] uint8
    grids: torch.Tensor  # [I, 2] int64 on the CPU: patches (down, across)
    features_F: torch.Tensor  # int64: which merged features of these images this rank's tokens take
    places_F: torch.Tensor  # int64: where in [S] they go

    def to(self, device: torch.device | str) -> Images:
        """The same on `device`, but for the grids, of which the CPU makes shapes."""
        patches, features_F, places_F = (
            x.to(device, non_blocking=True) for x in (self.patches, self.features_F, self.places_F)
        )
        return replace(self, patches=patches, features_F=features_F, places_F=places_F)


def images_of(
    patches: torch.Tensor,
    grids: torch.Tensor,
    index_M: torch.Tensor,
    tokens: int,
    index_Q: torch.Tensor | None = None,
    split: tuple[int, int] = (0, 1),
) -> Images:
    """The images that a rank needs of a micro-batch of `tokens` tokens; all tensors on the CPU.

    `patches`, `grids` and `index_M` (the places in [T] of the merged features) are the whole micro-batch's. `index_Q`
    holds the places in [T] of the rank's tokens under context parallelism (None: all), and `split` (number of the rank,
    count of ranks) says which part of them it embeds under sequence parallelism. Ranks with the same `index_Q` get the
    same images, as tensor parallelism wants.
    """
    if index_Q is not None:
        place_T = torch.full((tokens,), -1)
        place_T[index_Q] = torch.arange(index_Q.numel())
        place_M, tokens = place_T[index_M], index_Q.numel()
        sizes_I = grids.prod(-1) // 4
        image_M = torch.arange(len(grids)).repeat_interleave(sizes_I)
        needed_I = torch.zeros(len(grids), dtype=torch.bool).index_fill(0, image_M[place_M >= 0], True)
        patches = patches[needed_I.repeat_interleave(4 * sizes_I)]
        grids, place_M = grids[needed_I], place_M[needed_I[image_M]]
    else:
        place_M = index_M
    if not len(grids):
        patches, grids = patches.new_zeros(4, *patches.shape[1:]), torch.tensor([[2, 2]])
    number, count = split
    first, held = number * (tokens // count), tokens // count
    features_F = ((place_M >= first) & (place_M < first + held)).nonzero()[:, 0]
    return Images(patches, grids, features_F, place_M[features_F] - first)


class VisionLanguageModel(Backbone):
    """A backbone whose first stage has a tower and a projector, under the names that the hub has for them.

    Frozen parts are those whose parameters want no gradient.
    """

    vision_tower: MoonViT
    multi_modal_projector: Projector
    contrastive: Contrastive  # of a run that compares images with texts

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        images: Images | None = None,
        pairs: Pairs | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Backbone`; the first stage needs `images`. Given `pairs`, that and what `Contrastive` returns, in one."""
        embedded_S1H = None
        if self.pre_process:
            if images is None:
                raise ValueError("the first stage of a vision-language model is given images, or `images_of` no image")
            embedded_S1H = self.embedding(input_ids=input_ids[:1], position_ids=position_ids)
            cells_M4H = self._cells(images)
            embedded_S1H = self._shown(embedded_S1H, images, self.multi_modal_projector(cells_M4H))
        out = super().forward(input_ids=input_ids, position_ids=position_ids, decoder_input=embedded_S1H, **kwargs)
        if pairs is None or images is None:
            return out
        return out, *self.contrastive(cells_M4H, images.grids, pairs)

    def _shown(self, embedded_S1H: torch.Tensor, images: Images, features_MH: torch.Tensor) -> torch.Tensor:
        """Features in the place of their tokens' embeddings."""
        if self.config.sequence_parallel:  # each rank's tokens bring a part of the gradient
            features_MH = copy_to_tensor_model_parallel_region(features_MH, group=self.pg_collection.tp)
        features_FH = features_MH[images.features_F].to(embedded_S1H.dtype)
        # Without a feature for this rank too: its gradient of nothing then takes part in the tower's collectives.
        return embedded_S1H.squeeze(1).index_copy(0, images.places_F, features_FH).unsqueeze(1)

    def features(self, images: Images) -> torch.Tensor:
        """Projected features [M, H] of all the images, image after image."""
        features: torch.Tensor = self.multi_modal_projector(self._cells(images))
        return features

    def image_features(self, images: Images) -> torch.Tensor:
        """[I, D], one of each of the images, to be compared with texts' by the cosine."""
        return self.contrastive.images(self._cells(images), images.grids)

    def text_features(self, tokens_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[texts, D], one of each text: tokens end to end, with the texts' bounds ([texts + 1], int32), none empty."""
        return self.contrastive.texts(tokens_T, cu_seqlens)

    def _cells(self, images: Images) -> torch.Tensor:
        """The tower's features [M, 4, H of the tower]."""
        dtype = self.multi_modal_projector.dtype
        cells: torch.Tensor = self.vision_tower(normalize(images.patches).to(dtype), images.grids)
        return cells


def build(
    config: BackboneConfig, vision: VisionConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> VisionLanguageModel:
    """This rank's part of the model, as `moe.backbone.build`; weights not yet drawn."""
    model = backbone.build_as(VisionLanguageModel, config, vp_stage, pp_rank)
    if model.pre_process:
        model.vision_tower = MoonViT(vision)
        model.multi_modal_projector = Projector(vision)
        if vision.contrastive is not None:
            model.contrastive = Contrastive(vision)
    return model
