"""How context parallelism cuts rows, against its definition token by token."""

import pytest
import torch

from perilune.parallel import context


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bounds", [[0, 16, 32], [0, 1, 9, 16, 19, 32], [0, *range(3, 16), 16, 30, 32]])
def test_every_token_is_held_once_and_sees_its_document_up_to_itself(size: int, bounds: list[int]) -> None:
    rows, seq_len = 2, 16
    cuts = [context.cut(rows, seq_len, torch.tensor(bounds, dtype=torch.int32), rank, size) for rank in range(size)]
    held = torch.cat([cut.index_Q for cut in cuts])
    assert sorted(held.tolist()) == list(range(rows * seq_len))
    start_of = {i: max(b for b in bounds if b <= i) for i in range(rows * seq_len)}
    for cut in cuts:
        assert torch.equal(held[cut.order_T], torch.arange(rows * seq_len))
        seen = {}
        for (start, end), (first, last) in zip(cut.pieces.queries, cut.pieces.keys, strict=True):
            for back, query in enumerate(reversed(range(start, end))):
                seen[int(cut.index_Q[query])] = (first, last - back)
        assert seen == {i: (start_of[i], i + 1) for i in cut.index_Q.tolist()}


def test_ranks_have_equal_work() -> None:
    """Zig-zag: with one document a row, every rank's queries see as many keys in all."""
    work = []
    for rank in range(4):
        cut = context.cut(1, 64, torch.tensor([0, 64], dtype=torch.int32), rank, 4)
        work.append(int((cut.index_Q + 1).sum()))
    assert len(set(work)) == 1


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens does not divide into 2 x 4"):
        context.cut(1, 12, torch.tensor([0, 12], dtype=torch.int32), 0, 4)
