"""Seconds on the device at hand, and its memory given back."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(act: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - began


def free() -> None:
    """Give memory back: the checks' processes share the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
