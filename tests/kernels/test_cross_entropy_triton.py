"""Cross-entropy's kernels for GPUs without one: by Triton's interpreter beside PyTorch, and compiled for sm_90."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_script import run

pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")

INTERPRETED = """
import json
import torch
from perilune.kernels import cross_entropy, cross_entropy_triton

ours = set()
for name in ("statistics", "gradient_"):
    def counted(*args, _kernel=getattr(cross_entropy_triton, name), _name=name):
        ours.add(_name)
        return _kernel(*args)
    setattr(cross_entropy_triton, name, counted)
cross_entropy._by_triton = lambda hidden: True
cross_entropy._triton = lambda: cross_entropy_triton
found = {}
for dtype, V, keep in (
    (torch.float32, 50, True), (torch.float32, 4100, False), (torch.bfloat16, 4100, True),
    (torch.bfloat16, 4096, False), (torch.float16, 4100, True),
):
    cross_entropy.CHUNK = 3 * V  # three tokens
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(7, 16, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (7,), generator=generator)
    labels[:2] = torch.tensor([0, V - 1])
    upstream = torch.rand(7, generator=generator) * (labels > 0)  # one token counts nothing
    want = cross_entropy.reference(hidden, weight, labels)
    wanted = torch.autograd.grad(want, (hidden, weight), upstream)
    got = cross_entropy.linear_cross_entropy(hidden, weight, labels, keep=keep)
    given = torch.autograd.grad(got, (hidden, weight), upstream, retain_graph=not keep)
    again = given if keep else torch.autograd.grad(got, (hidden, weight), upstream)
    pairs = zip((got, *given, *again), (want, *wanted, *wanted), strict=True)
    found[f"{dtype} {V} {keep}"] = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    hidden.data[3] = float("nan")
    broken = cross_entropy.linear_cross_entropy(hidden, weight, labels).isnan().tolist()
    assert broken == [i == 3 for i in range(7)], broken
assert ours == {"statistics", "gradient_"}
print(json.dumps(found))
"""
COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from perilune.kernels import cross_entropy_triton as kernels

found = {}
for logits in ("fp32", "bf16", "fp16"):
    for kernel, numbers in (
        (kernels.statistics_kernel, ("most", "total", "label")),
        (kernels.gradient_kernel, ("log_sum", "grad", "of_label")),
    ):
        types = {"logits": f"*{logits}", "at": "*i64", **dict.fromkeys(numbers, "*fp32"), "V": "i32", "stride": "i32"}
        source = ASTSource(fn=kernel, signature=types | {"BLOCK": "constexpr"}, constexprs={"BLOCK": kernels.BLOCK})
        options = {"num_warps": kernels.WARPS}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        found[f"{kernel.__name__} {logits}"] = [made.asm["cubin"][:4].hex(), ".target sm_90" in made.asm["ptx"]]
print(json.dumps(found))
"""


def test_interpreted_they_equal_pytorch_in_values_and_gradients(tmp_path: Path) -> None:
    found = run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert len(found) == 5
    for case, apart in found.items():
        # Loss, and both gradients once and, where nothing is kept, a second time.
        most = 1e-6 if "float32" in case else (2e-2 if "bfloat16" in case else 3e-3)
        assert len(apart) == 5 and max(apart) < most, (case, apart)


def test_they_compile_for_hopper(tmp_path: Path) -> None:
    found = run(COMPILED, tmp_path)
    assert len(found) == 6
    assert all(made == ["7f454c46", True] for made in found.values()), found  # an ELF file
