"""A slice of DeepSeek-V3 on one GPU: its training step (each kernel beside its rivals: gpu_contests.py).

The slice has V3's hidden size, heads, latents and expert shapes, and what one rank of EP64 holds of each expert layer:
4 routed experts of 256 and the shared one. It is one dense and two expert layers with an eighth of the vocabulary,
1.6 billion parameters: with fp32 masters, moments and gradients 29 GB, which leaves room for activations. On that rank
256 experts' worth of other ranks' tokens would arrive, 8 T rows for T tokens; alone, a token chooses 2 of the 4.

Everything runs on the device at hand, so that tests try it with small shapes on a CPU; the figures are of a GPU alone.
T tokens, H hidden, N heads, D query and key head dim, E value head dim or experts, F expert FFN, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from forced_balance import force_balance
from gpu_timing import free, timed, wait

from perilune.kernels import attention as attentions
from perilune.parallel import mesh as meshes
from perilune.parallel import precision
from perilune.pretrain import meter, presets, rules
from perilune.pretrain import model as models
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.schema import Config, Kernels, Parallel, Precision, Recompute
from perilune.pretrain.step import StepResult, train_step
from perilune.pretrain.timetable import StepPlan


@dataclass(frozen=True)
class Shape:
    """Sizes of the slice and of the kernels' inputs; the defaults are DeepSeek-V3's."""

    seq_len: int = 4096
    rows: tuple[int, ...] = (2, 1)  # of a micro-batch: the first that fits memory counts
    hidden: int = 7168
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    dense_ffn: int = 18432
    expert_ffn: int = 2048
    local_experts: int = 4
    slice_vocab: int = 129280 // 8
    vocab: int = 129280
    experts: int = 256  # what the router chooses from
    top_k: int = 8
    matmul: int = 8192


SMALL = Shape(
    seq_len=32, rows=(2,), hidden=64, heads=4, q_lora=32, kv_lora=32, nope=16, rope=16, value=16, dense_ffn=64,
    expert_ffn=32, slice_vocab=128, vocab=128, experts=16, top_k=4, matmul=64,
)  # fmt: skip


# Of the keys `kernels.*`, what is compared with all on auto; those of THEIRS need Transformer Engine.
CHOICES = {
    "auto": Kernels(),
    "attention": Kernels(attention="varlen_attn"),
    "swiglu": Kernels(swiglu="compiled"),
    "rope": Kernels(rope="triton"),
    "permute": Kernels(permute="transformer_engine"),
    "router": Kernels(router="transformer_engine"),
}
THEIRS = ("permute", "router")


def slice_config(shape: Shape, compute: str = "bf16", kernels: Kernels = CHOICES["auto"]) -> Config:
    """One dense layer and two of experts, no MTP and no balance loss, nothing recomputed."""
    v3 = presets.get("deepseek_v3")
    model = replace(
        v3.model, num_layers=3, first_k_dense_replace=1, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        q_lora_rank=shape.q_lora, kv_lora_rank=shape.kv_lora, qk_nope_head_dim=shape.nope,
        qk_rope_head_dim=shape.rope, v_head_dim=shape.value, intermediate_size=shape.dense_ffn,
        n_routed_experts=shape.local_experts, num_experts_per_tok=2, moe_intermediate_size=shape.expert_ffn,
        n_group=1, topk_group=1, num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0, vocab_size=shape.slice_vocab,
    )  # fmt: skip
    return replace(
        v3,
        model=model,
        data=replace(v3.data, seq_len=shape.seq_len, document_mask=True),
        parallel=Parallel(),
        recompute=Recompute(),
        precision=Precision(compute=compute),  # type: ignore[arg-type]
        kernels=kernels,
    )


# --- the step -----------------------------------------------------------------------------------------------------


def slice_speed(shape: Shape, warm: int, rounds: int, compute: str = "bf16") -> dict[str, Any]:
    """The step with the router's own choices (`natural`) and with equal numbers for all experts (`balanced`).

    Each apart: tokens a second, model FLOP/s, its part of the measured matmul rate and of the device's published peak,
    and the load of the fullest expert over the mean.
    """
    return _what_fits(shape, _slice_speed, warm, rounds, compute)


def choice_speed(shape: Shape, choice: str, warm: int, rounds: int, compute: str = "bf16") -> dict[str, Any]:
    """The step with one of CHOICES and the router's own choices. Weights are drawn on the device, which is quicker."""
    own, models.draw_weights = models.draw_weights, _draw_there
    try:
        return _what_fits(shape, _choice_speed, choice, warm, rounds, compute)
    finally:
        models.draw_weights = own


