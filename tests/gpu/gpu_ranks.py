"""What a process of the one-GPU checks does: every function runs in a process group of one, on the device it sees.

T tokens, N heads, D query and key head dim, E value head dim or experts, H hidden, F expert FFN.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from perilune.kernels import attention as attentions
from perilune.kernels import experts as expert_kernels
from perilune.parallel import mesh as meshes
from perilune.parallel import precision
from perilune.pretrain import checkpoint, meter, rules
from perilune.pretrain import model as models
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.hf.table import blocks
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.parity import probe
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.schema import Config
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

# Not TF32, whatever the environment says (NVIDIA's containers switch it on): fp32 is compared as fp32.
torch.set_float32_matmul_precision("highest")

draw, train = probe.draw, probe.train  # the weights of a fixture; some steps from them


def _built(config: Config) -> tuple[models.Model, Any]:
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    return net, optimizer.build(config, net)


def where() -> dict[str, Any]:
    """What computes in this process."""
    facts: dict[str, Any] = {
        "device": str(meshes.device()),
        "backend": dist.get_backend(),
        "modules": precision.name(),
        "attention": attentions.name(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        facts["name"] = torch.cuda.get_device_name()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def collectives() -> dict[str, list[float]]:
    """What each collective that a run uses gives back of the numbers 0 to 7, in a group of one."""
    meshes.start(meshes.Mesh(world=1), timeout_s=60)
    x = torch.arange(8.0, device=meshes.device())
    found = {name: torch.full_like(x, math.nan) for name in ("all_gather", "reduce_scatter", "all_to_all")}
    dist.all_gather_into_tensor(found["all_gather"], x)
    dist.reduce_scatter_tensor(found["reduce_scatter"], x)
    dist.all_to_all_single(found["all_to_all"], x, [8], [8])
    found["all_reduce"] = x.clone()
    dist.all_reduce(found["all_reduce"])
    found["broadcast"] = x.clone()
    dist.broadcast(found["broadcast"], src=0)
    return {name: value.tolist() for name, value in found.items()}


def not_back(config: Config, weights: str) -> list[str]:
    """The Hugging Face names of the file `weights` that are not the same, bit by bit, once put in and read out."""
    net, _ = _built(config)
    given = torch.load(weights, weights_only=True)
    try:
        probe.load(config, net, given)
        back = probe.named(config, [probe.pieces(net, lambda tensor: tensor)])
    except Exception as error:
        shards = [
            f"{name}: {shard.key} {list(shard.data.shape)}"
            for part in net.bare()
            for name, shard in part.sharded_state_dict().items()
            if isinstance(shard.data, torch.Tensor) and ".experts." in name
        ]
        raise RuntimeError(
            f"{precision.name()} do not take weights by the table of pretrain/hf/table.py "
            f"({type(error).__name__}: {error}); the first shards of their experts: {'; '.join(shards[:4])}"
        ) from error
    dtype = precision.dtype(config.precision.compute)
    exact = {block.theirs for block in blocks(config.model) if block.fp32}
    want = {name: value if name in exact else value.to(dtype).float() for name, value in given.items()}
    return [name for name in want if not torch.equal(want[name], back[name])]


# --- the kernels on their own -------------------------------------------------------------------------------------


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm())


def _both(function: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Any:
    """Relative L2 of `function`'s output and gradients on this device beside those of `plain` on the CPU in fp32.

    Both start from the same numbers: `inputs` (on the CPU) in the type that `function` shall have.
    """
    here = [x.clone().to(meshes.device()).requires_grad_() for x in inputs]
    there = [x.clone().float().requires_grad_() for x in inputs]
    got, want = function(*here), plain(*there)
    ahead = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    got_grads = torch.autograd.grad(got, here, ahead.to(meshes.device()))
    want_grads = torch.autograd.grad(want, there, ahead.float())
    pairs = zip(got_grads, want_grads, strict=True)
    return {"forward": _relative(got, want), "gradient": max(_relative(g, w) for g, w in pairs)}


def attention(compute: str, lengths: tuple[int, ...], heads: int, D: int, E: int) -> dict[str, Any]:
    """Attention inside documents of these lengths beside the formula; which of PyTorch's operations ran."""
    dtype, T, scale = precision.dtype(compute), sum(lengths), D**-0.5
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(T, heads, dim, generator=generator).to(dtype) for dim in (D, D, E)]
    ends = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    on_device = ends.to(meshes.device())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = _both(
            lambda q, k, v: attentions.varlen_attention(q, k, v, on_device, max(lengths), scale),
            lambda q, k, v: attentions.reference(q, k, v, ends, scale),
            inputs,
        )
    ran = {event.key for event in profile.key_averages()}
    sdpa = sorted(name for name in ran if name.startswith("aten::_scaled_dot_product") and "backward" not in name)
    return {**found, "implementation": attentions.name(), "operations": sdpa}


