"""Tokens a second of one training step: Perilune, transformers and Megatron-core's local spec, in one run.

    .venv/bin/python tests/bench/step.py [--rounds 3] [--rows 4] [--compute bf16] [--json FILE]

All train `proxy_100m`'s shape from the same weights on the same batch with the same threads: forward, backward,
clipping and AdamW; no MTP, no auxiliary loss, one document a row. Their losses at the first step must agree, so that
the work is the same. Rounds alternate between them, so that a machine whose speed drifts is fair to all; a ratio is
the median of the rounds'. Each rival runs in every way in which its user might, and the fastest counts: transformers'
DeepseekV3ForCausalLM with SDPA, its expert implementations (`batched_mm` is left out: it copies the chosen experts'
weights for every token, 52 GB here) and torch's fused AdamW, in bf16 both with autocast over fp32 weights and all in
bf16; Megatron-core as tests/bench/megatron_local.py says, in bf16 with fp32 masters, as Perilune always has them.
`matmul fraction` is model FLOPs a second over the rate of a large matmul in that type, the median of a second's before
every step: as much of it as of the step falls into moments when others take the cores. It is measured in a process of
its own, as a run has it, with the router's own choices (natural), as all else here; `step_fp32_balanced_vs_natural` has
experts chosen in turn beside it. Where this CPU is slower with bf16 Perilune multiplies it in fp32
(`kernels/matmul.py`): the fraction of bf16's rate may then be above one, and `step_bf16_fp32_matmul_fraction` is that
of fp32's. Perilune's processes tell glibc to keep freed memory (`parallel/memory.py`); rivals run with it as it is
shipped. In `..._keep_freed` they are told the same, in one round less, each in the way that was fastest before. Memory
(rss) is the peak resident size of a process of its own that takes two steps; transformers' in bf16 is that with
autocast, whose weights and optimizer state are fp32 like ours. `step_rss_recompute_..._vs_none` is ours in fp32 where
backward computes again what it would keep: all of a layer (`full`), or what DeepSeek-V3 does (`v3`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gpu")]

import megatron_local
import numpy as np
import torch
import torch.distributed as dist
import transformers
from forced_balance import force_balance
from matmul import matmul_rate, why_not_bf16
from safetensors.torch import save_file

from perilune.kernels.matmul import slow_bf16
from perilune.parallel import memory as allocator
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.hf.config import config_to_hf
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.parity import probe
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.schema import Config, Precision, Recompute
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

SEQ_LEN, CLIP = 1024, 1.0
EXPERTS = ("grouped_mm", "eager")
KEPT = "_keep_freed"  # at the end of an entry's name
RECOMPUTED = {
    "full": Recompute("full"),
    "v3": Recompute("selective", ("layernorm", "mla_up_proj", "moe_act")),  # arXiv 2412.19437, section 3.2.3
}
APART = {"fp32": 1e-5, "bf16": 5e-3}  # of the losses at the first step, relative
ALONE = 5  # steps of a process of its own
MEMORY_OF = {"memory of ours": "ours", "memory of theirs": "theirs"}
RIVALS = ("transformers", "megatron")
Step = Callable[[], float]  # takes one step, returns its loss


def alone(rows: int) -> np.ndarray:
    """This process becomes a run of its own, on all cores; the tokens of its batch [rows, S]."""
    torch.set_num_threads(os.cpu_count() or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = shape("fp32")
    meshes.start(rules.mesh_of(config, 1))
    return np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, SEQ_LEN))


def names(compute: str) -> list[str]:
    """Of all entries about a type, in their order."""
    rss = "step_rss" if compute == "fp32" else f"step_rss_{compute}"
    policies = RECOMPUTED if compute == "fp32" else ()
    return [
        *(f"step_{compute}_vs_{rival}{kept}" for kept in ("", KEPT) for rival in RIVALS),
        f"step_{compute}_balanced_vs_natural",
        *(f"step_{compute}_{rate}_fraction" for rate in types(compute)),
        f"{rss}_vs_transformers",
        *(f"{rss}_recompute_{policy}_vs_none" for policy in policies),
    ]


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
    allocator.keep_freed()  # as pretrain/run.py does before its first step
    return lambda: train_step(net, adam, [batch], next_token, todo, clip=CLIP).loss, net


def theirs(folder: Path, tokens: np.ndarray, config: Config, experts: str, how: str) -> Step:
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    net = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
    ).train()
    o = config.optim
    adam = torch.optim.AdamW(
        net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
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


def as_shipped() -> None:
    """From here on memory is given back as glibc comes to do it by itself once something large was freed."""
    allocator.set_thresholds(mapped=32 << 20, kept=64 << 20)


def timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def fastest(rival: str, ways: Iterable[tuple[str, Callable[[], Step]]], loss: float, apart: float) -> tuple[str, Step]:
    """The name and step of the way that is fastest after its first step; raises if its first loss is not `loss`."""
    best: tuple[float, str, Step] | None = None
    for name, build in ways:
        try:
            step = build()
            first = step()
        except (RuntimeError, ValueError) as error:
            print(f"  {rival}, {name}: does not run here ({str(error).splitlines()[0][:90]})", flush=True)
            continue
        if not abs(first / loss - 1) <= apart:
            raise ValueError(
                f"{rival}, {name}: a first loss of {first:.6f} where ours is {loss:.6f}: not the same work"
            )
        seconds = min(timed(step) for _ in range(2))
        print(f"  {rival}, {name}: {seconds:.1f} s a step", flush=True)
        if best is None or seconds < best[0]:
            best = seconds, name, step
        del step
        gc.collect()
    if best is None:
        raise RuntimeError(f"{rival} runs in no way on this machine")
    return best[1:]


def measure(compute: str, tokens: np.ndarray, rounds: int) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as temporary:
        entries = race(compute, tokens, rounds, Path(temporary))
        gc.collect()
        as_shipped()
        ctypes.CDLL(None).malloc_trim(0)  # the processes whose memory is measured need room
        entries += [*speed(compute, len(tokens)), *memory(compute, len(tokens), Path(temporary))]
    assert [one["name"] for one in entries] == names(compute)
    return entries


def race(compute: str, tokens: np.ndarray, rounds: int, folder: Path) -> list[dict[str, object]]:
    """The speeds, of rivals as they are shipped and of rivals that keep freed memory.

    Leaves transformers' checkpoint of the first weights in `folder`.
    """
    config, ids, apart = shape(compute), torch.from_numpy(tokens), APART[compute]
    mine, net = ours(config, tokens)
    write_folder(config, net, folder)
    hows = ("fp32",) if compute == "fp32" else ("autocast", "bf16")
    hf = [(f"{how}, {x}", partial(theirs, folder, tokens, config, x, how)) for how in hows for x in EXPERTS]
    weights = megatron_local.weights_of(net)
    local = [(str(w), partial(megatron_local.build, config, weights, ids, w)) for w in megatron_local.ways(compute)]
    loss = mine()
    as_shipped()
    found = [
        fastest("transformers", hf, loss, apart),
        fastest("Megatron-core's local spec", local, loss, apart),
    ]
    entries = []
    for kept, number in (("", rounds), (KEPT, max(1, rounds - 1))):
        seconds = by_rounds(mine, [step for _, step in found], number, bool(kept))
        speeds = [tokens.size / statistics.median(column) for column in zip(*seconds, strict=True)]
        print(f"{compute}: Perilune {speeds[0]:.0f} tokens/s{', rivals keep freed memory' * bool(kept)}")
        for i, (rival, (way, _)) in enumerate(zip(RIVALS, found, strict=True), start=1):
            ratio = statistics.median(row[i] / row[0] for row in seconds)
            print(f"{compute}: {rival} ({way}) {speeds[i]:.0f} tokens/s, ratio {ratio:.2f}", flush=True)
            entries.append(entry(f"step_{compute}_vs_{rival}{kept}", speeds[0], speeds[i], ratio, "tokens/s"))
    return entries


def by_rounds(mine: Step, rivals: list[Step], rounds: int, kept: bool) -> list[list[float]]:
    """Of each round the seconds of a step of ours and of each rival's, which keep freed memory too if `kept`."""
    if kept:
        allocator.keep_freed()
        for step in rivals:
            step()  # what they gave back so far is asked for again
    seconds = []
    for _ in range(rounds):
        if not kept:
            allocator.keep_freed()
            mine()  # what the rivals' allocator gave back is asked for again
        seconds.append([timed(mine)])
        if not kept:
            as_shipped()
        seconds[-1] += [timed(step) for step in rivals]
    return seconds


