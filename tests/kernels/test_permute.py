"""Sorting tokens by expert and summing them back, against a loop over experts."""

import pytest
import torch

from perilune.kernels.permute import Order, permute, reference_permute, reference_unpermute, unpermute


def _chosen(T: int, E: int, K: int) -> torch.Tensor:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    return torch.zeros(T, E, dtype=torch.bool).scatter_(1, scores.topk(K).indices, True)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_equal_the_loop_in_values_and_gradients(K: int, dtype: torch.dtype) -> None:
    chosen = _chosen(20, 6, K)
    order = Order.of(chosen, K)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 8, generator=generator).to(dtype).requires_grad_()
    rows = torch.randn(20 * K, 8, generator=generator).to(dtype).requires_grad_()
    close = {"atol": 0.02, "rtol": 0.02} if dtype is torch.bfloat16 else {}
    for ours, theirs, given in (
        (permute(x, order), reference_permute(x, chosen), x),
        (unpermute(rows, order), reference_unpermute(rows, chosen), rows),
    ):
        upstream = torch.randn(ours.shape, generator=generator).to(dtype)
        torch.testing.assert_close(ours, theirs, **close)
        (mine,), (formula,) = (torch.autograd.grad(out, given, upstream) for out in (ours, theirs))
        torch.testing.assert_close(mine, formula, **close)


def test_copies_lie_by_expert_and_then_by_token() -> None:
    chosen = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    order = Order.of(chosen, 2)
    assert order.experts_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert order.tokens_R.tolist() == [0, 2, 1, 2, 0, 1]
    assert order.copies_TK.tolist() == [[0, 4], [2, 5], [1, 3]]
    assert order.counts_E.tolist() == [2, 2, 2]


def test_a_token_with_another_number_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="3 choices of 2 tokens that choose 2 experts each"):
        Order.of(torch.tensor([[True, False, False], [True, True, False]]), 2)
