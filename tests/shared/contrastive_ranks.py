"""What the processes of tests/vision/test_contrastive.py do; each function runs on every rank of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perilune.parallel import mesh as meshes
from perilune.vision import contrastive


class Memory(TorchDispatchMode):
    """Of the tensors that operations made: the numbers in the largest, and the most bytes alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


Found = dict[str, dict[str, torch.Tensor]]  # objective -> what -> on the CPU


@dataclass(frozen=True)
class Case:
    """Features of as many ranks as there are in `images`, one matrix each."""

    images: Sequence[torch.Tensor]
    texts: Sequence[torch.Tensor]


def on_first_ranks(cases: Sequence[Case]) -> list[Found | str | None]:
    """Each case on the first ranks, as many as it needs, together: see `objectives`; None on the others.

    A case that is refused gives the message instead.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(meshes.device())
    rank, found = dist.get_rank(), list[Found | str | None]()
    groups = {size: dist.new_group(range(size)) for size in sorted({len(case.images) for case in cases})}
    for case in cases:
        if rank >= len(case.images):
            found.append(None)
            continue
        try:
            found.append(objectives(case.images[rank], case.texts[rank], groups[len(case.images)]))
        except ValueError as error:
            found.append(str(error))
    return found


def objectives(images: torch.Tensor, texts: torch.Tensor, group: dist.ProcessGroup | None) -> Found:
    """Sum, count and gradients of this rank's part of the batch, and what `Memory` saw; by objective.

    Scales and bias are not those of a first step, so that each matters.
    """
    found: Found = {}
    temperature, sigmoid = contrastive.Temperature(initial=5.0), contrastive.SigmoidScale(initial=3.0, bias=-1.5)
    for name, module in (("clip", temperature), ("siglip", sigmoid)):
        module.to(meshes.device(), images.dtype)
        x, y = (x.to(meshes.device(), copy=True).requires_grad_() for x in (images, texts))
        with Memory() as memory:
            if name == "clip":
                loss, count = contrastive.clip(x, y, temperature(), group)
            else:
                loss, count = contrastive.siglip(x, y, *sigmoid(), group)
            loss.backward()
        gradients = {"images": x.grad, "texts": y.grad, **{key: p.grad for key, p in module.named_parameters()}}
        assert all(gradient is not None for gradient in gradients.values())
        seen = {"loss": loss.detach(), "count": count, **gradients}
        found[name] = {key: value.cpu() for key, value in seen.items() if value is not None}
        found[name] |= {"largest": torch.tensor(memory.largest), "peak": torch.tensor(memory.peak)}
    return found
