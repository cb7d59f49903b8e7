"""A linear layer on a CPU against one matmul, in values and gradients; and which way this CPU is faster."""

from __future__ import annotations

import pytest
import torch

from perilune.kernels import matmul
from perilune.kernels.linear import CHUNK, linear, reference

CLOSE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.5, "rtol": 0.02}}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*one, generator=generator).to(dtype) for one in (shape, (24, shape[-1]), (*shape[:-1], 24))
    )
    return x.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 16), (2 * CHUNK + 5, 16), (3, 5, 16), (0, 16)])
def test_equals_one_matmul_in_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = _inputs(shape, dtype)
    ours, plain = linear(x, weight), reference(x, weight)
    torch.testing.assert_close(ours, plain, **CLOSE[dtype])
    mine, formula = (torch.autograd.grad(out, (x, weight), grad) for out in (ours, plain))
    for a, b in zip(mine, formula, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[dtype])


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_where_ddp_collects_it(dtype: torch.dtype) -> None:
    """In bf16 too without rounding of the sum."""
    x, weight, grad = _inputs((CHUNK + 3, 16), dtype)
    weight.main_grad = torch.ones(24, 16)  # type: ignore[attr-defined]
    linear(x, weight).backward(grad)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    exact = 1 + grad.double().T @ x.detach().double()
    found = weight.main_grad.double()  # type: ignore[attr-defined]
    rounded = dtype is torch.bfloat16 and not matmul.slow_bf16()
    torch.testing.assert_close(found, exact, atol=0.3 if rounded else 1e-3, rtol=0.01 if rounded else 1e-5)


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, grad = _inputs((4, 16), torch.float32)
    linear(x, weight.requires_grad_(False)).backward(grad)
    assert weight.grad is None and x.grad is not None
    x, weight, grad = _inputs((4, 16), torch.float32)
    linear(x.requires_grad_(False), weight).backward(grad)
    assert x.grad is None and weight.grad is not None


def test_only_bf16_on_a_cpu_works_in_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "slow_bf16", lambda: True)
    assert matmul.working(torch.ones(1, dtype=torch.bfloat16)) is torch.float32
    assert matmul.working(torch.ones(1, dtype=torch.bfloat16, device="meta")) is torch.bfloat16
    for dtype in (torch.float64, torch.float32):
        assert matmul.working(torch.ones(1, dtype=dtype)) is dtype
    monkeypatch.setattr(matmul, "slow_bf16", lambda: False)
    assert matmul.working(torch.ones(1, dtype=torch.bfloat16)) is torch.bfloat16


def test_no_counter_sees_the_matmuls_that_are_timed() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    matmul.slow_bf16.cache_clear()
    with FlopCounterMode(display=False) as counter:
        assert matmul.slow_bf16() in (True, False)
    assert counter.get_total_flops() == 0
