"""Out of memory: said with the largest part, and written down. What MFU is a part of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from perilune.kernels import matmul
from perilune.pretrain import meter
from perilune.pretrain.profiling import explain_out_of_memory


def test_a_failed_allocation_names_the_largest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    net = torch.nn.Linear(64, 64, bias=False)
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 64)).sum().backward()
    adam.step()
    optimizer = SimpleNamespace(optimizer=adam, param_groups=[])
    largest = "rank 3; the largest part is optimizer state"  # two moments to one weight
    with pytest.raises(MemoryError, match=largest), explain_out_of_memory(tmp_path, [net], optimizer):
        torch.empty(1 << 58, dtype=torch.uint8)
    assert "weights" in (tmp_path / "out_of_memory_rank_3.txt").read_text()


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), explain_out_of_memory(tmp_path, [], SimpleNamespace()):
        raise RuntimeError("shapes")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(("slow", "worked"), [(True, "float32"), (False, "bfloat16")])
def test_mfu_is_of_the_type_in_which_a_cpu_multiplies_bf16(
    slow: bool, worked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "slow_bf16", lambda: slow)
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype: torch.ones(2, 2, dtype=dtype))  # not a second of bf16
    name, rate = meter.peak.__wrapped__(torch.bfloat16)
    assert f"in {worked}," in name and rate
