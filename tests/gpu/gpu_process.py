"""A process kept alive for the one-GPU checks: with the GPU or without, with Transformer Engine or without.

Imports nothing heavy: in the new process this runs before torch and Megatron-core are there.
"""

from __future__ import annotations

import importlib
import sys
from types import TracebackType
from typing import Any

import pytest
import torch

from perilune.parallel.workers import Workers

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
MODULES = ("gpu_ranks", "gpu_slice", "gpu_contests")  # whose functions it runs
RUN_S = 100.0  # that one call may take; below pytest's limit a test, so that the process's own traceback is seen


class Process:
    """One process in a group of one: NCCL where it sees the GPU, gloo where it does not. It starts at the first call.

    With `te` False Transformer Engine is as good as not installed in it, so that Perilune's own modules compute.
    """

    def __init__(self, *, gpu: bool, te: bool = False) -> None:
        self._gpu, self._te = gpu, te
        # Where a CPU stands for the GPU, as many threads as the other: batched matmuls round by their number.
        self._pool = Workers(1, threads=4 if gpu and torch.cuda.is_available() else 1, timeout_s=RUN_S)

    def run(self, function: str, *arguments: Any) -> Any:
        """`function(*arguments)`, of one of MODULES, there.

        Raises WorkerError with its traceback; after any error the next call has a new process.
        """
        with pytest.MonkeyPatch.context() as patch:
            if not self._gpu:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            try:
                return self._pool.run(1, _call, self._te, function, *arguments)[0]
            except BaseException:  # pytest's time limit too: an answer that nobody waits for would be the next call's
                self._pool.close()
                raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.close()


def _call(te: bool, function: str, *arguments: Any) -> Any:
    if not te:
        for name in TRANSFORMER_ENGINE:
            sys.modules[name] = None  # type: ignore[assignment]  # "not installed", to import and to find_spec
    found = [getattr(module, function, None) for module in map(importlib.import_module, MODULES)]
    return next(filter(None, found))(*arguments)
