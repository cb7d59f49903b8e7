"""Megatron-core's RoPE of MLA in Triton (`kernels.rope=triton`), by Triton's interpreter and compiled for sm_90."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_script import run

pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")

INTERPRETED = """
import json
import sys
from types import SimpleNamespace

import torch

sys.path.append(sys.argv[1])
import rope_like_triton
from megatron.core.fusions import fused_mla_yarn_rope_apply as fused
from perilune.kernels import rope
from perilune.moe.attention import PackedRows, PositionRope
from perilune.parallel.context import Cut, cut

for name in ("rotary_fwd_q_kernel", "rotary_bwd_q_kernel", "rotary_fwd_kv_kernel", "rotary_bwd_kv_kernel"):
    kernel = getattr(fused, name)
    kernel.configs = [one for one in kernel.configs if one.kwargs["BLOCK_H"] == 2]  # of one it measures none
N, P, R, E, rows, seq_len = 4, 8, 8, 4, 2, 8
T = rows * seq_len
documents = torch.tensor([0, 3, 8, 9, T], dtype=torch.int32)
slow = 10.0 ** -(torch.arange(0, R, 2) / R)
angles = torch.outer(torch.arange(T), slow)
table = lambda length, packed_seq: (torch.cat((angles, angles), -1)[:length, None, None], 1.25)  # YaRN's kind
positions = torch.arange(T) - documents[:-1].repeat_interleave(documents.diff())
halves = lambda x: torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def apart(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


found = {}
for dtype in (torch.float32, torch.float16):  # the interpreter takes a bf16 for an integer when it negates it
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(T, *s, generator=generator).to(dtype) for s in ((N, P + R), (N, P + E), (1, R))]
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        held = cut(rows, seq_len, documents, rank, size).index_Q if size > 1 else torch.arange(T)
        packed = PackedRows(qkv_format="thd", documents=documents, longest=7, positions_T=positions[held]).as_one()
        group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
        cos, sin = PositionRope(table, group).get_cached_cos_sin(packed, dtype, True)
        turns = 1.25 * torch.polar(torch.ones(len(held), 1, R // 2), angles[positions[held], None])
        inputs = [x[held].clone().requires_grad_() for x in whole]
        bounds = packed.cu_seqlens_q, rank, size

        def ours(q, kv, key):
            q_own, kv_own = q[..., :P], kv[..., :P]
            queries = torch.cat((q_own, halves(rope.reference(q[..., P:], turns))), -1)
            shared = halves(rope.reference(key, turns)).expand(-1, N, -1)
            return queries, torch.cat((kv_own, shared), -1), kv[..., P:]

        def theirs(q, kv, key):
            q = fused.fused_apply_mla_rope_for_q(q * 1, cos, sin, P, R, *bounds)  # they write over it
            return q, *fused.fused_apply_mla_rope_for_kv(kv, key, cos, sin, R, P, E, *bounds)

        def like(q, kv, key):
            q = rope_like_triton.queries(q, cos, sin, P, R, *bounds)
            return q, *rope_like_triton.keys_and_values(kv, key, cos, sin, R, P, E, *bounds)

        outs = [function(*inputs) for function in (ours, theirs, like)]
        upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in outs[0]]
        both = [(*out, *torch.autograd.grad(out, inputs, [x.clone() for x in upstream])) for out in outs]
        for name, some in zip(("Triton", "like it"), both[1:]):
            found[f"{dtype} {rank} of {size} {name}"] = [apart(a, b) for a, b in zip(some, both[0])]
print(json.dumps(found))
"""
COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron.core.fusions import fused_mla_yarn_rope_apply as fused

N, P, R, E = 128, 128, 64, 128  # DeepSeek-V3's
sizes = {"emb_dim": R, "k_dim": P, "v_dim": E, "head_num": N, "BLOCK_H": 8}
found = {}
for name in ("rotary_fwd_q_kernel", "rotary_bwd_q_kernel", "rotary_fwd_kv_kernel", "rotary_bwd_kv_kernel"):
    kernel = getattr(fused, name).fn
    fixed = {of: sizes[of] for of in kernel.arg_names if of in sizes}
    none = {"batch_size": None}
    types = {}
    for of in kernel.arg_names:
        if of in fixed or of in none:
            types[of] = "constexpr"
        elif of in ("COS", "SIN"):
            types[of] = "*fp32"
        elif of.startswith("cu_seqlens"):
            types[of] = "*i32"
        elif of[0].isupper() or of in ("dK", "dV", "dKV", "dEMB"):
            types[of] = "*bf16"
        else:
            types[of] = "i32"
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed | none)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found[name] = [made.asm["cubin"][:4].hex(), ".target sm_90" in made.asm["ptx"]]
print(json.dumps(found))
"""


def test_interpreted_it_turns_each_token_by_its_place_in_its_document(tmp_path: Path) -> None:
    """Queries, keys, values and gradients beside kernels/rope.py, whole and on each of two context-parallel ranks.

    And what stands for these kernels where a GPU is played (tests/shared/rope_like_triton.py) computes what they do.
    """
    found = run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert len(found) == 12
    for case, apart in found.items():
        assert len(apart) == 6 and max(apart) < (2e-6 if "float32" in case else 2e-3), (case, apart)


def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    found = run(COMPILED, tmp_path)
    assert len(found) == 4
    assert all(made == ["7f454c46", True] for made in found.values()), found  # an ELF file
