"""How fast GPUs are on paper: dense bf16 without sparsity, from NVIDIA's datasheets."""

from __future__ import annotations

import re

from perilune.pretrain.errors import InputError

BF16_TFLOPS = {"GB200": 2500, "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
               "H100": 989, "H800 PCIe": 756, "H800": 989, "GH200": 989, "A100": 312, "A800": 312, "L40S": 362,
               "L40": 181}  # fmt: skip


def named_in(device: str) -> str | None:
    """The first name of the table that `device`, as its driver calls it, holds as words; None if there is none.

    Words, since an RTX A1000 is no A100. A MIG slice bears the name of its card and has a part of its rate: none.
    """
    if re.search(r"\bMIG\b", device):
        return None
    return next((name for name in BF16_TFLOPS if re.search(rf"\b{name}\b", device)), None)


def flops_per_s(gpu: str) -> float:
    """Peak of one GPU, by its name in any case. Raises InputError for one that the table lacks."""
    for name, tflops in BF16_TFLOPS.items():
        if name.lower() == gpu.lower():
            return tflops * 1e12
    raise InputError(
        f"--gpu {gpu}: its rate is not known here; known are {', '.join(BF16_TFLOPS)}. For another one give --compute: "
        "GPUs x its dense bf16 FLOP/s x MFU x seconds"
    )
