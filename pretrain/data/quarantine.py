"""Agreement of a run's processes on which rows are damaged, so that all replace the same ones and save one state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from perilune.parallel import mesh as meshes
from perilune.pretrain.data.prefetch import Finding


def over_all_ranks(findings: Sequence[Finding]) -> list[Finding]:
    """What any rank found, in the order of ranks and the same on all; each calls this once for every batch it reads.

    Ranks that hold parts of one model read the same rows from different machines: a disk that is bad on one of them
    must not make their inputs differ.
    """
    if not dist.is_initialized():
        return list(findings)
    some = torch.tensor([bool(findings)], dtype=torch.int32, device=meshes.device())
    dist.all_reduce(some, op=dist.ReduceOp.MAX)
    if not some.item():
        return []
    parts: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(findings))
    return [finding for part in parts for finding in part]
