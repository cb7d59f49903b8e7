"""Tower and projector alone, without a decoder: functions of `parallel.workers.Workers`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from perilune.moe.init import draw_weights
from perilune.parallel import mesh as meshes
from perilune.parallel.mesh import Mesh
from perilune.pretrain.schema import Vision
from perilune.vision.moonvit import MoonViT, VisionConfig
from perilune.vision.projector import Projector

# The table is not square, so that its sides cannot be mistaken for one another.
VISION = Vision(
    num_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, pos_emb_height=4, pos_emb_width=6
)
TEXT = 24
GRIDS = [(4, 8), (2, 2), (6, 4)]


@dataclass(frozen=True)
class Piece:
    """This rank's part of a gradient, at `offset` in the whole."""

    offset: tuple[int, ...]
    whole: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Run:
    """A forward and a backward pass."""

    features: torch.Tensor  # [M, TEXT]
    gradients: dict[str, Piece]
    kept: int  # numbers that forward kept for backward, besides weights and patches


def run(recompute: str = "none", modules: tuple[str, ...] = ()) -> Run:
    """Tower and projector split over all ranks, drawn weights, images of GRIDS."""
    mesh = Mesh(world=dist.get_world_size(), tp=dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    config = VisionConfig(VISION, TEXT, mesh, recompute_granularity=recompute, recompute_modules=modules)
    parts: dict[str, MoonViT | Projector] = {"tower": MoonViT(config), "projector": Projector(config)}
    for part in parts.values():
        draw_weights(part, seed=1, std=0.2)
    weights = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith("bias"):
                weight.fill_(0.1)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(down * across for down, across in GRIDS), 3, 14, 14, generator=generator)
    given = {x.data_ptr() for x in (patches, *weights.values())}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in given:
            kept[x.data_ptr()] = max(kept.get(x.data_ptr(), 0), x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = parts["projector"](parts["tower"](patches, torch.tensor(GRIDS)))
    (features * torch.randn(features.shape, generator=generator)).sum().backward()
    gradients = {}
    for owner, part in parts.items():
        for key, shard in part.sharded_state_dict().items():
            weight = weights.get(f"{owner}.{key}")
            if weight is not None:
                assert weight.grad is not None
                gradients[f"{owner}.{key}"] = Piece(shard.global_offset, shard.global_shape, weight.grad)
    assert gradients.keys() == weights.keys()
    return Run(features.detach(), gradients, sum(kept.values()))


def published(dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each parameter of MoonViT-SO-400M and its projector to Moonlight, none of them allocated."""
    mesh = Mesh(world=1)
    meshes.start(mesh, timeout_s=60)
    with torch.device("meta"):
        config = VisionConfig(Vision(num_layers=27), 2048, mesh, dtype)
        return [(tuple(p.shape), p.dtype) for part in (MoonViT(config), Projector(config)) for p in part.parameters()]


def refused(patches: int, grids: list[tuple[int, int]]) -> str:
    """What the tower says of so many patches of such images."""
    mesh = Mesh(world=1)
    meshes.start(mesh, timeout_s=60)
    tower = MoonViT(VisionConfig(VISION, TEXT, mesh))
    try:
        tower(torch.zeros(patches, 3, 14, 14), torch.tensor(grids))
    except ValueError as error:
        return str(error)
    return ""
