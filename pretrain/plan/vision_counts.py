"""Analytic counts of the vision side: parameters of MoonViT and the projector, and FLOPs of an image.

As in `counts.py` only matrix products count, a matmul costs 2 FLOPs a weight and token, and training is three forwards.
The interpolation of positions, norms, softmax, GELU and RoPE are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from perilune.pretrain.schema import Vision


@dataclass(frozen=True)
class VisionCount:
    """Parameters in numbers of elements."""

    tower: int
    projector: int

    @property
    def total(self) -> int:
        return self.tower + self.projector


def parameters(vision: Vision, text_hidden: int) -> VisionCount:
    """Of MoonViT (arXiv 2504.07491, section 2.1) and of the projector to a decoder of hidden size `text_hidden`.

    Zero where `vision` has no layers.
    """
    if not vision.num_layers:
        return VisionCount(0, 0)
    H, F, pixels = vision.hidden_size, vision.intermediate_size, 3 * vision.patch_size**2
    block = 2 * 2 * H + (3 * H * H + 3 * H) + (H * H + H) + (H * F + F) + (F * H + H)
    embedding = pixels * H + H + vision.pos_emb_height * vision.pos_emb_width * H
    merged = vision.merge_size**2 * H
    projector = 2 * H + (merged * merged + merged) + (merged * text_hidden + text_hidden)
    return VisionCount(embedding + vision.num_layers * block + 2 * H, projector)


def per_rank(vision: Vision, text_hidden: int, tp: int) -> int:
    """Elements of both on a rank of the first pipeline stage: matrices are split over tp, as their outer biases are."""
    if not vision.num_layers:
        return 0
    H, F, L, merged = vision.hidden_size, vision.intermediate_size, vision.num_layers, vision.merge_size**2
    blocks = L * (3 * H * H + 3 * H + H * H + H * F + F + F * H)
    projector = merged * H * merged * H + merged * H + merged * H * text_hidden
    split = blocks + projector
    return parameters(vision, text_hidden).total - split + split // tp


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


def table(vision: Vision, text_hidden: int) -> str:
    """Parameters, and FLOPs of an image of 512 x 512 pixels, a line each, as `counts.table`."""
    count, flops, side = parameters(vision, text_hidden), image_flops(vision, text_hidden), 2 * (512 // 28 + 1)
    rows = [
        ("vision tower", count.tower),
        ("projector", count.projector),
        (f"FLOPs an image of {side} x {side} patches, forward", flops.forward((side, side))),
    ]
    return "\n".join(f"{name:<44}{value:>24,.0f}" for name, value in rows)
