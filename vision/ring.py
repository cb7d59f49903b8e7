"""The features of other data-parallel ranks: all of them at once, or one rank's after the other around a ring.

Both carry gradients home: a rank's features get what the losses of all ranks say about them.

B pairs of this rank, C of another one, A of all ranks; D feature dim. Ranks may hold unequal numbers of pairs, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Ring:
    """The ranks of a group in a circle: each sends to the one before it and receives from the one after it."""

    sizes: tuple[int, ...]  # pairs of each rank
    rank: int
    group: dist.ProcessGroup | None  # None: this process alone

    @classmethod
    def of(cls, images_BD: torch.Tensor, texts_BD: torch.Tensor, group: dist.ProcessGroup | None) -> Ring:
        """The ring of `group`, whose ranks tell one another here how many pairs they hold.

        Raises ValueError, on every rank if on one, where images and texts do not pair up or widths differ.
        """
        paired = images_BD.ndim == texts_BD.ndim == 2
        mine = [*images_BD.shape, *texts_BD.shape] if paired else [-1] * 4
        if group is None or group.size() == 1:
            shapes = [mine]
        else:
            gathered = torch.empty(group.size() * 4, dtype=torch.int64, device=images_BD.device)
            dist.all_gather_into_tensor(gathered, torch.tensor(mine, device=images_BD.device), group=group)
            shapes = gathered.view(-1, 4).tolist()
        for rank, (images, width, texts, text_width) in enumerate(shapes):
            if images < 0 or (images, width) != (texts, text_width) or width != shapes[0][1]:
                raise ValueError(
                    f"rank {rank} holds images of [{images}, {width}] and texts of [{texts}, {text_width}] beside "
                    f"rank 0's images of [{shapes[0][0]}, {shapes[0][1]}] (-1: not a matrix): row i of both must be "
                    "one pair, and all features of one width"
                )
        return cls(tuple(shape[0] for shape in shapes), group.rank() if group is not None else 0, group)

    @property
    def first(self) -> int:
        """Where this rank's pairs begin among those of all ranks."""
        return sum(self.sizes[: self.rank])

    def gather(self, x_BD: torch.Tensor) -> torch.Tensor:
        """[A, D]: the features of all ranks in their order. Backward sums the gradients of all ranks."""
        most = max(self.sizes)
        if len(self.sizes) == 1 or most == 0:
            return x_BD
        # Filled up to the most: not every backend gathers unequal parts.
        every: torch.Tensor = _Gather.apply(F.pad(x_BD, (0, 0, 0, most - len(x_BD))), self.group)
        if min(self.sizes) == most:
            return every
        return torch.cat([part[:size] for part, size in zip(every.split(most), self.sizes, strict=True)])

    def chunks(self, x_BD: torch.Tensor) -> Iterator[torch.Tensor]:
        """The features [C, D] of every rank: at step h those of rank + h, so this rank's own first; without gradient.

        While the caller works on one chunk the next arrives; no others are held.
        """
        held_CD = x_BD
        for hop in range(len(self.sizes) - 1):
            arriving = self.pass_on(held_CD, hop, tag=0)
            yield held_CD
            held_CD = arriving()
        yield held_CD

    def pass_on(self, x_CD: torch.Tensor, hop: int, tag: int) -> Callable[[], torch.Tensor]:
        """Begin to send what is rank + `hop`'s to the rank before; the result waits for what is rank + `hop` + 1's.

        `tag` keeps apart what is under way at the same time. After as many hops as there are ranks all are home.
        """
        world = len(self.sizes)
        if world == 1:
            return lambda: x_CD
        arriving_CD = x_CD.new_empty(self.sizes[(self.rank + hop + 1) % world], x_CD.shape[1])
        before, after = (self.rank - 1) % world, (self.rank + 1) % world
        messages = [
            dist.P2POp(way, tensor, group=self.group, group_peer=peer, tag=tag)
            for way, tensor, peer in ((dist.isend, x_CD, before), (dist.irecv, arriving_CD, after))
            if tensor.numel()  # both ends know that there is nothing to send
        ]
        under_way = dist.batch_isend_irecv(messages) if messages else []

        def arrived() -> torch.Tensor:
            for message in under_way:
                message.wait()
            return arriving_CD

        return arrived


class _Gather(torch.autograd.Function):
    """[B, D] of each rank to [ranks B, D] on all, and the sum of their gradients back to where the rows came from."""

    @staticmethod
    def forward(ctx: Any, x_BD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        every = x_BD.new_empty(group.size() * x_BD.shape[0], x_BD.shape[1])
        dist.all_gather_into_tensor(every, x_BD.contiguous(), group=group)
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        mine_BD = grad.new_empty(grad.shape[0] // ctx.group.size(), grad.shape[1])
        dist.reduce_scatter_tensor(mine_BD, grad.contiguous(), group=ctx.group)
        return mine_BD, None
