"""Analytic counts of the vision side: parameters of MoonViT and the projector, and FLOPs of an image; and of what
images are compared with, its parameters and FLOPs of a batch.

As in `counts.py` only matrix products count, a matmul costs 2 FLOPs a weight and token, and training is three forwards.
The interpolation of positions, norms, softmax, GELU and RoPE are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perilune.pretrain.schema import Config, Contrastive, Vision

NO_CONTRASTIVE = Contrastive()


@dataclass(frozen=True)
class VisionCount:
    """Parameters in numbers of elements."""

    tower: int
    projector: int

    @property
    def total(self) -> int:
        return self.tower + self.projector

    def without(self, frozen: Sequence[str]) -> int:
        """Of what trains, where `frozen` is `train.freeze`."""
        return self.tower * ("vision_tower" not in frozen) + self.projector * ("multi_modal_projector" not in frozen)


def parameters(vision: Vision, text_hidden: int) -> VisionCount:
    """Of MoonViT (arXiv 2504.07491, section 2.1) and of the projector to a decoder of hidden size `text_hidden`.

    Zero where `vision` has no layers.
    """
    if not vision.num_layers:
        return VisionCount(0, 0)
    H, pixels = vision.hidden_size, 3 * vision.patch_size**2
    embedding = pixels * H + H + vision.pos_emb_height * vision.pos_emb_width * H
    merged = vision.merge_size**2 * H
    projector = 2 * H + (merged * merged + merged) + (merged * text_hidden + text_hidden)
    return VisionCount(embedding + _encoder(vision), projector)


def _encoder(sizes: Vision | Contrastive) -> int:
    """Elements of all blocks and of the norm after them."""
    H, F = sizes.hidden_size, sizes.intermediate_size
    block = 2 * 2 * H + (3 * H * H + 3 * H) + (H * H + H) + (H * F + F) + (F * H + H)
    return sizes.num_layers * block + 2 * H


def _split(sizes: Vision | Contrastive) -> int:
    """Elements of all blocks that tensor parallelism splits."""
    H, F = sizes.hidden_size, sizes.intermediate_size
    return sizes.num_layers * (3 * H * H + 3 * H + H * H + H * F + F + F * H)


def per_rank(vision: Vision, text_hidden: int, tp: int) -> VisionCount:
    """Elements on a rank of the first pipeline stage: matrices are split over tp, as their outer biases are."""
    if not vision.num_layers:
        return VisionCount(0, 0)
    whole, split = parameters(vision, text_hidden), _split(vision)
    merged = vision.merge_size**2 * vision.hidden_size
    projector = merged * merged + merged + merged * text_hidden
    return VisionCount(whole.tower - split + split // tp, whole.projector - projector + projector // tp)


def _vectors(sizes: Vision | Contrastive, tp: int) -> int:
    """Elements on a rank of all biases and norms of the blocks, and of the norm after them."""
    H, F = sizes.hidden_size, sizes.intermediate_size
    return sizes.num_layers * (2 * 2 * H + 2 * H + (3 * H + F) // tp) + 2 * H


def vectors_per_rank(vision: Vision, text_hidden: int, tp: int) -> VisionCount:
    """Of those elements what Muon leaves to AdamW (`optim/matrices.py`)."""
    if not vision.num_layers:
        return VisionCount(0, 0)
    H, pixels = vision.hidden_size, 3 * vision.patch_size**2
    embedding = pixels * H + H + vision.pos_emb_height * vision.pos_emb_width * H
    return VisionCount(embedding + _vectors(vision, tp), 2 * H + vision.merge_size**2 * H // tp + text_hidden)


@dataclass(frozen=True)
class ContrastiveCount:
    """Parameters in numbers of elements."""

    text_embedding: int
    text_encoder: int  # without it
    pools: int  # of images and of texts, with the maps to the features that are compared
    scale: int

    @property
    def total(self) -> int:
        return self.text_embedding + self.text_encoder + self.pools + self.scale


def contrastive_parameters(contrastive: Contrastive, vision: Vision, vocab_size: int) -> ContrastiveCount:
    """Of what images are compared with; zero where they are compared with nothing."""
    if contrastive.loss == "none":
        return ContrastiveCount(0, 0, 0, 0)
    pools = 0
    for sizes in (vision, contrastive):
        H, N = sizes.hidden_size, sizes.num_attention_heads
        pools += N * H + (H * H + H) + 2 * H + H * contrastive.feature_dim
    scale = 2 if contrastive.loss == "siglip" else 1
    return ContrastiveCount(vocab_size * contrastive.hidden_size, _encoder(contrastive), pools, scale)


def contrastive_per_rank(contrastive: Contrastive, vision: Vision, vocab_size: int, tp: int) -> int:
    """Elements of it on a rank: the encoder's matrices and its embedding are split over tp."""
    count = contrastive_parameters(contrastive, vision, vocab_size)
    split = count.text_embedding + _split(contrastive) if count.total else 0
    return count.total - split + split // tp


