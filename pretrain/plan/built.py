"""What Megatron-core would build on any rank of a layout, without memory and without the other processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules
from perilune.pretrain.optim.matrices import is_muons
from perilune.pretrain.plan.ranks import RankCount
from perilune.pretrain.schema import Config


def count_rank(config: Config, world: int, pp_rank: int, *, trained: bool = False) -> RankCount:
    """Count the weights of a model built on the meta device as the first process of pipeline stage `pp_rank`: all, or
    those that are `trained` alone, and the router biases that move.

    Uses torch's fake process group: no process group may be up in this process. Collectives of the build do nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mesh = rules.mesh_of(config, world)
    dist.init_process_group("fake", store=FakeStore(), rank=pp_rank * (world // mesh.pp), world_size=world)
    try:
        meshes.start(mesh)
        with torch.device("meta"):
            parts = models.build_chunks(config, mesh)
    finally:
        meshes.stop()
    frozen = config.train.freeze if trained else ()  # as models.build freezes, by the names
    named = [item for part in parts for item in part.named_parameters() if rules.part_of(item[0]) not in frozen]
    buffers = [item for part in parts for item in part.named_buffers() if rules.part_of(item[0]) not in frozen]
    biases = [buffer for name, buffer in buffers if name.endswith("expert_bias")]

    def size(*marks: str) -> int:
        return sum(p.numel() for name, p in named if any(mark in name for mark in marks))

    experts = size(".experts.w")
    return RankCount(
        dense=sum(p.numel() for _, p in named) - experts,
        experts=experts,
        embedding=size("word_embeddings"),
        head=size("output_layer"),
        router_bias=sum(bias.numel() for bias in biases),
        vectors=sum(p.numel() for name, p in named if not is_muons(name, p.ndim)),
    )
