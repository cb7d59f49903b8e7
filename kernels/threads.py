"""The parts of an operation that need nothing of each other, on threads of their own, for CPUs.

A matmul of a few hundred rows is too small to be shared: two threads reach two thirds of twice the rate of one. Where
an operation has many such matmuls, of experts or of heads, each thread takes whole ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

MOST = 8  # that share an operation: between two matmuls each waits for Python's lock
_SOFT = 1  # omp_pause_soft of OpenMP 5.0, section 3.2.44: what was set stays
SHARED = 0.75  # of a thread's own rate, about: what each of several gets out of a matmul that they share


def available() -> int:
    """Threads that `share` can use. One where a profiler or a FLOP counter looks, which sees its own thread alone."""
    looked_at = torch.autograd._profiler_enabled() or _get_current_dispatch_mode() is not None
    return 1 if looked_at else min(MOST, torch.get_num_threads())


def worth(sizes: Sequence[int]) -> int:
    """Threads for items of these sizes: one, whose matmuls then share the cores, where one item is most of the work."""
    threads = min(available(), len(sizes))
    return threads if threads > 1 and max(sizes) * threads * SHARED <= sum(sizes) else 1


def share[T](work: Callable[[Iterator[T]], None], items: Sequence[T], threads: int) -> None:
    """Call `work` on each of so many threads with an iterator; together they draw every item once, in order.

    What `work` writes must not overlap between items, and no gradient is recorded. Raises what `work` raised, after all
    threads have ended.
    """
    if threads == 1:
        return work(iter(items))
    left = list(reversed(items))
    before, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if threads > before // 2:
        _end_spinning()

    def draw(number: int) -> None:
        # Each thread has a number of its own.
        torch.set_num_threads(max(1, before // threads + (number < before % threads)))
        with torch.inference_mode(inference), torch.no_grad():
            work(_drawn(left))

    others: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # no thread can be started (Python is ending): this one does all
            for number in range(1, threads):
                others.append(_pool().submit(draw, number))
        draw(0)
    finally:
        try:
            wait(others)
        finally:
            torch.set_num_threads(before)
    for other in others:
        other.result()


def _end_spinning() -> None:
    """Let OpenMP's threads end, which the next operation that shares starts anew (0.15 ms).

    They wait for it spinning, for milliseconds, on the cores that ours need: on two cores that took 3% of a step.
    """
    if (pause := _pause()) is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of GNU's OpenMP, if torch runs on that."""
    try:
        found: Callable[[int], int] = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    return found


def _drawn[T](left: list[T]) -> Iterator[T]:
    """Items taken off the end of a list that others take from too."""
    with contextlib.suppress(IndexError):
        while True:
            yield left.pop()


_pools: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pools.clear)  # threads stay behind


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(MOST - 1, "perilune-kernels"))
    return _pools[0]
