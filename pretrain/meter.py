"""The speed of a step, and the peak that MFU is a fraction of: a GPU's published figure, a CPU's measured matmul."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from perilune.kernels import matmul
from perilune.parallel import precision
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.plan import hardware
from perilune.pretrain.plan.frozen import training_flops
from perilune.pretrain.plan.vision_counts import contrastive_flops
from perilune.pretrain.schema import Config
from perilune.pretrain.timetable import StepPlan


@cache
def peak(dtype: torch.dtype) -> tuple[str, float | None]:
    """(name of the peak, FLOP/s of one process's device or None where it is not known).

    On a CPU all processes call this at the same time, so that each measures its share of the machine.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        name = hardware.named_in(device)
        if name is not None and dtype is torch.bfloat16:
            tflops = hardware.BF16_TFLOPS[name]
            return f"{name} dense bf16, {tflops} TFLOP/s", tflops * 1e12
        return f"unknown for {device} in {dtype}", None
    n, worked = 1024, matmul.working(torch.empty(0, dtype=dtype))  # the type in which this CPU multiplies it
    a, b = torch.randn(n, n, dtype=worked), torch.randn(n, n, dtype=worked)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    rate = 2 * n**3 / best
    return f"measured {n}x{n} matmul in {str(worked)[6:]}, {rate / 1e9:.0f} GFLOP/s a process", rate


class Meter:
    """Speed of a step: tokens a second of the whole run, MFU, and how long it waited for data."""

    def __init__(self, config: Config, world: int, dp: int) -> None:
        peak_name, peak_rate = peak(precision.dtype(config.precision.compute))
        self.name = f"MFU of {peak_name}"
        self._seq_len = config.data.seq_len
        self._flops, self._dp = training_flops(config), dp
        self._compares = config.contrastive.loss != "none"
        self._contrast = contrastive_flops(config.contrastive, config.vision)
        self._peak = peak_rate * world if peak_rate else None

    def start(self) -> None:
        self._began = time.perf_counter()

    def data_ready(self) -> None:
        self._data_wait = time.perf_counter() - self._began

    def figures(self, todo: StepPlan, batches: Sequence[PackedBatch]) -> dict[str, float | None]:
        """Of the step just done; `batches` are this rank's, whose images stand for those of all data-parallel ranks."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, tokens = time.perf_counter() - self._began, todo.rows * self._seq_len
        images = self._dp * sum(self._flops.image.forward((d, a)) for batch in batches for d, a in batch.grids.tolist())
        if self._compares:
            images += self._dp * sum(map(self._comparing, batches))
        return {
            "lr": todo.lr,
            "tokens_per_s": tokens / seconds,
            "mfu": (tokens * self._flops.token + images) / seconds / self._peak if self._peak else None,
            "data_wait_s": self._data_wait,
        }

    def _comparing(self, batch: PackedBatch) -> float:
        """FLOPs of this rank, of one micro-batch: its images beside the texts of as many ranks with as many pairs."""
        pairs = pairs_of(batch)
        texts, patches = pairs.cu_seqlens.diff().tolist(), batch.grids.prod(-1).tolist()
        return 3 * self._contrast.forward(texts, patches, self._dp * len(pairs) ** 2)
