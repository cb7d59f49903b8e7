"""GPUs by the names that their drivers give."""

from __future__ import annotations

import pytest

from perilune.pretrain.plan.hardware import BF16_TFLOPS, named_in


@pytest.mark.parametrize(
    ("device", "tflops"),  # dense bf16 of NVIDIA's datasheets, which print twice as much, with sparsity
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_a_card_has_its_own_rate(device: str, tflops: int) -> None:
    name = named_in(device)
    assert name is not None and name in device and BF16_TFLOPS[name] == tflops


@pytest.mark.parametrize(
    "device",
    ["NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
     "NVIDIA L4", "NVIDIA H20", "NVIDIA GB300"],
)  # fmt: skip
def test_no_card_has_the_rate_of_another(device: str) -> None:
    assert named_in(device) is None
