"""What a run writes about itself: metrics.jsonl (an object a step), expert_load.jsonl, TensorBoard events, progress.

Only the first process writes. On resume everything is cut back to the checkpoint's step, so that no step stands twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from perilune.pretrain.step import StepResult, Validation


def cut_back(file: Path, step: int) -> None:
    """Keep the lines of `file` up to and including `step`; a line that a crash left half written goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= step:
            kept.append(line + "\n")
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)


def _last(file: Path, key: str) -> Any:
    """Of the lines of `file` that have `key`, the last one's."""
    found = None
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(line).get(key, found)
    return found


def _plain(value: Any) -> Any:
    """NaN and infinity have no JSON: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """The run's record. On processes other than the first every method does nothing."""

    def __init__(self, run_dir: Path, *, step: int, total_steps: int, log_every: int, writes: bool) -> None:
        self.writes = writes
        self.log_every = max(1, log_every)
        self._validated: dict[str, float | str] = {}
        self._valid_data: str | None = None  # the fingerprint of what was validated on before
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        for name in ("metrics.jsonl", "expert_load.jsonl"):
            cut_back(run_dir / name, step)
        self._valid_data = _last(run_dir / "metrics.jsonl", "valid_data")
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._load = (run_dir / "expert_load.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._progress = ProgressLines(step, total_steps)

    def step(self, step: int, tokens: int, result: StepResult, more: dict[str, float | None]) -> None:
        """Record a step: `tokens` consumed so far, `more` are lr, tokens_per_s, mfu, data_wait_s."""
        if not self.writes:
            return
        violations = _max_violations(result)
        entry: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            **more,
            "max_vio_mean": sum(violations) / len(violations) if violations else None,
            "max_vio_max": max(violations) if violations else None,
            "memory": result.memory,
            **self._validated,
        }
        if result.update_rms is not None:
            entry["update_rms"] = result.update_rms
        if result.pairs is not None:
            names = ("contrastive_loss", "pairs", "contrastive_scale", "contrastive_bias")
            entry |= {name: getattr(result, name) for name in names}
        if result.skipped:
            entry["skipped"] = True
        self._validated = {}
        self._metrics.write(json.dumps({key: _plain(value) for key, value in entry.items()}) + "\n")
        for key, value in entry.items():
            if key not in ("step", "tokens") and isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(key, value, step)
        if step % self.log_every == 0:
            self._progress.show(step, entry)
            if result.load_LE is not None:
                load = [[int(count) for count in layer] for layer in result.load_LE.tolist()]
                self._load.write(json.dumps({"step": step, "load": load}) + "\n")

    def validated(self, found: Validation, fingerprint: str) -> None:
        """A validation to stand with the next recorded step, on the dataset of that fingerprint."""
        self._validated = {"valid_loss": found.loss, "valid_bpb": found.bits_per_byte, "valid_data": fingerprint}
        if found.contrastive_loss is not None:
            self._validated["valid_contrastive_loss"] = found.contrastive_loss
        if self._valid_data not in (None, fingerprint):
            self.say(
                f"  the validation set was replaced (fingerprint {fingerprint}, before {self._valid_data}): what is "
                "measured on it from here on cannot be compared with what was before"
            )
        self._valid_data = fingerprint

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.writes:
            self._progress.say(text)

    def close(self) -> None:
        """Flush and close; the files are complete afterwards."""
        if self.writes:
            self._progress.close()
            self._board.close()
            self._metrics.close()
            self._load.close()


def _max_violations(result: StepResult) -> list[float]:
    """MaxVio of each expert layer: the fullest expert's load over the mean, minus 1 (arXiv 2408.15664, eq. 4)."""
    if result.load_LE is None:
        return []
    return (result.load_LE.amax(-1) / result.load_LE.mean(-1).clamp(min=1e-9) - 1).tolist()


class _Shown(ProgressColumn):
    def render(self, task: Any) -> str:
        return task.fields.get("shown", "")


class ProgressLines:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self._began, self._first = time.monotonic(), step
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                _Shown(),
                TimeRemainingColumn(compact=True),
                console=Console(),
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=step, shown="")
            self._bar.start()

    def show(self, step: int, entry: dict[str, Any]) -> None:
        """The newest step's figures."""
        shown = f"loss {entry['loss']:.4f}"
        if entry.get("contrastive_loss") is not None:
            shown += f"  contrastive {entry['contrastive_loss']:.4f}"
        shown += f"  {entry['tokens_per_s']:,.0f} tok/s"
        if entry["mfu"] is not None:
            shown += f"  MFU {entry['mfu']:.1%}"
        shown += f"  data wait {entry['data_wait_s'] * 1e3:.0f} ms"
        if "valid_bpb" in entry:
            shown += f"  valid {entry['valid_bpb']:.4f} bits/byte"
        if entry.get("skipped"):
            shown += "  SKIPPED (not finite)"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            return
        left = (time.monotonic() - self._began) / max(1, step - self._first) * (self.total_steps - step)
        print(f"step {step}/{self.total_steps}  {shown}  ETA {left:,.0f} s", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
