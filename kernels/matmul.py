"""In which type a CPU multiplies bf16: in its own, or in fp32 where that is faster.

AVX2 alone multiplies bf16 at a twentieth of its fp32 rate, some Intel CPUs with AVX512_BF16 at half of it, AMD's and
AMX at twice and more (docs/performance.md). The product of two bf16 numbers is exact in fp32, and sums are fp32 either
way: only their order differs, and what is not rounded to bf16 before the next operation.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch

_SIZE, _TRIES = 256, 5  # of the matmuls that are timed: some milliseconds, tens where bf16 is very slow


def working(x: torch.Tensor) -> torch.dtype:
    """The type in which `x` is to be multiplied: fp32 for bf16 on a CPU that is slower with it, else its own."""
    slow = x.device.type == "cpu" and x.dtype is torch.bfloat16 and slow_bf16()
    return torch.float32 if slow else x.dtype


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in its working type."""
    return x.to(working(x))


def cast(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`x` in the type of `buffer`, in its memory where that is another type."""
    return x if x.dtype == buffer.dtype else buffer[: x.numel()].view(x.shape).copy_(x)


@functools.cache
def slow_bf16() -> bool:
    """Whether this CPU multiplies bf16 more slowly than fp32, by the fastest of some small matmuls of each.

    On a thread of its own, so that no profiler or counter of FLOPs sees them.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}

    def race() -> None:
        for _ in range(_TRIES):
            for dtype in best:
                a = torch.ones(_SIZE, _SIZE, dtype=dtype)
                began = time.perf_counter()
                a @ a
                best[dtype] = min(best[dtype], time.perf_counter() - began)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(race).result()
    return best[torch.bfloat16] > best[torch.float32]
