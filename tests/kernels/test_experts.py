"""Experts on their rows, at once and from tokens to tokens, against a loop over experts."""

import pytest
import torch

from perilune.kernels import experts
from perilune.kernels.experts import grouped_swiglu, reference
from perilune.kernels.experts_loop import ROWS, routed_swiglu
from perilune.kernels.permute import Order, reference_permute, reference_unpermute
from perilune.parallel import late_compile

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _inputs(R: int, dtype: torch.dtype, H: int = 16, F: int = 8, E: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = (R, H), (E, 2 * F, H), (E, H, F)
    x, w1, w2 = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x, w1, w2, torch.rand(R, generator=generator, requires_grad=True)


def _same(ours: torch.Tensor, theirs: torch.Tensor, inputs: Inputs) -> None:
    loose = {"atol": 0.5, "rtol": 0.05} if ours.dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours.dtype)
    mine, formula = torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    for a, b in zip((ours, *mine), (theirs, *formula), strict=True):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [0, 0, 0, 0], [ROWS, ROWS + 1, 0, 1]])
@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", ["cpu", "other", "other, recomputed", "other, compiled", "other, recomputed, compiled"])
def test_grouped_equals_the_loop_in_values_and_gradients(
    counts: list[int], dtype: torch.dtype, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other devices it is two grouped matmuls, which run on a CPU too; what is compiled there runs as written."""
    if on != "cpu":
        monkeypatch.setattr(experts, "_loops", lambda x: False)
    compiled = "compiled" in on
    if compiled:
        late_compile.import_megatron_core()
    inputs = _inputs(sum(counts), dtype)  # without a row too: a rank must not skip a collective in backward
    x, w1, w2, probs = inputs
    of_each = torch.tensor(counts)
    with torch.compiler.set_stance("force_eager"):
        ours = grouped_swiglu(x, w1, w2, of_each, probs, recompute="recomputed" in on, compiled=compiled)
        _same(ours, reference(x, w1, w2, of_each, probs), inputs)


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_tokens_to_tokens_equals_permuting_and_the_loop(dtype: torch.dtype) -> None:
    T, E, K = 50, 4, 2
    x, w1, w2, _ = _inputs(T, dtype)
    weights = torch.rand(T, E, generator=torch.Generator().manual_seed(2), requires_grad=True)
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(
        1, weights[:, :3].topk(K).indices, True
    )  # none takes expert 3
    order = Order.of(chosen, K)
    ours = routed_swiglu(x, w1, w2, weights[order.tokens_R, order.experts_R], order)
    rows = reference(reference_permute(x, chosen), w1, w2, chosen.sum(0), weights.T[chosen.T])
    _same(ours, reference_unpermute(rows, chosen), (x, w1, w2, weights))


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_where_ddp_collects_them(dtype: torch.dtype) -> None:
    counts = torch.tensor([3, 0, 5, 2])
    x, w1, w2, probs = _inputs(10, dtype)
    upstream = torch.randn(10, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.autograd.grad(reference(x, w1, w2, counts, probs), (w1, w2), upstream)
    for weight in (w1, w2):
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    grouped_swiglu(x, w1, w2, counts, probs).backward(upstream)
    loose = {"atol": 0.5, "rtol": 0.05} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for weight, gradient in zip((w1, w2), expected, strict=True):
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(weight.main_grad, 1 + gradient.float(), **loose)  # type: ignore[attr-defined]


def test_frozen_weights_get_no_gradient() -> None:
    x, w1, w2, probs = _inputs(10, torch.float32)
    w1.requires_grad_(False), w2.requires_grad_(False)
    grouped_swiglu(x, w1, w2, torch.tensor([3, 0, 5, 2]), probs).sum().backward()
    assert w1.grad is None and w2.grad is None and x.grad is not None


def test_in_fp64_the_gradient_of_the_probabilities_is_fp64_s() -> None:
    order = Order.of(torch.ones(4, 1, dtype=torch.bool), 1)
    x, w1, w2 = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 64), (1, 64, 64), (1, 64, 32)))
    probs = torch.rand(4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(routed_swiglu(x, w1, w2, probs, order).sum(), probs)
    gate, up = (x @ w1[0].T).chunk(2, dim=-1)
    expected = ((torch.nn.functional.silu(gate) * up) @ w2[0].T).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_an_expanded_gradient_is_accepted() -> None:
    x, w1, w2 = torch.randn(4, 16), torch.randn(2, 16, 16, requires_grad=True), torch.randn(2, 16, 8)
    grouped_swiglu(x, w1, w2, torch.tensor([1, 3]), torch.ones(4)).sum().backward()
    assert w1.grad is not None and w1.grad.abs().sum() > 0


@pytest.mark.parametrize("loops", [True, False])
def test_a_size_that_is_no_multiple_of_16_bytes(loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_loops", lambda x: loops)
    x, w1, w2 = torch.randn(4, 6), torch.randn(2, 10, 6), torch.randn(2, 6, 5)
    counts, probs = torch.tensor([1, 3]), torch.rand(4)
    torch.testing.assert_close(grouped_swiglu(x, w1, w2, counts, probs), reference(x, w1, w2, counts, probs))
