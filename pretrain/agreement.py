"""All ranks or none: an action that fails on one rank raises on every rank, with the reasons of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from perilune.pretrain.errors import InputError


class Ranks:
    """The processes of `group` (None: all), for messages of one thread: another thread needs a group of its own.

    Every method is collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def gathered[T](self, value: T) -> list[T]:
        """`value` of every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def everywhere[T](self, action: Callable[[], T], kind: Callable[[str], Exception], doing: str) -> T:
        """`action()` of this rank; if it fails on any rank, every rank raises `kind` with the reasons of all."""
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            failure = error
        reasons = self.gathered(None if failure is None else _reason(failure))
        said = list(dict.fromkeys(reason for reason in reasons if reason is not None))
        if said:
            where = [rank for rank, reason in enumerate(reasons) if reason is not None]
            raise kind(f"{doing} failed on rank {', '.join(map(str, where))}: {'; '.join(said)}") from failure
        return result  # type: ignore[return-value]

    def on_first[T](self, action: Callable[[], T], kind: Callable[[str], Exception], doing: str) -> T:
        """`action()` of rank 0, given to all; if it fails, every rank raises."""
        result = self.everywhere(lambda: action() if self.rank == 0 else None, kind, doing)
        box = [result]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's, raised on every rank with the causes of all
        return "; ".join(f"rank {rank}: {_reason(cause)}" for rank, (cause, _) in error.failures.items())
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
