"""A DeepSeek-V3 slice in bf16: its step's share of what the GPU's matmuls reach, and the kernels beside libraries'.

The figures are recorded; what is asserted is that they are figures of the work that they claim.
"""

from __future__ import annotations

import math
from typing import Any

import gpu_contests
import gpu_slice
import pytest
from gpu_process import Process

WARM, ROUNDS = 2, 6  # steps of each routing; not timed, and timed
KERNEL_ROUNDS = 10
CHOICE_WARM, CHOICE_ROUNDS = 2, 3  # steps with one choice of kernels
GOAL = 0.5  # of the rate of a large matmul, for the whole step


def test_speed_of_a_deepseek_v3_slice_in_bf16(gpu: Process, record: Any) -> None:
    found = record(gpu.run("slice_speed", gpu_slice.Shape(), WARM, ROUNDS))
    gpu_slice.check_step(found)
    assert found["parameters"] > 1.5e9
    reached = [found[routing]["of_matmul_rate"] for routing in ("natural", "balanced")]
    record({"goal_of_matmul_rate": GOAL, "goal_met": min(reached) >= GOAL})
    assert max(reached) < 1


def test_kernels_beside_their_rivals_in_bf16(gpu: Process, record: Any) -> None:
    """Transformer Engine's are among them where it is installed, in the process that sees it."""
    found = record(gpu.run("kernel_speeds", gpu_slice.Shape(), KERNEL_ROUNDS))
    gpu_contests.check_kernels(found)
    measured = [name for name, one in found.items() if "ours_s" in one]
    assert {"attention, 1 document", "experts, balanced"} <= set(measured)
    assert all(math.isfinite(found[name]["ours_s"]) for name in measured)


@pytest.mark.parametrize("choice", list(gpu_slice.CHOICES))
def test_a_step_with_each_choice_of_kernels(
    choice: str, gpu: Process, record: Any, speeds: dict[tuple[str, str], Any], request: pytest.FixtureRequest
) -> None:
    """`over_auto` above 1: the key `kernels.<choice>` should be on."""
    modules = request.node.callspec.params["gpu"]
    if choice in gpu_slice.THEIRS and modules != "te":
        pytest.skip("needs Transformer Engine")
    found = gpu.run("choice_speed", gpu_slice.Shape(), choice, CHOICE_WARM, CHOICE_ROUNDS)
    auto = speeds.get((modules, "auto"))
    record(found | ({"over_auto": found["tokens_per_s"] / auto["tokens_per_s"]} if auto else {}))
    speeds[modules, choice] = found
    gpu_slice.check_choice(found, auto)
