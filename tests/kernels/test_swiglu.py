"""SwiGLU in pieces against the formula, to the bit."""

import pytest
import torch

from perilune.kernels import swiglu as swiglus
from perilune.kernels.swiglu import reference, swiglu


@pytest.mark.parametrize("shape", [(7, 1, 6), (5, 12), (0, 4), (3, 2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglus, "CHUNK", 16)  # several pieces, the last one short; rows longer than a piece
    generator = torch.Generator().manual_seed(0)
    h = (torch.randn(shape, generator=generator) * 4).to(dtype).requires_grad_()
    found, expected = swiglu(h), reference(h)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for grad in (upstream, torch.ones((), dtype=dtype).expand(expected.shape)):
        mine, formulas = (torch.autograd.grad(y, h, grad, retain_graph=True) for y in (found, expected))
        torch.testing.assert_close(mine, formulas, rtol=0, atol=0)
