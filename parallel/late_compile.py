"""Megatron-core imported without its compiler: what it decorates with torch.compile is compiled when first called.

2026-11, megatron-core 0.19.2: some twenty small functions are decorated as the modules are imported, and the first
decoration imports TorchDynamo and TorchInductor, a third of the CPU seconds that importing takes. All but one belong to
fusions that Perilune leaves off; that one counts tokens in the router. On a CPU it runs as it is written: compiling it
would take seconds of every start. tests/test_start.py fails once upstream no longer does that.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any


def import_megatron_core() -> None:
    """Import what a run needs of Megatron-core; afterwards `torch.compile` is torch's own again.

    Half a million objects come to stay: Python's collector would go through them again and again, a seventh of the CPU
    seconds of importing, and after it at each collection.
    """
    if "megatron.core" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        _import()
    finally:
        if collecting:
            gc.enable()
    gc.freeze()


def _import() -> None:
    import torch

    own = torch.compile
    as_written = not torch.cuda.is_available()
    torch.compile = functools.partial(_when_called, own, as_written)  # type: ignore[assignment]
    try:
        for name in ("distributed", "models.gpt", "models.gpt.moe_module_specs", "optimizer"):
            importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = own


def _when_called(compiler: Callable[..., Any], as_written: bool, function: Any = None, **options: Any) -> Any:
    """`torch.compile`, as a call and as a decorator with options, that waits for a call, or for ever."""
    import torch

    if function is None:
        return functools.partial(_when_called, compiler, as_written, **options)
    if as_written:
        return function
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def late(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # called by a function that is being compiled: a part of it
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compiler(function, **options))
        return compiled[0](*args, **kwargs)

    return late