def contrastive_vectors_per_rank(contrastive: Contrastive, vision: Vision, vocab_size: int, tp: int) -> int:
    """Elements of it on a rank that Muon leaves to AdamW: embedding, biases, norms, the pools' queries, scale."""
    count = contrastive_parameters(contrastive, vision, vocab_size)
    if not count.total:
        return 0
    pools = sum(sizes.hidden_size * (sizes.num_attention_heads + 3) for sizes in (vision, contrastive))
    return count.text_embedding // tp + _vectors(contrastive, tp) + pools + count.scale


@dataclass(frozen=True)
class ImageFlops:
    """Forward FLOPs of one image of P patches: `patch` P + `square` P^2."""

    patch: float  # weights of tower and projector
    square: float  # attention among the image's patches: scores, and their product with the values

    def forward(self, grid: tuple[int, int]) -> float:
        """Of an image of (down, across) patches."""
        patches = grid[0] * grid[1]
        return self.patch * patches + self.square * patches**2

    def training(self, grid: tuple[int, int]) -> float:
        """Forward and backward, nothing frozen or recomputed."""
        return 3 * self.forward(grid)


def image_flops(vision: Vision, text_hidden: int) -> ImageFlops:
    """Of tower and projector; zero where `vision` has no layers."""
    if not vision.num_layers:
        return ImageFlops(0.0, 0.0)
    H, F, pixels = vision.hidden_size, vision.intermediate_size, 3 * vision.patch_size**2
    cells = vision.merge_size**2
    block = 4 * H * H + 2 * H * F
    projector = (cells * H * cells * H + cells * H * text_hidden) / cells  # a cell's, shared by its patches
    return ImageFlops(
        patch=2.0 * (pixels * H + vision.num_layers * block + projector), square=4.0 * vision.num_layers * H
    )


@dataclass(frozen=True)
class ContrastiveFlops:
    """Forward FLOPs of comparing images with texts, beyond the tower's: zero where they are compared with nothing."""

    token: float  # weights of the text encoder and of its pool
    square: float  # attention among a text's tokens
    patch: float  # weights of the images' pool
    feature: float  # the map of a pooled text to its feature
    image: float  # and of a pooled image
    product: float  # of the features of an image and a text

    def text(self, tokens: int) -> float:
        """Of one text."""
        return self.token * tokens + self.square * tokens**2 + self.feature

    def forward(self, texts: Sequence[int], images: Sequence[int], pairs: int) -> float:
        """Of texts of these numbers of tokens and images of these numbers of patches, and of `pairs` compared pairs.

        All pairs of a global batch of A are A^2 / ranks on each rank.
        """
        return (
            sum(map(self.text, texts))
            + sum(self.patch * patches + self.image for patches in images)
            + self.product * pairs
        )


def contrastive_flops(contrastive: Contrastive, vision: Vision) -> ContrastiveFlops:
    """Of text encoder, pools and the loss: CLIP's compares images with texts, and texts with images again."""
    if contrastive.loss == "none":
        return ContrastiveFlops(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    H, F, L, D = contrastive.hidden_size, contrastive.intermediate_size, contrastive.num_layers, contrastive.feature_dim
    heads, wide = contrastive.num_attention_heads, vision.hidden_size
    return ContrastiveFlops(
        token=2.0 * (L * (4 * H * H + 2 * H * F) + H * H + heads * H),
        square=4.0 * L * H,
        patch=2.0 * (wide * wide + vision.num_attention_heads * wide),
        feature=2.0 * H * D,
        image=2.0 * wide * D,
        product=2.0 * D * (2 if contrastive.loss == "clip" else 1),
    )


def table(config: Config) -> str:
    """Parameters, and FLOPs of an image of 512 x 512 pixels and of a text, a line each, as `counts.table`."""
    vision, contrastive, text_hidden = config.vision, config.contrastive, config.model.hidden_size
    count, flops, side = parameters(vision, text_hidden), image_flops(vision, text_hidden), 2 * (512 // 28 + 1)
    rows = [
        ("vision tower", count.tower),
        ("projector", count.projector),
        (f"FLOPs an image of {side} x {side} patches, forward", flops.forward((side, side))),
    ]
    if contrastive.loss != "none":
        beside, work = (
            contrastive_parameters(contrastive, vision, config.model.vocab_size),
            contrastive_flops(contrastive, vision),
        )
        rows += [
            ("contrastive: text encoder without embedding", beside.text_encoder),
            ("  embedding of texts", beside.text_embedding),
            ("  pools and scale", beside.pools + beside.scale),
            ("FLOPs a text of 64 tokens, forward", work.text(64)),
        ]
    return "\n".join(f"{name:<44}{value:>24,.0f}" for name, value in rows)
