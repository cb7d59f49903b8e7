"""What each recomputation policy costs and saves, measured here: peak memory and time of one forward and backward."""

from __future__ import annotations

import gc
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from perilune.parallel import mesh as meshes
from perilune.parallel.recompute import MODULES
from perilune.pretrain import config as configs
from perilune.pretrain import model as models
from perilune.pretrain import rules
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row, RowImage
from perilune.pretrain.objective import next_token
from perilune.pretrain.schema import Config, Parallel, Recompute
from perilune.pretrain.step import forward_backward

LARGEST = 32  # tokens a side of an image, as Kimi-VL's limit of 4096 patches has it
V3 = ("layernorm", "mla_up_proj", "moe_act")  # what DeepSeek-V3 recomputes (section 3.2.3)


@dataclass(frozen=True)
class Cost:
    """One policy on this machine."""

    policy: str
    bytes: int  # at the peak, beyond weights and gradients
    seconds: float  # the faster of two
    gradients: float  # relative distance from those without recomputation; 0: bitwise the same


def policies(config: Config) -> list[Recompute]:
    """None, every module that the model has, V3's together, and full."""
    alone = [Recompute("selective", (name,)) for name in MODULES]
    every = [Recompute(), *alone, Recompute("selective", V3), Recompute("full")]
    if not config.model.n_routed_experts:
        every = [p for p in every if not {"moe", "moe_act", "shared_experts"} & set(p.modules)]
    if not config.model.n_shared_experts:
        every = [p for p in every if p.modules != ("shared_experts",)]
    if not config.model.num_nextn_predict_layers:
        every = [p for p in every if p.modules != ("mtp",)]
    if not (config.model.first_k_dense_replace or config.vision.num_layers):
        every = [p for p in every if p.modules != ("mlp",)]
    return every


def recompute_command(preset: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Measure every policy on one process and print a table (or a JSON list); 1 if a policy changes the gradients.

    Raises InputError for a config that does not run on one process.
    """
    config = configs.resolve(preset, overrides)
    rows = max(1, config.train.micro_batch_size)  # less is refused below, under its own name
    config = replace(
        config,
        parallel=Parallel(),
        recompute=Recompute(),
        train=replace(config.train, global_batch_size=rows),
    )
    rules.check(config, 1)
    rules.check_machine(config, torch.cuda.device_count())
    warnings.filterwarnings("ignore")  # that Transformer Engine and apex are not here, that the profiler has no GPU
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    meshes.start(rules.mesh_of(config, 1))
    costs = []
    none: list[torch.Tensor] = []
    for policy in track(policies(config), "policies", console=Console(stderr=True), transient=True):
        cost, gradients = measure(replace(config, recompute=policy), none)
        none = none or gradients
        costs.append(cost)
    meshes.stop()
    if as_json:
        print(json.dumps([asdict(cost) for cost in costs], indent=1))
    else:
        _print(config, costs)
    return int(any(not cost.gradients <= 1e-6 for cost in costs))


def measure(config: Config, none: list[torch.Tensor]) -> tuple[Cost, list[torch.Tensor]]:
    """One policy's cost, and its gradients, compared with those in `none` where it is not empty."""
    gc.collect()
    net = models.build(config, rules.mesh_of(config, 1))
    batch = [_batch(config)]

    def run() -> None:
        forward_backward(net, batch, next_token, mtp_weight=0.3, bias_speed=0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    run()
    seconds = min(_timed(run) for _ in range(2))
    peak = _peak_bytes(run)
    gradients = [p.main_grad.clone() for chunk in net.bare() for p in chunk.parameters()]  # type: ignore[attr-defined]
    pairs = list(zip(gradients, none, strict=True)) if none else []
    apart = torch.tensor([0.0] + [float((g - n).norm() / n.norm()) for g, n in pairs if not torch.equal(g, n)])
    away = float(apart.max())  # nan if any is
    name = config.recompute.granularity if not config.recompute.modules else " + ".join(config.recompute.modules)
    return Cost(name, peak, seconds, away), gradients


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes of tensors alive at once during `run`, beyond those before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    # Every allocation and release, as the profiler's trace has them; its summaries keep only sums by operator.
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def _batch(config: Config) -> PackedBatch:
    """A micro-batch of random tokens, a document a row; with a tower, each begins with an image of up to half of it."""
    seq_len, vision = config.data.seq_len, config.vision
    rng = np.random.default_rng(0)
    bounds, mask = np.array([0, seq_len], np.int32), np.ones(seq_len, np.uint8)
    images: tuple[RowImage, ...] = ()
    if vision.num_layers:
        side = max(1, min(math.isqrt(seq_len // 2), LARGEST))
        grid = side * vision.merge_size, side * vision.merge_size
        images = (RowImage(b"", "png", 0, side**2, grid),)
        mask[: side**2] = 0
    rows = [
        Row(str(i), rng.integers(0, config.model.vocab_size, seq_len).astype(np.uint32), bounds, mask, images=images)
        for i in range(config.train.micro_batch_size)
    ]
    shape = 3, vision.patch_size, vision.patch_size
    patches = [rng.integers(0, 256, (math.prod(one.grid), *shape), np.uint8) for row in rows for one in row.images]
    return collate(rows, config.model.num_nextn_predict_layers, config.data.document_mask, patches=patches)


def _print(config: Config, costs: list[Cost]) -> None:
    table = Table(
        title=f"{config.preset}: one forward and backward of {config.train.micro_batch_size} x {config.data.seq_len} "
        f"tokens in {config.precision.compute}"
    )
    table.add_column("recompute")
    for head in ("peak MB", "of none", "seconds", "of none", "gradients"):
        table.add_column(head, justify="right")
    for cost in costs:
        table.add_row(
            cost.policy,
            f"{cost.bytes / 1e6:,.1f}",
            f"{cost.bytes / costs[0].bytes:.2f}",
            f"{cost.seconds:.3f}",
            f"{cost.seconds / costs[0].seconds:.2f}",
            "same bits" if cost.gradients == 0 else f"{cost.gradients:.1e} away",
        )
    Console().print(table)
    print("peak: bytes of tensors at once, beyond weights and gradients. To train with one:")
    print(
        f"  perilune train {config.preset} recompute.granularity=selective 'recompute.modules=[layernorm, mla_up_proj]'"
    )
