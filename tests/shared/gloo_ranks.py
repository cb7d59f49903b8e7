"""What the processes of tests/kernels/test_cross_entropy.py and of some of tests/parallel do."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from perilune.kernels import cross_entropy
from perilune.parallel import cpu
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules, step
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.objective import next_token
from perilune.pretrain.schema import Config


def uneven(patched: bool) -> Any:
    """Parts of one and two rows gathered, and a gradient of three rows scattered back."""
    cpu.install()
    group, rank = dist.group.WORLD, dist.get_rank()
    gather = cpu._gather_uneven if patched else cpu._GATHER
    scatter = cpu._reduce_scatter_uneven if patched else cpu._REDUCE_SCATTER
    found = []
    for call in (
        lambda: gather(torch.full((rank + 1, 2), float(rank)), group, [1, 2]),
        lambda: scatter(torch.arange(6.0).view(3, 2), group, [1, 2]),
        lambda: gather(torch.zeros(0, 2), group, [0, 0]),
    ):
        try:
            found.append(call().tolist())
        except (RuntimeError, ValueError) as error:
            found.append(type(error).__name__)
    return found


def split_head(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, kept: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, the gradient of `hidden` summed over ranks, and that of this rank's rows of `weight`."""
    hidden = hidden.clone().requires_grad_()
    mine = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    with mock.patch.multiple(cross_entropy, KEPT=kept, CHUNK=chunk):
        losses = cross_entropy.linear_cross_entropy(hidden, mine, labels, dist.group.WORLD)
        losses.backward(upstream)
    assert hidden.grad is not None and mine.grad is not None
    dist.all_reduce(hidden.grad)
    return losses.detach(), hidden.grad, mine.grad


def validate(config: Config, batches: list[tuple[PackedBatch, int]]) -> tuple[float, float]:
    """Loss and bits a byte of a new model, the same in every layout, on batches that every rank is given."""
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    return step.evaluate(models.build(config, mesh), iter(batches), next_token)[:2]


def kernels_called(config: Config, batch: PackedBatch) -> dict[str, int]:
    """How often a forward of a model as it is built calls each kernel that stands for a part of Megatron-core's."""
    names = ("linear", "rotate_tails", "keys_and_values", "swiglu")
    with contextlib.ExitStack() as stack:
        spies = {name: stack.enter_context(mock.patch.object(cpu, name, wraps=getattr(cpu, name))) for name in names}
        validate(config, [(batch, 1)])
    return {name: spy.call_count for name, spy in spies.items()}


def not_gathered(config: Config, batch: PackedBatch) -> list[str]:
    """Weights that a forward has read without waiting until they were gathered, where each has its own bucket."""
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    of_megatron = models.DistributedDataParallelConfig
    with mock.patch.object(
        models, "DistributedDataParallelConfig", lambda **options: of_megatron(**(options | {"bucket_size": 1}))
    ):
        model = models.build(config, mesh)
    step.evaluate(model, iter([(batch, 1)]), next_token)
    (chunk,) = model.chunks
    group = chunk.param_to_bucket_group
    return [
        name
        for name, parameter in model.bare()[0].named_parameters()
        if not group[parameter].param_gather_dispatched or group[parameter].param_gather_handle is not None
    ]
