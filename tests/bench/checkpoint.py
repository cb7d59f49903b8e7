"""Checkpoints and exports beside `dd` of the same bytes, and the stall of training with and without async saves.

    .venv/bin/python tests/bench/checkpoint.py [--rounds 5] [--json FILE]

Saves are of `proxy_100m` with its optimizer's state (in fp32 where the CPU emulates bf16), into a folder that keeps
what it has; the export is the command, from the start of its process, of a model of 4 GB (fp32, weights only). The
rival is `dd bs=1M conv=fsync` of the files just written. The stall of a save is the time for which the training loop
stands still: the call, the wait before the next update, and the wait for what is left at the end; what the writer takes
of the cores is told apart, as the time by which the step under which it writes is longer. Rounds alternate, figures are
medians. Needs 14 GB of disk in --folder and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch
import torch.distributed as dist
from matmul import why_not_bf16

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, presets, rules
from perilune.pretrain import model as models
from perilune.pretrain.checkpoint_saver import Saver
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.schema import Config, Precision
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

ROWS = 2  # of the preset's seq_len a step
MEMORY = 1.5e9  # bytes that an export may take


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def dd(sources: list[Path], target: Path) -> float:
    """Seconds that `dd` takes for the bytes of all `sources`, one after the other; the copies are removed."""
    taken = 0.0
    for source in sources:
        command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"]
        taken += seconds(lambda command=command: subprocess.run(command, check=True))
        target.unlink()
    os.sync()
    return taken


@contextmanager
def built(config: Config) -> Iterator[models.Model]:
    mesh = rules.mesh_of(config, 1)
    meshes.start(mesh)
    yield models.build(config, mesh)
    meshes.stop(leave_group=False)


class Training:
    """`proxy_100m` on one batch."""

    def __init__(self, config: Config, net: models.Model) -> None:
        self.net, self.optimizer = net, optimizer.build(config, net)
        rng, length = np.random.default_rng(0), config.data.seq_len
        bounds, mask = np.array([0, length], np.int32), np.ones(length, np.uint8)
        drawn = rng.integers(0, config.model.vocab_size, (ROWS, length)).astype(np.uint16)
        rows = [Row(str(i), tokens, bounds, mask) for i, tokens in enumerate(drawn)]
        self._batch = collate(rows, config.model.num_nextn_predict_layers, True)
        self._todo = StepPlan(rows=ROWS, lr=1e-4, mtp_weight=0.3, bias_speed=1e-3)

    def step(self, saver: Saver | None = None) -> tuple[float, float]:
        """(seconds of a step, of which it waited for `saver`)."""
        waited = 0.0

        def wait() -> None:
            nonlocal waited
            waited = seconds(saver.before_update) if saver else 0.0

        taken = seconds(
            lambda: train_step(
                self.net, self.optimizer, [self._batch], next_token, self._todo, clip=1.0, before_update=wait
            )
        )
        return taken, waited


def saves(folder: Path, rounds: int) -> list[dict[str, object]]:
    config = presets.get("proxy_100m")
    if why_not_bf16():
        config = replace(config, precision=Precision(compute="fp32"))
    with built(config) as net:
        training = Training(config, net)
        for _ in range(2):
            training.step()

        def saver(in_background: bool) -> Saver:
            train = replace(config.train, async_save=in_background, keep=0)
            return Saver(folder / f"{in_background}", replace(config, train=train))

        savers = {in_background: saver(in_background) for in_background in (False, True)}
        speed, stalls, slower = [], [], []
        for at in range(1, rounds + 1):
            alone, _ = training.step()
            stall, step = {}, {}
            for in_background, one in savers.items():
                called = seconds(lambda one=one, at=at: one.save(at, net, training.optimizer, {"step": at}))
                step[in_background], waited = training.step(one)
                stall[in_background] = called + waited + seconds(one.finish)
            written = checkpoint.latest(folder / "False")
            assert written is not None
            files = sorted(written.glob("*.distcp"))
            size = sum(file.stat().st_size for file in files)
            os.sync()
            speed.append((size / stall[False], size / dd(files, folder / "copy")))
            stalls.append((stall[True], stall[False]))
            slower.append(step[True] - waited - alone)
            for one in savers:
                shutil.rmtree(folder / f"{one}")
            os.sync()
        for one in savers.values():
            one.close()
    print(
        f"checkpoint of {size / 1e9:.2f} GB; a step is longer by {statistics.median(slower):.2f} s while it is written"
    )
    return [compared("checkpoint_save_vs_dd", speed, "bytes/s"), compared("checkpoint_async_stall", stalls, "s")]


def exports(folder: Path, rounds: int) -> list[dict[str, object]]:
    proxy = presets.get("proxy_100m")
    shape = replace(proxy.model, hidden_size=1024, moe_intermediate_size=768, n_routed_experts=60)
    config = replace(proxy, model=replace(shape, num_nextn_predict_layers=0), precision=Precision("fp32"))
    with built(config) as net:
        source = checkpoint.save(folder / "checkpoints", 0, net, None, {"step": 0}, config=config, keep=0)
    del net
    os.sync()
    speed, peaks, starts = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        inside, peak = export(source, folder / "export")
        taken = time.perf_counter() - began
        peaks.append(peak)
        starts.append(taken - inside)
        os.sync()
        files = sorted((folder / "export").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        speed.append((size / taken, size / dd(files, folder / "copy")))
        shutil.rmtree(folder / "export")
    print(f"export of {size / 1e9:.2f} GB; {statistics.median(starts):.1f} s of it are the start of the process")
    memory = statistics.median(peaks)
    return [
        compared("export_vs_dd", speed, "bytes/s"),
        entry("export_peak_memory", memory, MEMORY, memory / MEMORY, "bytes"),
    ]


EXPORT = """
import re, sys, time
from pathlib import Path
import perilune.pretrain.hf.export
from perilune.pretrain.cli import main
began = time.perf_counter()
main(["export", sys.argv[1], "--out", sys.argv[2]], standalone_mode=False)
taken = time.perf_counter() - began
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(taken, int(peak[1]) * 1024)
"""  # VmHWM and not ru_maxrss, which survives fork and exec: it would be the parent's


def export(source: Path, out: Path) -> tuple[float, int]:
    """`perilune export` in a process of its own: seconds after its imports, and the most memory it held, in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", EXPORT, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    inside, peak = done.stdout.split()[-2:]
    return float(inside), int(peak)


def compared(name: str, pairs: list[tuple[float, float]], unit: str) -> dict[str, object]:
    """Medians of (ours, rival), and of their ratios."""
    ours, rival = (statistics.median(column) for column in zip(*pairs, strict=True))
    return entry(name, ours, rival, statistics.median(a / b for a, b in pairs), unit)


def entry(name: str, ours: float, rival: float, ratio: float, unit: str) -> dict[str, object]:
    print(f"{name}: {ours:.3g} {unit}, rival {rival:.3g}, ratio {ratio:.2f}", flush=True)
    return {"name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder under /var/tmp")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder or "/var/tmp") as temporary:
        results = saves(Path(temporary), arguments.rounds) + exports(Path(temporary), max(2, arguments.rounds // 2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
