"""Each kernel beside the libraries' best for the same work, with the sizes of the slice (gpu_slice.py).

Everything runs on the device at hand, so that tests try it with small shapes on a CPU; the figures are of a GPU alone.
T tokens, H hidden, N heads, D query and key head dim, E value head dim or experts, F expert FFN, V vocabulary.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_slice import Shape
from gpu_timing import free, timed

from perilune.parallel import mesh as meshes
from perilune.parallel import precision

Operation = Callable[..., Any]  # a tensor, or those of several kinds; a module's weights get gradients too
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
        free()
    return found


def _contest(contest: Contest, rounds: int) -> dict[str, Any]:
    ours, rivals, inputs, flops = contest
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    want, runs, failed = None, {}, {}
    for name, operation in {"ours": ours, **rivals}.items():
        try:
            out = _both_ways(operation, inputs)
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError) as error:
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        out = _scores(*out) if isinstance(out, tuple) else out
        if want is None:
            want = out
        away = float((out.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))
        runs[name] = (operation, away, [])
        del out
    for _ in range(rounds):
        for operation, _, seconds in runs.values():
            seconds.append(timed(lambda operation=operation: _both_ways(operation, inputs)))
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


def _both_ways(operation: Operation, inputs: list[torch.Tensor]) -> Any:
    out = operation(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    wanted += operation.parameters() if isinstance(operation, torch.nn.Module) else []
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outs, wanted, [torch.ones_like(x) for x in outs], allow_unused=True)
    return tuple(x.detach() for x in outs) if isinstance(out, tuple) else out.detach()


def _scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What attention sees of queries, keys and values: no order of the pairs that RoPE turns changes it."""
    return torch.cat(((q.float() * k.float()).sum(-1), v.float().flatten(1)), dim=-1)


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

        def flash_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from flash_attn import flash_attn_varlen_func

            out = flash_attn_varlen_func(
                q, k, F.pad(v, (0, D - E)), ends, ends, length, length, softmax_scale=scale, causal=True
            )
            return out[..., :E]

        def flash_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from flash_attn.cute import flash_attn_varlen_func

            out = flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, softmax_scale=scale, causal=True
            )
            return out[0] if isinstance(out, tuple) else out

        def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from torch.nn.attention.varlen import varlen_attn

            v = F.pad(v, (0, D - E))
            out = varlen_attn(q, k, v, ends, ends, length, length, scale=scale, window_size=(-1, 0))
            return out[..., :E]

        def engine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from transformer_engine.pytorch import DotProductAttention

            core = DotProductAttention(
                N, (D, E), qkv_format="thd", attn_mask_type="padding_causal", softmax_scale=scale
            )
            of = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": length, "max_seqlen_kv": length}
            return core(q, k, v, **of).view(T, N, E)

        rivals = {
            "SDPA": sdpa,
            "SDPA, v padded": padded,
            "varlen_attn, v padded": pytorch,
            "flash-attn 2": flash_2,
            "flash-attn 4": flash_4,
            "Transformer Engine's": engine,
        }
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

        def fused(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
            ends = counts_E.to(x.device).cumsum(0).to(torch.int32)
            h = F.grouped_mm(x, w1.transpose(1, 2), offs=ends)
            return F.grouped_mm(_compiled_swiglu(h, probs), w2.transpose(1, 2), offs=ends)

        flops = 3 * 2 * sum(sizes) * 3 * H * width
        rivals = {
            "loop of torch.mm": loop,
            "grouped_mm and Megatron-core's fused SwiGLU": fused,
            "Transformer Engine's": EngineExperts(sizes, _swiglu),
            "Transformer Engine's and Megatron-core's fused SwiGLU": EngineExperts(sizes, _compiled_swiglu),
        }
        return lambda x, a, b, p: ours(x, a, b, counts_E, p), rivals, inputs, flops

    return contest


def _swiglu(h: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up * probs[:, None]


def _compiled_swiglu(h: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    act: torch.Tensor = weighted_bias_swiglu_impl(h, None, probs[:, None])
    return act


class EngineExperts(torch.nn.Module):
    """Transformer Engine's grouped matmuls, with weights of their own that begin as those of the first call."""

    def __init__(self, sizes: list[int], act: Operation) -> None:
        super().__init__()
        self._sizes, self._act, self.linears = sizes, act, torch.nn.ModuleList()

    def forward(self, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        if not self.linears:
            self.linears.extend(map(self._linear, (w1, w2)))
        first, second = self.linears
        out: torch.Tensor = second(self._act(first(x, self._sizes), probs), self._sizes)
        return out

    def _linear(self, weight_EOI: torch.Tensor) -> torch.nn.Module:
        from transformer_engine.pytorch import GroupedLinear

        E, outputs, inputs = weight_EOI.shape
        kind = {"params_dtype": weight_EOI.dtype, "device": weight_EOI.device}
        made: torch.nn.Module = GroupedLinear(E, inputs, outputs, bias=False, **kind)
        with torch.no_grad():
            for e in range(E):
                getattr(made, f"weight{e}").copy_(weight_EOI[e])
        return made


def _norm(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    inputs = [_normal((shape.seq_len, shape.hidden), dtype), _normal((shape.hidden,), dtype)]

    def formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * w.float()).to(x.dtype)

    def engine(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch import RMSNorm

        norm = RMSNorm(len(w), eps=1e-6, dtype=dtype, device=x.device)
        del norm.weight
        norm.weight = w  # in the place of its own
        out: torch.Tensor = norm(x)
        return out

    rivals = {
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        "the formula, compiled": torch.compile(formula),
        "Transformer Engine's": engine,
    }
    return lambda x, w: ours(x, w, 1e-6), rivals, inputs, 0.0


def _cross_entropy(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    T, H, V = shape.seq_len, shape.hidden, shape.vocab
    labels = torch.randint(V, (T,), device=meshes.device())
    inputs = [_normal((T, H), dtype), _normal((V, H), dtype, H**-0.5)]

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ w.T).float(), labels, reduction="none")

    def pytorch(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        options = LinearCrossEntropyOptions()  # without them it is matmul and F.cross_entropy
        loss: torch.Tensor = F.linear_cross_entropy(h, w, labels, reduction="none", options=options)
        return loss

    def engine(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        loss: torch.Tensor = parallel_cross_entropy((h @ w.T)[None], labels[None], 0.0, False, None)
        return loss.flatten()

    def without_triton(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        module = importlib.import_module("perilune.kernels.cross_entropy")
        chosen, module._by_triton = module._by_triton, lambda hidden: False
        try:
            return ours(h, w, labels)
        finally:
            module._by_triton = chosen

    rivals = {
        "matmul and F.cross_entropy": plain,
        "F.linear_cross_entropy": pytorch,
        "matmul and Transformer Engine's": engine,
        "ours without Triton": without_triton,
    }
    return lambda h, w: ours(h, w, labels), rivals, inputs, 3 * 2 * T * H * V


def _permute(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """Tokens into their experts' order and back; rivals are Megatron-core's, alone and by Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    order_of = importlib.import_module("perilune.kernels.permute")
    T, K, E = shape.seq_len, shape.top_k, shape.experts
    chosen_TE = torch.zeros(T, E, dtype=torch.bool, device=meshes.device())
    chosen_TE.scatter_(1, torch.rand(T, E, device=meshes.device()).topk(K).indices, True)

    def mine(x: torch.Tensor) -> torch.Tensor:
        order = order_of.Order.of(chosen_TE, K)
        return order_of.unpermute(ours(x, order), order)

    def megatron(x: torch.Tensor, fused: bool = False) -> torch.Tensor:
        permuted, _, where, *_ = moe_utils.permute(x, chosen_TE, num_out_tokens=T * K, fused=fused)
        out: torch.Tensor = moe_utils.unpermute(permuted, where, x.shape, routing_map=chosen_TE, fused=fused)
        return out

    rivals = {"Megatron-core's permute": megatron, "Transformer Engine's": lambda x: megatron(x, fused=True)}
    return mine, rivals, [_normal((T, shape.hidden), dtype)], 0.0


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


def _mla_rope(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """MLA's queries, keys and values from what the projections give; what turns queries in place gets a copy first."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    rope = importlib.import_module("perilune.kernels.rope")
    T, N, P, R, E, here = shape.seq_len, shape.heads, shape.nope, shape.rope, shape.value, meshes.device()
    angles_T1C = torch.outer(torch.arange(T, device=here), 10000.0 ** -(torch.arange(0, R, 2, device=here) / R))[
        :, None
    ]
    twice_T1R = torch.cat((angles_T1C, angles_T1C), dim=-1)
    turns, cos, sin = torch.polar(torch.ones_like(angles_T1C), angles_T1C), twice_T1R.cos(), twice_T1R.sin()
    ends = torch.tensor([0, T], dtype=torch.int32, device=here)

    def mine(q: torch.Tensor, kv: torch.Tensor, key: torch.Tensor) -> Any:
        return rope.rotate_tails(q.clone(), turns), *ours(kv, rope.rotate_neighbours(key, turns), P)

    def megatron(q: torch.Tensor, kv: torch.Tensor, key: torch.Tensor) -> Any:
        (own, turned), (k_own, value) = q.split([P, R], dim=-1), kv.split([P, E], dim=-1)
        turned, key = (
            _apply_rotary_pos_emb_bshd(x, twice_T1R, rotary_interleaved=False, mla_rotary_interleaved=True)
            for x in (turned, key)
        )
        keys = torch.cat((k_own, key.expand(-1, N, -1)), dim=-1)
        return torch.cat((own, turned), dim=-1), keys, value.contiguous()

    def triton(q: torch.Tensor, kv: torch.Tensor, key: torch.Tensor) -> Any:
        from megatron.core.fusions import fused_mla_yarn_rope_apply as fused

        turned = fused.fused_apply_mla_rope_for_q(q.clone(), cos, sin, P, R, ends)
        return turned, *fused.fused_apply_mla_rope_for_kv(kv, key, cos, sin, R, P, E, ends)

    rivals = {"Megatron-core's": megatron, "Megatron-core's in Triton": triton}
    return mine, rivals, [_normal(size, dtype) for size in ((T, N, P + R), (T, N, P + E), (T, 1, R))], 0.0


def _router(shape: Shape, dtype: torch.dtype, ours: Operation) -> Contest:
    """V3's choice among all experts; the rival scores all groups and masks, as Megatron-core does without fusion."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    del dtype  # routers are fp32
    E, K = shape.experts, shape.top_k
    bias_E = torch.zeros(E, device=meshes.device())
    settings = {"num_groups": K, "group_topk": K // 2, "scaling_factor": 2.5, "score_function": "sigmoid"}

    def megatron(logits: torch.Tensor, fused: bool = False) -> torch.Tensor:
        found = topk_routing_with_score_function(logits, K, expert_bias=bias_E, fused=fused, **settings)
        probs: torch.Tensor = found[0]
        return probs

    def mine(logits: torch.Tensor) -> torch.Tensor:
        found = ours(logits, K, expert_bias=bias_E, **settings)
        return found[0] if isinstance(found, tuple) else found

    rivals = {
        "Megatron-core's, compiled": torch.compile(megatron),
        "Transformer Engine's": lambda logits: megatron(logits, fused=True),
    }
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
    "rope of MLA": ("kernels.rope", "keys_and_values", _mla_rope),
    "router": ("moe.router", "topk_routing_with_score_function", _router),
}


def check_kernels(found: dict[str, Any]) -> None:
    """Assert that every rival that ran did the same work: bf16 apart, no more."""
    for name, one in found.items():
        if "not_here" not in one:
            assert one["ours_s"] > 0 and all(away < 2e-2 for away in one["apart"].values()), (name, one)