def types(compute: str) -> dict[str, torch.dtype]:
    """Whose matmul rates a step is held against, by name: that of its own type and that in which it is multiplied."""
    if compute == "fp32":
        return {"matmul": torch.float32}
    return {"matmul": torch.bfloat16} | ({"fp32_matmul": torch.float32} if slow_bf16() else {})


def own_speed(compute: str, tokens: np.ndarray) -> None:
    """Print the seconds of steps with each kind of routing, and before each the matmul rates, as JSON."""
    step, net = ours(shape(compute), tokens)
    step(), step()
    found: dict[str, dict[str, list[Any]]] = {}
    for routing in ("natural", "balanced"):
        if routing == "balanced":
            force_balance(net)
            step()
        found[routing] = {"rates": [], "seconds": []}
        for _ in range(ALONE):
            found[routing]["rates"].append([matmul_rate(dtype) for dtype in types(compute).values()])
            found[routing]["seconds"].append(timed(step))
    print(json.dumps(found))


def speed(compute: str, rows: int) -> list[dict[str, object]]:
    """Of a process of its own."""
    found = json.loads(process("speed", compute, rows))
    flops = rows * SEQ_LEN * flops_per_token(shape(compute).model, SEQ_LEN).training
    natural, balanced = found["natural"], found["balanced"]
    own, forced = (rows * SEQ_LEN / statistics.median(one["seconds"]) for one in (natural, balanced))
    print(f"{compute}: in a process of its own {own:.0f} tokens/s, balanced {forced:.0f}", flush=True)
    entries = [entry(f"step_{compute}_balanced_vs_natural", forced, own, forced / own, "tokens/s")]
    for (name, dtype), rates in zip(types(compute).items(), zip(*natural["rates"], strict=True), strict=True):
        fraction = statistics.median(flops / s / rate for s, rate in zip(natural["seconds"], rates, strict=True))
        rate = statistics.median(rates)
        print(f"{compute}: {fraction:.1%} of a {rate / 1e9:.0f} GFLOP/s matmul in {str(dtype)[6:]}", flush=True)
        entries.append(entry(f"step_{compute}_{name}_fraction", fraction * rate, rate, fraction, "FLOP/s"))
    return entries