def experts(compute: str, counts: tuple[int, ...], H: int, F: int) -> dict[str, float]:
    """The grouped feed-forward on `counts` rows an expert beside a loop over experts."""
    dtype, rows = precision.dtype(compute), sum(counts)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    probs_R = torch.rand(rows, generator=generator).to(dtype)
    inputs = [normal(rows, H), normal(len(counts), 2 * F, H), normal(len(counts), H, F), probs_R]
    counts_E = torch.tensor(counts)
    found: dict[str, float] = _both(
        lambda x, w1, w2, p: expert_kernels.grouped_swiglu(x, w1, w2, counts_E, p),
        lambda x, w1, w2, p: expert_kernels.reference(x, w1, w2, counts_E, p),
        inputs,
    )
    return found


# --- checkpoints --------------------------------------------------------------------------------------------------


def _digest(net: models.Model, adam: Any) -> dict[str, str]:
    """SHA-256 of the weights and biases, the masters, and each of the optimizer's moments."""
    hashes: dict[str, Any] = {}

    def add(kind: str, name: str, value: torch.Tensor) -> None:
        raw = value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
        hashes.setdefault(kind, hashlib.sha256()).update(f"{name} {value.dtype}".encode() + raw)

    for part in net.bare():
        for name, value in sorted(part.state_dict().items()):
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
                add("weights", name, value)
    for one in adam.chained_optimizers:
        for group in one.optimizer.param_groups:
            for weight in group["params"]:
                add("masters", "", weight)
                for name, value in sorted(one.optimizer.state[weight].items()):
                    if isinstance(value, torch.Tensor):
                        add(name, "", value)
    return {kind: value.hexdigest() for kind, value in hashes.items()}


def _step(net: models.Model, adam: Any, batch: list[PackedBatch], config: Config) -> Any:
    todo = StepPlan(rows=sum(one.rows for one in batch), lr=config.optim.lr, mtp_weight=0.3, bias_speed=1e-3)
    return train_step(net, adam, batch, next_token, todo, clip=config.optim.clip)


def save(config: Config, weights: str, batch: list[PackedBatch], folder: Path) -> dict[str, Any]:
    """Two steps from `weights`, a checkpoint, and the loss of the step after."""
    net, adam = _built(config)
    probe.load(config, net, torch.load(weights, weights_only=True))
    adam.reload_model_params()
    for _ in range(2):
        _step(net, adam, batch, config)
    path = checkpoint.save(folder, 2, net, adam, {"step": 2}, config=config, keep=0)
    return {"path": path, "digest": _digest(net, adam), "loss": _step(net, adam, batch, config).loss}


def load(config: Config, path: Path, batch: list[PackedBatch]) -> dict[str, Any]:
    """A new model before and after it loads the checkpoint, and the loss of its next step."""
    net, adam = _built(config)
    new = _digest(net, adam)
    state = checkpoint.load(path, net, adam)
    return {"new": new, "digest": _digest(net, adam), "state": state, "loss": _step(net, adam, batch, config).loss}


# --- speed --------------------------------------------------------------------------------------------------------


def speed(config: Config, rows: int, warm: int, rounds: int) -> dict[str, Any]:
    """Tokens a second (the median of `rounds` steps on one micro-batch of `rows` rows) and what the steps gave."""
    net, adam = _built(config)
    length, experts_a_token = config.data.seq_len, config.model.num_experts_per_tok
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length)).astype(np.uint16)
    bounds, mask = np.array([0, length], np.int32), np.ones(length, np.uint8)
    depth = config.model.num_nextn_predict_layers
    batch = [collate([Row(str(i), row, bounds, mask) for i, row in enumerate(tokens)], depth, True)]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    results, seconds = [], []
    for _ in range(warm + rounds):
        began = time.perf_counter()
        results.append(_step(net, adam, batch, config))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    rate = rows * length / statistics.median(seconds[warm:])
    flops = rate * flops_per_token(config.model, length).training
    peak_name, peak = meter.peak(precision.dtype(config.precision.compute))
    load_LE = results[-1].load_LE
    return {
        "tokens_per_s": rate,
        "step_s": seconds,
        "rows": rows,
        "seq_len": length,
        "model_flops_per_s": flops,
        "peak": peak_name,
        "of_peak": flops / peak if peak else None,
        "peak_memory_bytes": results[-1].memory,
        "losses": [result.loss for result in results],
        "skipped": sum(result.skipped for result in results),
        # every token of a step chooses num_experts_per_tok experts in every expert layer
        "expert_counts_off": float((load_LE.sum(-1) - rows * length * experts_a_token).abs().max()),
        "modules": precision.name(),
        "attention": attentions.name(),
    }
