"""RMSNorm by chunks of rows against the formula and PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from perilune.kernels import norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 1, 24), (7, 24), (0, 24)])
def test_chunks_equal_the_formula_and_pytorch(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "CHUNK", 48)  # two rows
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(24, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(dtype)
    ours = norm.rms_norm(x, weight, 1e-5)
    close = {"atol": 0.05, "rtol": 0.02} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for theirs in (norm.reference(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5)):
        torch.testing.assert_close(ours, theirs, **close)
        mine, formula = (torch.autograd.grad(y, (x, weight), upstream, retain_graph=True) for y in (ours, theirs))
        for a, b in zip(mine, formula, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_double_precision_passes_gradcheck() -> None:
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: norm.rms_norm(x, w, 1e-6), (x, weight))
