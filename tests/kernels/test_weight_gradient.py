"""Where the gradients of weights go, in every kernel that has one."""

from collections.abc import Callable

import pytest
import torch

from perilune.kernels.cross_entropy import linear_cross_entropy
from perilune.kernels.experts_loop import routed_swiglu
from perilune.kernels.linear import linear
from perilune.kernels.permute import Order
from perilune.kernels.weight_gradient import WeightGradient

T, H, E = 6, 16, 3
ORDER = Order.of(torch.nn.functional.one_hot(torch.arange(T) % E, E).bool(), 1)


def _linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(x, w[0])


def _experts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return routed_swiglu(x, w, torch.ones(E, H, H), torch.ones(T), ORDER)


def _head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(x, w[0], torch.arange(T))


@pytest.mark.parametrize("operation", [_linear, _experts, _head])
def test_it_is_collected_also_where_hooks_gave_the_weight_back(operation: Callable[..., torch.Tensor]) -> None:
    """They may give back a copy, which has no `main_grad`; DDP would drop its gradient after a plain use's."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator) for shape in ((T, H), (E, 2 * H, H)))
    weight = w.requires_grad_() if operation is _experts else w[0].clone().requires_grad_()
    given = weight if operation is _experts else [weight]
    operation(x, given).square().sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    operation(x, given).square().sum().backward()
    with torch.autograd.graph.save_on_cpu():
        again = operation(x, given)
    again.square().sum().backward()
    assert expected is not None and expected.any()
    torch.testing.assert_close(weight.main_grad, 2 * expected)  # type: ignore[attr-defined]


def test_what_backward_returns_beside_it_is_zero_where_ddp_will_add_it() -> None:
    weight = torch.ones(64, 64)
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(64, 64), True  # type: ignore[attr-defined]
    dirty = [torch.full((64, 64), 7.0) for _ in range(8)]
    del dirty
    returned = WeightGradient(weight, needed=True).done()
    assert returned is not None and not returned.any()