def process(what: str, compute: str, rows: int, *options: str, **environment: str) -> str:
    """The last line that a process of its own prints about `what`."""
    command = [sys.executable, "-W", "ignore", __file__, "--rows", str(rows), "--alone", what, "--compute", compute]
    done = subprocess.run(
        [*command, *options], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def peak_memory(who: str, compute: str, tokens: np.ndarray, recompute: str | None) -> None:
    """Print this process's peak resident bytes after two steps of `who`."""
    config = shape(compute)
    if who == "ours":
        step, _ = ours(replace(config, recompute=RECOMPUTED[recompute]) if recompute else config, tokens)
    else:
        as_shipped()
        folder = Path(os.environ["BENCH_FOLDER"])
        step = theirs(folder, tokens, config, EXPERTS[0], "fp32" if compute == "fp32" else "autocast")
    step(), step()
    # Not ru_maxrss, which survives fork and exec: it would be the parent's.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) * 1024)


def memory(compute: str, rows: int, folder: Path) -> list[dict[str, object]]:
    """The names' last: beside transformers, and in fp32 of what is recomputed."""
    own, other = (int(process(what, compute, rows, BENCH_FOLDER=str(folder))) for what in MEMORY_OF)
    pairs = [(own, other)]
    if compute == "fp32":
        policies = (process(next(iter(MEMORY_OF)), compute, rows, "--recompute", policy) for policy in RECOMPUTED)
        pairs += [(int(peak), own) for peak in policies]
    entries = []
    for name, (peak, beside) in zip(names(compute)[-len(pairs) :], pairs, strict=True):
        print(f"{name}: peak memory {peak / 1e9:.2f} GB beside {beside / 1e9:.2f}, ratio {peak / beside:.2f}")
        entries.append(entry(name, peak, beside, peak / beside, "bytes"))
    return entries


def entry(name: str, ours: float, rival: float, ratio: float, unit: str) -> dict[str, object]:
    return {"name": name, "ours": ours, "rival": rival, "ratio": ratio, "unit": unit}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=("speed", *MEMORY_OF), help=argparse.SUPPRESS)  # what `process` is for
    parser.add_argument("--recompute", choices=tuple(RECOMPUTED), help=argparse.SUPPRESS)  # the same
    parser.add_argument("--compute", choices=("fp32", "bf16"), help="only this one")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokens = alone(arguments.rows)
    if arguments.alone == "speed":
        return own_speed(arguments.compute, tokens)
    if arguments.alone:
        return peak_memory(MEMORY_OF[arguments.alone], arguments.compute, tokens, arguments.recompute)
    why = "" if arguments.compute else why_not_bf16()
    computes = [arguments.compute] if arguments.compute else ["fp32"] if why else ["fp32", "bf16"]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"megatron-core {version('megatron-core')}, {torch.get_num_threads()} threads, "
          f"{arguments.rows} x {SEQ_LEN} tokens, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    results = [entry for compute in computes for entry in measure(compute, tokens, arguments.rounds)]
    results += [{"name": name, "not_measured": why} for name in names("bf16") if why]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
