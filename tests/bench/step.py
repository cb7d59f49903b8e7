"""Tokens a second of one training step: Perilune beside transformers' DeepseekV3ForCausalLM, in one run.

    .venv/bin/python tests/bench/step.py [--rounds 3] [--rows 4] [--json FILE]

Both train `proxy_100m`'s shape from the same weights on the same batch with the same threads: forward, backward,
clipping and AdamW; no MTP, no auxiliary loss, one document a row. Rounds alternate between the two, so that a machine
whose speed drifts is fair to both; the ratio is the median of the rounds'. transformers runs its expert
implementations with SDPA, and the best counts (`batched_mm` is left out: it copies the chosen experts' weights for
every token, 52 GB here); in bf16 it runs both with autocast over fp32 weights and all in bf16, while Perilune always
keeps fp32 masters. `matmul fraction` is model FLOPs a second over the rate of a large matmul. Memory is the peak
resident size of a process of its own that takes two steps; transformers' in bf16 is that with autocast, whose weights
and optimizer state are fp32 like ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import optimizer, presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.hf.config import config_to_hf
from perilune.pretrain.objective import next_token
from perilune.pretrain.parity import probe
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.schema import Config, Precision
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

SEQ_LEN, CLIP = 1024, 1.0
EXPERTS = ("grouped_mm", "eager")
Step = Callable[[], float]  # takes one step, returns its loss


def shape(compute: str) -> Config:
    proxy = presets.get("proxy_100m")
    model = replace(proxy.model, num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0)
    precision = Precision(compute=compute)  # type: ignore[arg-type]
    return replace(proxy, model=model, precision=precision, data=replace(proxy.data, seq_len=SEQ_LEN))


def ours(config: Config, tokens: np.ndarray) -> tuple[Step, models.Model]:
    mesh = rules.mesh_of(config, 1)
    net = models.build(config, mesh)
    adam = optimizer.build(config, net)
    bounds, mask = np.array([0, SEQ_LEN], np.int32), np.ones(SEQ_LEN, np.uint8)
    batch = collate([Row(str(i), row.astype(np.uint16), bounds, mask) for i, row in enumerate(tokens)], 0, True)
    todo = StepPlan(rows=len(tokens), lr=config.optim.lr, mtp_weight=0.0, bias_speed=0.0)
    return lambda: train_step(net, adam, [batch], next_token, todo, clip=CLIP).loss, net


def theirs(folder: Path, tokens: np.ndarray, config: Config, experts: str, how: str) -> Step:
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    net = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
    ).train()
    o = config.optim
    adam = torch.optim.AdamW(
        net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    ids = torch.from_numpy(tokens)
    cast = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()

    def step() -> float:
        adam.zero_grad()
        with cast:
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        return float(loss)

    return step


def write_folder(config: Config, net: models.Model, folder: Path) -> None:
    weights = probe.named(config, [probe.pieces(net, lambda tensor: tensor)])
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    described = config_to_hf(config.model)
    (folder / "config.json").write_text(json.dumps(described))


def timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def matmul_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    a @ b
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def measure(compute: str, tokens: np.ndarray, rounds: int) -> list[dict[str, object]]:
    config = shape(compute)
    mine, net = ours(config, tokens)
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(config, net, Path(temporary))
        rivals: list[tuple[float, str, Step]] = []
        for how in ("fp32",) if compute == "fp32" else ("autocast", "bf16"):
            for experts in EXPERTS:
                try:
                    step = theirs(Path(temporary), tokens, config, experts, how)
                    first = timed(step)
                except (RuntimeError, ValueError) as error:
                    print(f"  transformers {how}, {experts}: does not run here ({str(error).splitlines()[0][:90]})")
                    continue
                print(f"  transformers {how}, {experts}: first step {first:.1f} s")
                rivals = sorted([*rivals, (first, f"{how}, {experts}", step)], key=lambda one: one[0])[:1]
        _, rival_name, rival = rivals[0]
        mine()
        pairs = [(timed(mine), timed(rival)) for _ in range(rounds)]
        used = memory(compute, len(tokens), Path(temporary))
    count = tokens.size
    rate = matmul_rate(torch.float32 if compute == "fp32" else torch.bfloat16)
    ratio = statistics.median(theirs_s / ours_s for ours_s, theirs_s in pairs)
    speed = [count / statistics.median(column) for column in zip(*pairs, strict=True)]
    flops = flops_per_token(config.model, SEQ_LEN).training
    fraction = speed[0] * flops / rate
    print(f"{compute}: Perilune {speed[0]:.0f} tokens/s, transformers ({rival_name}) {speed[1]:.0f}, ratio {ratio:.2f}")
    print(f"{compute}: {fraction:.0%} of a {rate / 1e9:.0f} GFLOP/s matmul")
    return [
        entry(f"step_{compute}_vs_transformers", speed[0], speed[1], ratio, "tokens/s"),
        entry(f"step_{compute}_matmul_fraction", speed[0] * flops, rate, fraction, "FLOP/s"),
        used,
    ]


def peak_memory(who: str, compute: str, tokens: np.ndarray) -> None:
    """Print this process's peak resident bytes after two steps of `who`."""
    config = shape(compute)
    if who == "ours":
        step, _ = ours(config, tokens)
    else:
        folder = Path(os.environ["BENCH_FOLDER"])
        step = theirs(folder, tokens, config, EXPERTS[0], "fp32" if compute == "fp32" else "autocast")
    step(), step()
    # Not ru_maxrss, which survives fork and exec: it would be the parent's.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) * 1024)


def memory(compute: str, rows: int, folder: Path) -> dict[str, object]:
    peaks = []
    for who in ("ours", "theirs"):
        command = [sys.executable, "-W", "ignore", __file__, "--rows", str(rows), "--peak", who, "--compute", compute]
        done = subprocess.run(
            command, env={**os.environ, "BENCH_FOLDER": str(folder)}, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    ratio = peaks[0] / peaks[1]
    print(f"{compute}: peak memory {peaks[0] / 1e9:.2f} GB, transformers {peaks[1] / 1e9:.2f} GB, ratio {ratio:.2f}")
    return entry(f"step_{compute}_peak_memory", peaks[0], peaks[1], ratio, "bytes")


def entry(name: str, ours: float, rival: float, ratio: float, unit: str) -> dict[str, object]:
    return {"name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # one process's memory
    parser.add_argument("--compute", choices=("fp32", "bf16"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    meshes.start(rules.mesh_of(shape("fp32"), 1))
    tokens = np.random.default_rng(0).integers(0, shape("fp32").model.vocab_size, (arguments.rows, SEQ_LEN))
    if arguments.peak:
        peak_memory(arguments.peak, arguments.compute, tokens)
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"{arguments.rows} x {SEQ_LEN} tokens, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    results = [entry for compute in ("fp32", "bf16") for entry in measure(compute, tokens, arguments.rounds)]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
