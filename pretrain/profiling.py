"""Where time and memory go: a trace that Perfetto opens, and what to say when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from perilune.pretrain.optim.average import average_of

_WARM, _TRACED = 2, 2  # steps before the trace, and in it


class Trace:
    """A profile of a few warm steps of this process, written to `run_dir/profile/rank_N.json.gz`."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "profile"
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        plan = torch.profiler.schedule(wait=0, warmup=_WARM, active=_TRACED, repeat=1)
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=plan, on_trace_ready=self._write, profile_memory=True, record_shapes=True
        )
        self._profiler.start()
        self._left = _WARM + _TRACED

    def step(self, say: Callable[[str], None]) -> bool:
        """Call after each step; True once the trace is written."""
        self._profiler.step()
        self._left -= 1
        if self._left:
            return False
        self._profiler.stop()
        say(f"profile of {_TRACED} steps: {self._folder} (open a file at ui.perfetto.dev)")
        return True

    def _write(self, profiler: Any) -> None:
        rank = f"rank_{dist.get_rank()}"
        profiler.export_chrome_trace(str(self._folder / f"{rank}.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=40)
        (self._folder / f"{rank}.txt").write_text(table, encoding="utf-8")


@contextlib.contextmanager
def explain_out_of_memory(run_dir: Path, chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Where an allocation fails, write what this process holds by part and add the largest part to the error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in text:
            raise
        parts = held(chunks, optimizer)
        largest = max(parts, key=lambda name: parts[name])
        file = run_dir / f"out_of_memory_rank_{dist.get_rank()}.txt"
        lines = [f"{size / 2**30:10.3f} GiB  {name}" for name, size in parts.items()]
        if torch.cuda.is_available():
            lines.append(torch.cuda.memory_summary())
            torch.cuda.memory._dump_snapshot(str(file.with_suffix(".pickle")))  # for pytorch.org/memory_viz
        file.write_text("\n".join([text, "", *lines]) + "\n", encoding="utf-8")
        raise MemoryError(
            f"out of memory on rank {dist.get_rank()}; the largest part is {largest} with "
            f"{parts[largest] / 2**30:.2f} GiB (all parts: {file}). Fewer rows a micro-batch (train.micro_batch_size), "
            "shorter rows, or more parallel.pp, tp or ep make it smaller"
        ) from error


def held(chunks: Sequence[torch.nn.Module], optimizer: Any) -> dict[str, int]:
    """Bytes that this process holds by part. Activations are what is allocated beyond the rest (GPU only)."""
    weights = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    buffers = (getattr(p, "main_grad", None) for chunk in chunks for p in chunk.parameters())
    gradients = sum(b.numel() * b.element_size() for b in buffers if b is not None)
    state = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):  # a stage without such weights
            continue
        for values in part.optimizer.state.values():
            state += sum(t.numel() * t.element_size() for t in values.values() if isinstance(t, torch.Tensor))
        if (average := average_of(part)) is not None:
            state += sum(t.numel() * t.element_size() for t in average.of.values())
        state += sum(t.numel() * t.element_size() for group in part.param_groups for t in group["params"])
    parts = {"weights": weights, "gradients": gradients, "optimizer state": state}
    if torch.cuda.is_available():
        rest = torch.cuda.max_memory_allocated() - sum(parts.values())
        parts["activations and temporary tensors"] = max(0, rest)
    return parts
