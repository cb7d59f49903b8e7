"""Two grouped matmuls against a loop over experts."""

import pytest
import torch

from perilune.kernels.experts import grouped_swiglu, reference


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_the_loop_in_values_and_gradients(counts: list[int], dtype: torch.dtype) -> None:
    R, H, F, E = sum(counts), 16, 8, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(R, H, generator=generator).to(dtype).requires_grad_()
    w1 = torch.randn(E, 2 * F, H, generator=generator).to(dtype).requires_grad_()
    w2 = torch.randn(E, H, F, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(R, generator=generator, requires_grad=True)
    upstream = torch.randn(R, H, generator=generator).to(dtype)
    inputs = (x, w1, w2, probs)  # all of them, without a row too: a rank must not skip a collective in backward
    ours = grouped_swiglu(x, w1, w2, torch.tensor(counts), probs)
    theirs = reference(x, w1, w2, torch.tensor(counts), probs)
    loose = {"atol": 0.5, "rtol": 0.05} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours, theirs, **loose)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, **loose)


def test_an_expanded_gradient_is_accepted() -> None:
    x, w1, w2 = torch.randn(4, 16), torch.randn(2, 16, 16, requires_grad=True), torch.randn(2, 16, 8)
    grouped_swiglu(x, w1, w2, torch.tensor([1, 3]), torch.ones(4)).sum().backward()
    assert w1.grad is not None and w1.grad.abs().sum() > 0


def test_a_size_that_is_no_multiple_of_16_bytes_takes_the_loop() -> None:
    x, w1, w2 = torch.randn(4, 6), torch.randn(2, 10, 6), torch.randn(2, 6, 5)
    counts, probs = torch.tensor([1, 3]), torch.rand(4)
    torch.testing.assert_close(grouped_swiglu(x, w1, w2, counts, probs), reference(x, w1, w2, counts, probs))
