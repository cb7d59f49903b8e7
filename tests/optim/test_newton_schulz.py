"""Newton-Schulz: many matrices at once as each by the formula; bf16 as torch has it."""

from __future__ import annotations

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from perilune.kernels.newton_schulz import COEFFICIENTS, EPS, STEPS, orthogonalized, reference


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("shape", [(5, 48, 80), (3, 80, 48), (1, 64, 64), (4, 1, 16)])
def test_a_batch_is_the_paper_s_formula_one_by_one(shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    want = torch.stack([reference(one.double()) for one in x])
    assert apart(orthogonalized(x, torch.float32), want) < 1e-5
    assert orthogonalized(x, torch.bfloat16).shape == x.shape


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_bf16_is_as_torch_s_muon_has_it(shape: tuple[int, int]) -> None:
    """torch multiplies bf16 itself, however slowly; here products are fp32's, rounded."""
    x = drawn(*shape)
    torchs = _zeropower_via_newtonschulz(x, COEFFICIENTS, STEPS, EPS)
    ours = orthogonalized(x[None], torch.bfloat16)[0]
    exact = reference(x.double())
    assert ours.equal(ours.bfloat16().float())  # every number is one of bf16
    assert apart(ours, torchs) < 3e-2  # either is 1.3% from the exact one
    assert apart(ours, exact) < 1.2 * apart(torchs, exact)


def test_singular_values_come_near_one_and_nothing_stays_nothing() -> None:
    x = drawn(2, 32, 64) * torch.tensor([1e-6, 1e6])[:, None, None]
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalized(x, dtype).float())
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
        assert orthogonalized(torch.zeros(1, 8, 16), dtype).abs().max() == 0
