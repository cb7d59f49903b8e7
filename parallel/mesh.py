"""The axes of a run: their degrees checked together, then the process and Megatron-core's groups brought up.

Mesh *axis* (tp, pp, ep, ...) against tensor *dim*. The attention axes are tp x cp x dp x pp = world; the experts split
the same processes as etp x ep x expert-dp x pp.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a launcher checks degrees without the seconds that importing torch takes
    import torch

# Token dispatchers that are backends of Megatron-core's flex dispatcher, by their name here; both need a GPU.
FLEX_BACKENDS = {"flex": "deepep", "hybridep": "hybridep"}


class LayoutError(ValueError):
    """Degrees that do not fit; the message holds every number, the rule and a remedy."""


@dataclass(frozen=True)
class Mesh:
    """The degrees of every axis of a run of `world` processes."""

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        degrees = self.describe()
        for axis in ("world", "tp", "pp", "vpp", "cp", "ep", "etp"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"parallel.{axis}={getattr(self, axis)}: a degree is at least 1 ({degrees})")
        model = self.tp * self.pp * self.cp
        if self.world % model:
            below, above = self.world // model * model, (self.world // model + 1) * model
            fits = " or ".join(str(n) for n in (below, above) if n)
            raise LayoutError(
                f"tp*pp*cp = {self.tp}*{self.pp}*{self.cp} = {model} does not divide {self.world} processes "
                f"({degrees}); start {fits} processes, or set {self._near(self.world, 'tp', 'pp', 'cp')}"
            )
        expert = self.etp * self.ep * self.pp
        if self.world % expert:
            raise LayoutError(
                f"etp*ep*pp = {self.etp}*{self.ep}*{self.pp} = {expert} does not divide {self.world} processes "
                f"({degrees}); set {self._near(self.world, 'ep', 'etp', 'pp')}"
            )
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"parallel.vpp={self.vpp} needs a pipeline: set parallel.pp > 1 or parallel.vpp=1")

    def _near(self, world: int, *axes: str) -> str:
        """Which single degree, nearest to what was asked for, would make the product of `axes` divide `world`."""
        offers = []
        for axis in axes:
            others = math.prod(getattr(self, other) for other in axes if other != axis)
            asked = getattr(self, axis)
            fits = [] if world % others else _divisors(world // others)
            near = [
                max((n for n in fits if n < asked), default=None),
                min((n for n in fits if n > asked), default=None),
            ]
            if any(near):
                offers.append(f"{axis}={' or '.join(str(n) for n in near if n)}")
        return ", or ".join(offers) if offers else f"two of {', '.join(axes)}: no single one of them helps"

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees its own rows."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Copies of each expert."""
        return self.world // (self.etp * self.ep * self.pp)

    def describe(self) -> str:
        """All degrees in one line."""
        return f"world={self.world}: tp={self.tp} pp={self.pp} vpp={self.vpp} cp={self.cp} ep={self.ep} etp={self.etp}"


def _divisors(number: int) -> list[int]:
    """In pairs up to the root: a world with a digit too many must not take minutes."""
    small = [n for n in range(1, min(math.isqrt(number), 1_000_000) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def device() -> torch.device:
    """Where this process computes: its GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def start(mesh: Mesh, timeout_s: float = 600.0) -> None:
    """Join the process group (from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and build Megatron-core's groups.

    gloo on CPU, NCCL on GPU. Every wait in a collective ends after `timeout_s` seconds with an error.
    """
    import torch
    import torch.distributed as dist

    from perilune.parallel import cpu, store

    store.serve()  # others may wait for it already
    cpu.install()
    from megatron.core import parallel_state

    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    if dist.get_world_size() != mesh.world:
        raise LayoutError(f"{dist.get_world_size()} processes were started for a mesh of {mesh.describe()}")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        create_gloo_process_groups=False,  # on CPU every group is gloo already; on GPU nothing here needs them
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
    )
    # Megatron's layers ask its tracker for a state even where nothing is random (no dropout, weights from moe/init.py).
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)


def stop(leave_group: bool = True) -> None:
    """Take Megatron-core's groups down, and the process group too unless it is kept for another mesh."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if leave_group and dist.is_initialized():
        dist.destroy_process_group()
