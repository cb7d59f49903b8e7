"""One GPU in bf16 and fp32 beside the CPU in fp32: losses, gradients, routing, updates, checkpoints; and its speed.

Each check runs with Perilune's own modules, and again with Transformer Engine's where that is installed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gpu_checks
import pytest
from gpu_process import Process

from perilune.pretrain.parity import fixture

ROWS, WARM, ROUNDS = 32, 4, 12  # of 1024 tokens a step; steps not timed, and timed
DOCUMENTS = (1, 500, 700, 847)  # tokens; together 2048


def test_the_gpu_computes_in_an_nccl_group(gpu: Process, record: Any, request: pytest.FixtureRequest) -> None:
    found = record(gpu.run("where"))
    assert found["device"] == "cuda:0" and found["backend"] == "nccl"
    assert found["fp32_matmul"] == "highest"
    with_te = request.node.callspec.id == "te"
    assert found["modules"].startswith("Transformer Engine's" if with_te else "our modules")
    for name, got in gpu.run("collectives").items():
        assert got == list(range(8)), name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_weights_go_in_by_name_and_come_out_bitwise(
    compute: str, gpu: Process, references: gpu_checks.References
) -> None:
    assert gpu.run("not_back", gpu_checks.config("base", compute), references["base"].weights) == []


@pytest.mark.parametrize("name", ["base", "moonlight", "dense", "yarn", "whole-rows"])
def test_fp32_equals_the_cpu(name: str, gpu: Process, references: gpu_checks.References, record: Any) -> None:
    """Losses, every gradient, the routing, biases and updates of three steps."""
    numbers = record(gpu_checks.compare(gpu, references, name, "fp32"))
    assert not gpu_checks.outside(numbers, gpu_checks.FP32), numbers


@pytest.mark.parametrize(
    ("name", "tolerances"),
    [("dense", gpu_checks.BF16_DENSE), ("base", gpu_checks.BF16)],
    ids=["dense", "base"],
)
def test_bf16_is_near_fp32_on_the_cpu(
    name: str, tolerances: dict[str, float], gpu: Process, references: gpu_checks.References, record: Any
) -> None:
    numbers = record(gpu_checks.compare(gpu, references, name, "bf16"))
    assert not gpu_checks.outside(numbers, tolerances), numbers


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_steps_on_one_batch_lower_its_loss(
    compute: str, gpu: Process, references: gpu_checks.References, record: Any
) -> None:
    """As on the CPU, where twelve steps take the loss from 5.66 to 4.1."""
    run = gpu_checks.config("base", compute, lr=1e-3)
    trained = gpu.run("train", run, references["base"].weights, gpu_checks.batch("base"), 12)
    losses = [step.loss for step in trained.steps]
    record({"losses": losses})
    assert all(map(math.isfinite, losses)) and not any(step.skipped for step in trained.steps)
    assert losses[-1] < 0.8 * losses[0]
    experts, chosen = trained.steps[-1].load_LE, gpu_checks.config("base", compute).model.num_experts_per_tok
    assert experts.sum(-1).tolist() == [fixture.ROWS * fixture.SEQ_LEN * chosen] * len(experts)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_checkpoint_comes_back_bitwise(
    compute: str, gpu: Process, references: gpu_checks.References, tmp_path: Path, record: Any
) -> None:
    """Weights, masters and moments, into a new model on the GPU; the next step's loss is the same."""
    run, batch = gpu_checks.config("base", compute, lr=1e-3), gpu_checks.batch("base")
    saved = gpu.run("save", run, references["base"].weights, batch, tmp_path)
    loaded = gpu.run("load", run, saved["path"], batch)
    record({"kinds": sorted(saved["digest"]), "loss_apart": abs(loaded["loss"] / saved["loss"] - 1)})
    assert loaded["state"] == {"step": 2}
    assert {"weights", "masters", "exp_avg", "exp_avg_sq"} <= saved["digest"].keys()
    assert loaded["digest"] == saved["digest"] and loaded["new"]["weights"] != saved["digest"]["weights"]
    # Atomic additions on a GPU come in any order, so its sums are not the same twice.
    assert loaded["loss"] == pytest.approx(saved["loss"], rel={"fp32": 1e-5, "bf16": 1e-2}[compute])


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(
    ours: Process,
    processes: dict[str, Process],
    references: gpu_checks.References,
    tmp_path: Path,
    record: Any,
) -> None:
    run, batch = gpu_checks.config("base", "fp32", lr=1e-3), gpu_checks.batch("base")
    saved = ours.run("save", run, references["base"].weights, batch, tmp_path)
    loaded = processes["cpu"].run("load", run, saved["path"], batch)
    record({"loss_apart": abs(loaded["loss"] / saved["loss"] - 1)})
    assert loaded["digest"] == saved["digest"]
    assert loaded["loss"] == pytest.approx(saved["loss"], rel=1e-4)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_attention_equals_the_formula(compute: str, ours: Process, record: Any) -> None:
    """With MLA's head dims, 192 for queries and keys and 128 for values, and a document of one token."""
    found = record(ours.run("attention", compute, DOCUMENTS, 16, 192, 128))
    assert not gpu_checks.outside(found, dict.fromkeys(("forward", "gradient"), gpu_checks.KERNEL[compute])), found
    slow = [name for name in found["operations"] if name.endswith("_math")]
    assert not slow, f"PyTorch holds the score matrix in memory: {slow}"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_grouped_experts_equal_a_loop(compute: str, ours: Process, record: Any) -> None:
    """An expert without a token, one with one, and one with most."""
    found = record(ours.run("experts", compute, (17, 0, 1, 900, 64, 0), 256, 128))
    assert not gpu_checks.outside(found, dict.fromkeys(("forward", "gradient"), gpu_checks.KERNEL[compute])), found


def test_speed_of_a_step_in_bf16(gpu: Process, record: Any) -> None:
    """Tokens a second of proxy_100m, as tests/bench/step.py has it; every token is counted by the experts it chose."""
    config = gpu_checks.bench("proxy_100m", "bf16", seq_len=1024)
    found = record(gpu.run("speed", config, ROWS, WARM, ROUNDS))
    assert all(map(math.isfinite, found["losses"])) and not found["skipped"]
    assert found["losses"][-1] < found["losses"][0]
    assert found["expert_counts_off"] == 0, "expert counts are rounded: a buffer that should hold whole numbers is bf16"