def _what_fits(shape: Shape, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`measure(shape, rows, *arguments)` with the most rows that memory holds."""
    too_many = []
    for rows in shape.rows:
        try:
            return {**measure(shape, rows, *arguments), "rows_out_of_memory": too_many}
        except torch.OutOfMemoryError:
            too_many.append(rows)
        finally:
            free()
    raise RuntimeError(f"the slice does not fit memory with {' or '.join(map(str, too_many))} rows of {shape.seq_len}")


def _slice_speed(shape: Shape, rows: int, warm: int, rounds: int, compute: str) -> dict[str, Any]:
    config = slice_config(shape, compute)
    net, step = _start(config, rows)
    rate = matmul_rate(shape.matmul, compute)
    peak_name, peak = meter.peak(precision.dtype(compute))
    flops = flops_per_token(config.model, shape.seq_len).training
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for part in net.bare() for parameter in part.parameters()),
        "rows": rows,
        "seq_len": shape.seq_len,
        "matmul_flops_per_s": rate,
        "peak": peak_name,
        "modules": precision.name(),
        "attention": attentions.name(),
    }
    for routing in ("natural", "balanced"):
        if routing == "balanced":
            force_balance(net)
        one, load = _steps(step, warm, rounds, rows * shape.seq_len)
        speed = one["tokens_per_s"]
        found[routing] = {
            **one,
            "model_flops_per_s": speed * flops,
            "of_matmul_rate": speed * flops / rate,
            "of_peak": speed * flops / peak if peak else None,
            "fullest_expert_over_mean": float((load.max(-1).values / load.mean(-1)).max()),
        }
    return found


def _choice_speed(shape: Shape, rows: int, choice: str, warm: int, rounds: int, compute: str) -> dict[str, Any]:
    config = slice_config(shape, compute, CHOICES[choice])
    rules.check(config, 1)
    _, step = _start(config, rows)
    found, _ = _steps(step, warm, rounds, rows * shape.seq_len)
    return {**found, "rows": rows, "seq_len": shape.seq_len, "modules": precision.name()}


def _start(config: Config, rows: int) -> tuple[models.Model, Callable[[], StepResult]]:
    """The model, and a step of it on one micro-batch of random tokens."""
    mesh, length = rules.mesh_of(config, 1), config.data.seq_len
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    adam = optimizer.build(config, net)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length)).astype(np.uint32)
    bounds, mask = np.array([0, length], np.int32), np.ones(length, np.uint8)
    batch = [collate([Row(str(i), row, bounds, mask) for i, row in enumerate(tokens)], 0, True)]
    todo = StepPlan(rows=rows, lr=config.optim.lr, mtp_weight=0.0, bias_speed=0.0)
    return net, lambda: train_step(net, adam, batch, next_token, todo, clip=config.optim.clip)


def _steps(step: Callable[[], StepResult], warm: int, rounds: int, tokens: int) -> tuple[dict[str, Any], torch.Tensor]:
    """What `rounds` steps of so many tokens take after `warm` others, and the experts' load in the last."""
    seconds, losses, skipped, load = [], [], 0, torch.zeros(1)
    for _ in range(warm + rounds):
        began = time.perf_counter()
        result = step()
        wait()
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss)
        skipped += result.skipped
        assert result.load_LE is not None
        load = result.load_LE
    found = {
        "tokens_per_s": tokens / statistics.median(seconds[warm:]),
        "step_s": seconds,
        "losses": losses,
        "skipped": skipped,
        "peak_memory_bytes": result.memory,
    }
    return found, load


def _draw_there(part: torch.nn.Module, seed: int, std: Callable[[str], float]) -> None:
    """In the place of `draw_weights`: other numbers of the same spread, where they are used."""
    generator = torch.Generator(meshes.device()).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std(name), generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def matmul_rate(n: int, compute: str) -> float:
    """FLOP/s of an n x n matmul, the median of ten after three: what a step is compared with."""
    a, b = (torch.randn(n, n, device=meshes.device()).to(precision.dtype(compute)) for _ in range(2))
    seconds = [timed(lambda: a @ b) for _ in range(13)]
    return float(2 * n**3 / statistics.median(seconds[3:]))


def check_choice(found: dict[str, Any], auto: dict[str, Any] | None) -> None:
    """Assert that `choice_speed` measured steps, and that they begin as those with all on auto do, bf16 apart."""
    assert all(map(math.isfinite, found["losses"])) and not found["skipped"] and found["tokens_per_s"] > 0, found
    if auto is not None:
        assert abs(found["losses"][0] / auto["losses"][0] - 1) < 2e-3, (found["losses"], auto["losses"])


def check_step(found: dict[str, Any]) -> None:
    """Assert that `slice_speed` measured what it says: finite steps, and two kinds of routing that are not mixed."""
    for routing in ("natural", "balanced"):
        one = found[routing]
        assert all(map(math.isfinite, one["losses"])) and not one["skipped"], (routing, one)
        assert one["tokens_per_s"] > 0 and one["of_matmul_rate"] > 0, (routing, one)
    assert found["balanced"]["fullest_expert_over_mean"] == 1, found["balanced"]
    assert found["natural"]["fullest_expert_over_mean"] > 1, found["natural"]
