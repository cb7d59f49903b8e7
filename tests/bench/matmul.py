"""How fast this machine multiplies and copies: what other figures are fractions of."""

from __future__ import annotations

import statistics
import time

import torch


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s: the median of the matmuls that one second holds, and of five at least."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1:
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def copy_rate(size: int = 1 << 28) -> float:
    """Bytes/s that all threads read and write together, each counted: the median of a second's copies, five at least.

    Of `size` bytes, by default 256 MB, which no cache holds.
    """
    a, b = (torch.ones(size // 4) for _ in range(2))
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1:
        began = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times)


def why_not_bf16() -> str:
    """Why a step in bf16 is not measured: this CPU multiplies it far slower than fp32 (AVX2 alone: 1/20). Empty else.

    It would take minutes.
    """
    single, half = (matmul_rate(dtype, 256) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    if half >= single / 8:
        return ""
    why = f"this CPU multiplies bf16 at {half:.1f} GFLOP/s, fp32 at {single:.0f}"
    print(f"bf16: not measured, for {why}", flush=True)
    return why
