"""Attention by document against the formula with a mask over the whole pack."""

import pytest
import torch

from perilune.kernels.attention import Pieces, piecewise_attention, reference, sdpa_by_document, varlen_attention


@pytest.mark.parametrize("lengths", [[7], [1, 5, 2], [3, 1, 1, 11]])
def test_sdpa_by_document_equals_the_masked_formula_in_values_and_gradients(lengths: list[int]) -> None:
    T, N, D, E = sum(lengths), 3, 12, 8
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(T, N, D, generator=generator, requires_grad=True) for _ in range(2))
    v = torch.randn(T, N, E, generator=generator, requires_grad=True)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    upstream = torch.randn(T, N, E, generator=generator)
    ours = varlen_attention(q, k, v, bounds, max(lengths), 0.3)
    theirs = reference(q, k, v, bounds, 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_boundary_changes_only_what_lies_behind_it() -> None:
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    one = sdpa_by_document(q, k, v, torch.tensor([0, 6]), 1.0)
    two = sdpa_by_document(q, k, v, torch.tensor([0, 4, 6]), 1.0)
    torch.testing.assert_close(one[:4], two[:4])
    assert not torch.allclose(one[4:], two[4:])


def test_pieces_of_a_pack_equal_the_masked_formula() -> None:
    """Queries 2..5 and 9..12 of documents of 4, 7 and 2 tokens: three pieces, of which the last begins its document."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(13, 2, size, generator=generator, requires_grad=True) for size in (12, 12, 8))
    bounds = torch.tensor([0, 4, 11, 13])
    mine = torch.tensor([2, 3, 4, 5, 9, 10, 11, 12])
    pieces = Pieces(((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 4), (4, 6), (4, 11), (11, 13)))
    ours = piecewise_attention(q[mine], k, v, pieces, 0.3)
    theirs = reference(q, k, v, bounds, 0.3)[mine]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(8, 2, 8, generator=generator)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
