"""A slice of DeepSeek-V3 on one GPU: its training step, and each kernel beside its best rival from a library.

The slice has V3's hidden size, heads, latents and expert shapes, and what one rank of EP64 holds of each expert layer:
4 routed experts of 256 and the shared one. It is one dense and two expert layers with an eighth of the vocabulary,
1.6 billion parameters: with fp32 masters, moments and gradients 29 GB, which leaves room for activations. On that rank
256 experts' worth of other ranks' tokens would arrive, 8 T rows for T tokens; alone, a token chooses 2 of the 4.

Everything runs on the device at hand, so that tests try it with small shapes on a CPU; the figures are of a GPU alone.
T tokens, H hidden, N heads, D query and key head dim, E value head dim or experts, F expert FFN, V vocabulary.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from forced_balance import force_balance

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
from perilune.pretrain.schema import Config, Parallel, Precision, Recompute
from perilune.pretrain.step import train_step
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


def slice_config(shape: Shape, compute: str = "bf16") -> Config:
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
    )


# --- the step -----------------------------------------------------------------------------------------------------


def slice_speed(shape: Shape, warm: int, rounds: int, compute: str = "bf16") -> dict[str, Any]:
    """The step with the router's own choices (`natural`) and with equal numbers for all experts (`balanced`).

    Each apart: tokens a second, model FLOP/s, its part of the measured matmul rate and of the device's published peak,
    and the load of the fullest expert over the mean.
    """
    too_many = []
    for rows in shape.rows:
        try:
            found = _slice_speed(shape, rows, warm, rounds, compute)
            return {**found, "rows_out_of_memory": too_many}
        except torch.OutOfMemoryError:
            too_many.append(rows)
        finally:
            _free()
    raise RuntimeError(f"the slice does not fit memory with {' or '.join(map(str, too_many))} rows of {shape.seq_len}")


def _slice_speed(shape: Shape, rows: int, warm: int, rounds: int, compute: str) -> dict[str, Any]:
    config = slice_config(shape, compute)
    mesh = rules.mesh_of(config, 1)
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    adam = optimizer.build(config, net)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, shape.seq_len)).astype(np.uint32)
    bounds, mask = np.array([0, shape.seq_len], np.int32), np.ones(shape.seq_len, np.uint8)
    batch = [collate([Row(str(i), row, bounds, mask) for i, row in enumerate(tokens)], 0, True)]
    todo = StepPlan(rows=rows, lr=config.optim.lr, mtp_weight=0.0, bias_speed=0.0)
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
        seconds, losses, skipped, load = [], [], 0, torch.zeros(1)
        for _ in range(warm + rounds):
            began = time.perf_counter()
            result = train_step(net, adam, batch, next_token, todo, clip=config.optim.clip)
            _wait()
            seconds.append(time.perf_counter() - began)
            losses.append(result.loss)
            skipped += result.skipped
            assert result.load_LE is not None
            load = result.load_LE
        speed = rows * shape.seq_len / statistics.median(seconds[warm:])
        found[routing] = {
            "tokens_per_s": speed,
            "model_flops_per_s": speed * flops,
            "of_matmul_rate": speed * flops / rate,
            "of_peak": speed * flops / peak if peak else None,
            "fullest_expert_over_mean": float((load.max(-1).values / load.mean(-1)).max()),
            "step_s": seconds,
            "losses": losses,
            "skipped": skipped,
            "peak_memory_bytes": result.memory,
        }
    return found


def matmul_rate(n: int, compute: str) -> float:
    """FLOP/s of an n x n matmul, the median of ten after three: what a step is compared with."""
    a, b = (torch.randn(n, n, device=meshes.device()).to(precision.dtype(compute)) for _ in range(2))
    seconds = [_timed(lambda: a @ b) for _ in range(13)]
    return float(2 * n**3 / statistics.median(seconds[3:]))


# --- the kernels --------------------------------------------------------------------------------------------------

Operation = Callable[..., torch.Tensor]
# Ours, the rivals by name, the inputs (those of floating point get gradients), matmul FLOPs of forward and backward.
Contest = tuple[Operation, dict[str, Operation], list[torch.Tensor], float]


def kernel_speeds(shape: Shape, rounds: int, compute: str = "bf16") -> dict[str, Any]:
    """Seconds of forward and backward of each of `CONTESTS`, ours and its rivals in turn, and how far outputs differ.

    `ratio` is the fastest rival's seconds over ours. A kernel that this checkout has not, and a rival that does not run
    here, are named with the reason, without a figure.
    """
    found: dict[str, Any] = {}
    for name, (module, function, contest) in CONTESTS.items():
        try:
            ours = getattr(importlib.import_module(f"perilune.{module}"), function)
        except (ImportError, AttributeError) as error:
            found[name] = {"not_here": str(error)}
            continue
        found[name] = _contest(contest(shape, precision.dtype(compute), ours), rounds)
        _free()
    return found


def _contest(contest: Contest, rounds: int) -> dict[str, Any]:
    ours, rivals, inputs, flops = contest
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    want, runs, failed = None, {}, {}
    for name, operation in {"ours": ours, **rivals}.items():
        try:
            out = _both_ways(operation, inputs)
        except (RuntimeError, ImportError, TypeError) as error:
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if want is None:
            want = out
        away = float((out.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
        runs[name] = (operation, away, [])
        del out
    for _ in range(rounds):
        for operation, _, seconds in runs.values():
            seconds.append(_timed(lambda operation=operation: _both_ways(operation, inputs)))
    medians = {name: statistics.median(seconds) for name, (_, _, seconds) in runs.items()}
    mine = medians.pop("ours")
    best = min(medians, key=lambda name: medians[name]) if medians else None
    return {
        "ours_s": mine,
        "rivals_s": medians,
        "apart": {name: away for name, (_, away, _) in runs.items() if name != "ours"},
        "best_rival": best,
        "ratio": medians[best] / mine if best else None,
        "flops_per_s": flops / mine if flops else None,
        "failed": failed,
    }


def _both_ways(operation: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
    out = operation(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
    return out.detach()


def _normal(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=meshes.device()) * size).to(dtype)


def _attention(documents: int) -> Callable[[Shape, torch.dtype, Operation], Contest]:
    def contest(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
        T, N, D, E = shape.seq_len, shape.heads, shape.nope + shape.rope, shape.value
        length, scale = T // documents, D**-0.5
        ends = torch.arange(0, T + 1, length, dtype=torch.int32, device=meshes.device())
        inputs = [_normal((T, N, dim), dtype) for dim in (D, D, E)]

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Documents of one length are a batch: the best that it can do.
            parts = [x.view(documents, length, N, -1).transpose(1, 2) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)
            return out.transpose(1, 2).reshape(T, N, -1)

        def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sdpa(q, k, F.pad(v, (0, D - E)))[..., :E]

        def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from flash_attn import flash_attn_varlen_func

            out = flash_attn_varlen_func(
                q, k, F.pad(v, (0, D - E)), ends, ends, length, length, softmax_scale=scale, causal=True
            )
            return out[..., :E]

        rivals = {"SDPA": sdpa, "SDPA, v padded": padded, "flash-attn 2": flash}
        forward = documents * length * length * N * (D + E)  # half of all pairs, two FLOPs a multiplication
        return lambda q, k, v: ours(q, k, v, ends, length, scale), rivals, inputs, 3.5 * forward

    return contest


def _experts(shares: tuple[float, ...]) -> Callable[[Shape, torch.dtype, Operation], Contest]:
    def contest(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
        E, H, width = len(shares), shape.hidden, shape.expert_ffn
        rows = shape.seq_len * shape.top_k  # what a rank of EP64 gets for each rank's T tokens, if all are balanced
        sizes = [int(rows * share) // 8 * 8 for share in shares]
        counts_E = torch.tensor(sizes)
        w1, w2 = _normal((E, 2 * width, H), dtype, H**-0.5), _normal((E, H, width), dtype, width**-0.5)
        inputs = [_normal((sum(sizes), H), dtype), w1, w2, torch.rand(sum(sizes), device=meshes.device()).to(dtype)]

        def loop(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
            outs = []
            for e, (part, p) in enumerate(zip(x.split(sizes), probs.split(sizes), strict=True)):
                gate, up = torch.mm(part, w1[e].T).chunk(2, dim=-1)
                outs.append(torch.mm(F.silu(gate) * up * p[:, None], w2[e].T))
            return torch.cat(outs)

        flops = 3 * 2 * sum(sizes) * 3 * H * width
        return lambda x, a, b, p: ours(x, a, b, counts_E, p), {"loop of torch.mm": loop}, inputs, flops

    return contest


def _norm(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    inputs = [_normal((shape.seq_len, shape.hidden), dtype), _normal((shape.hidden,), dtype)]
    return (
        lambda x, w: ours(x, w, 1e-6),
        {"F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)},
        inputs,
        0.0,
    )


def _cross_entropy(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    T, H, V = shape.seq_len, shape.hidden, shape.vocab
    labels = torch.randint(V, (T,), device=meshes.device())
    inputs = [_normal((T, H), dtype), _normal((V, H), dtype, H**-0.5)]

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ w.T).float(), labels, reduction="none")

    rivals = {"matmul and F.cross_entropy": plain}
    if hasattr(F, "linear_cross_entropy"):
        rivals["F.linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="none")
    return lambda h, w: ours(h, w, labels), rivals, inputs, 3 * 2 * T * H * V


def _permute(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """Tokens into their experts' order and back; the rival is Megatron-core's own permutation without fusion."""
    from megatron.core.transformer.moe import moe_utils

    order_of = importlib.import_module("perilune.kernels.permute")
    T, K, E = shape.seq_len, shape.top_k, shape.experts
    chosen_TE = torch.zeros(T, E, dtype=torch.bool, device=meshes.device())
    chosen_TE.scatter_(1, torch.rand(T, E, device=meshes.device()).topk(K).indices, True)

    def mine(x: torch.Tensor) -> torch.Tensor:
        order = order_of.Order.of(chosen_TE, K)
        return order_of.unpermute(ours(x, order), order)

    def megatron(x: torch.Tensor) -> torch.Tensor:
        permuted, _, where, *_ = moe_utils.permute(x, chosen_TE, num_out_tokens=T * K)
        return moe_utils.unpermute(permuted, where, x.shape, routing_map=chosen_TE)

    return mine, {"Megatron-core's permute": megatron}, [_normal((T, shape.hidden), dtype)], 0.0


def _rope(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """A query's RoPE part turned by position, members of a pair left where they are; the rival is Megatron-core's."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    T, R = shape.seq_len, shape.rope
    slow_C = 10000.0 ** -(torch.arange(0, R, 2, device=meshes.device()) / R)
    angles_T1C = torch.outer(torch.arange(T, device=meshes.device()), slow_C)[:, None]
    twice_T11R = angles_T1C.repeat_interleave(2, dim=-1)[:, None]

    def megatron(x: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = _apply_rotary_pos_emb_bshd(x[:, None], twice_T11R, rotary_interleaved=True)
        return turned[:, 0]

    rivals = {"Megatron-core's": megatron, "Megatron-core's, compiled": torch.compile(megatron)}
    turns = torch.polar(torch.ones_like(angles_T1C), angles_T1C)
    return lambda x: ours(x, turns), rivals, [_normal((T, shape.heads, R), dtype)], 0.0


def _router(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """V3's choice among all experts; the rival scores all groups and masks, as Megatron-core does without fusion."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    del dtype  # routers are fp32
    E, K = shape.experts, shape.top_k
    bias_E = torch.zeros(E, device=meshes.device())
    settings = {"num_groups": K, "group_topk": K // 2, "scaling_factor": 2.5, "score_function": "sigmoid"}

    def megatron(logits: torch.Tensor) -> torch.Tensor:
        probs: torch.Tensor = topk_routing_with_score_function(logits, K, expert_bias=bias_E, **settings)[0]
        return probs

    def mine(logits: torch.Tensor) -> torch.Tensor:
        found = ours(logits, K, expert_bias=bias_E, **settings)
        return found[0] if isinstance(found, tuple) else found

    rivals = {"Megatron-core's, compiled": torch.compile(megatron)}
    return mine, rivals, [_normal((shape.seq_len, E), torch.float32)], 0.0


# Name -> module, function, contest. The router has no kernel of ours: Megatron-core's is used, and beside it compiled.
CONTESTS: dict[str, tuple[str, str, Callable[[Shape, torch.dtype, Operation], Contest]]] = {
    "attention, 1 document": ("kernels.attention", "varlen_attention", _attention(1)),
    "attention, 4 documents": ("kernels.attention", "varlen_attention", _attention(4)),
    "experts, balanced": ("kernels.experts", "grouped_swiglu", _experts((0.25, 0.25, 0.25, 0.25))),
    "experts, uneven": ("kernels.experts", "grouped_swiglu", _experts((0.55, 0.3, 0.15, 0.0))),
    "rms_norm": ("kernels.norm", "rms_norm", _norm),
    "cross_entropy": ("kernels.cross_entropy", "linear_cross_entropy", _cross_entropy),
    "permute": ("kernels.permute", "permute", _permute),
    "rope": ("kernels.rope", "rotate_neighbours", _rope),
    "router": ("moe.router", "topk_routing_with_score_function", _router),
}


def check_step(found: dict[str, Any]) -> None:
    """Assert that `slice_speed` measured what it says: finite steps, and two kinds of routing that are not mixed."""
    for routing in ("natural", "balanced"):
        one = found[routing]
        assert all(map(math.isfinite, one["losses"])) and not one["skipped"], (routing, one)
        assert one["tokens_per_s"] > 0 and one["of_matmul_rate"] > 0, (routing, one)
    assert found["balanced"]["fullest_expert_over_mean"] == 1, found["balanced"]
    assert found["natural"]["fullest_expert_over_mean"] > 1, found["natural"]


def check_kernels(found: dict[str, Any]) -> None:
    """Assert that every rival that ran did the same work: bf16 apart, no more."""
    for name, one in found.items():
        if "not_here" not in one:
            assert one["ours_s"] > 0 and all(away < 2e-2 for away in one["apart"].values()), (name, one)


# --- the device ---------------------------------------------------------------------------------------------------


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(act: Callable[[], Any]) -> float:
    _wait()
    began = time.perf_counter()
    act()
    _wait()
    return time.perf_counter() - began


def _free() -> None:
    """Give memory back: the checks' processes share the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
