"""The slice's code with small shapes on a CPU, so that it is not broken when a GPU comes; its figures mean nothing."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "gpu"))

import gpu_contests
import gpu_slice

from perilune.parallel.workers import Workers
from perilune.pretrain import presets, rules
from perilune.pretrain.plan.counts import parameters

# Rivals that a CPU, or a machine without them, does not run.
ELSEWHERE = {"varlen_attn, v padded", "flash-attn 2", "flash-attn 4", "F.linear_cross_entropy", "Transformer Engine's",
             "matmul and Transformer Engine's", "Megatron-core's in Triton",
             "Transformer Engine's and Megatron-core's fused SwiGLU"}  # fmt: skip


def test_the_step_runs_with_both_kinds_of_routing_and_keeps_them_apart(workers: Workers) -> None:
    found = workers.run(1, gpu_slice.slice_speed, gpu_slice.SMALL, 1, 2)[0]
    gpu_slice.check_step(found)
    for routing in ("natural", "balanced"):
        assert len(found[routing]["step_s"]) == len(found[routing]["losses"]) == 3
    assert found["rows"] == 2 and found["rows_out_of_memory"] == []


def test_a_choice_of_kernels_begins_with_the_same_loss(workers: Workers) -> None:
    auto, swiglu = (
        workers.run(1, gpu_slice.choice_speed, gpu_slice.SMALL, name, 1, 1)[0] for name in ("auto", "swiglu")
    )
    for found in (auto, swiglu):
        gpu_slice.check_choice(found, auto)
        assert found["rows"] == 2 and len(found["step_s"]) == 2
    for name, kernels in gpu_slice.CHOICES.items():
        rules.check(gpu_slice.slice_config(gpu_slice.Shape(), kernels=kernels), 1)
        assert {of for of, chosen in asdict(kernels).items() if chosen != "auto"} == {name} - {"auto"}
    assert set(gpu_slice.CHOICES) == {"auto", *asdict(gpu_slice.CHOICES["auto"])}


def test_fewer_rows_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def runs_out(shape: object, rows: int, *rest: object) -> dict[str, int]:
        if rows > 1:
            raise torch.OutOfMemoryError
        return {"rows": rows}

    monkeypatch.setattr(gpu_slice, "_slice_speed", runs_out)
    assert gpu_slice.slice_speed(gpu_slice.Shape(rows=(4, 2, 1)), 1, 1) == {"rows": 1, "rows_out_of_memory": [4, 2]}
    with pytest.raises(RuntimeError, match="4 or 2 rows"):
        gpu_slice.slice_speed(gpu_slice.Shape(rows=(4, 2)), 1, 1)


def test_every_kernel_meets_a_rival_that_does_the_same(workers: Workers) -> None:
    found = workers.run(1, gpu_contests.kernel_speeds, gpu_slice.SMALL, 2)[0]
    gpu_contests.check_kernels(found)
    assert list(found) == list(gpu_contests.CONTESTS)
    for name, one in found.items():
        if "not_here" in one:
            assert "ours_s" not in one and "ratio" not in one
        else:
            assert one["best_rival"] in one["rivals_s"] and one["ratio"] > 0, (name, one)
            assert not set(one["failed"]) - ELSEWHERE, (name, one)
    assert "ratio" in found["attention, 1 document"] and "ratio" in found["experts, balanced"]


def test_the_slice_has_v3s_shapes_and_fits_one_gpu() -> None:
    config = gpu_slice.slice_config(gpu_slice.Shape())
    rules.check(config, 1)
    v3, own = presets.get("deepseek_v3").model, config.model
    changed = {field.name for field in fields(v3) if getattr(v3, field.name) != getattr(own, field.name)}
    assert changed == {
        "num_layers", "first_k_dense_replace", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
        "seq_aux_loss_alpha", "num_nextn_predict_layers", "vocab_size",
    }  # fmt: skip
    assert own.n_routed_experts * 64 == v3.n_routed_experts
    assert 18 * parameters(own).total < 35e9  # bytes of weights, masters, moments and gradients
