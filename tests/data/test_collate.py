"""`collate` against the contract of PackedBatch written out token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row, RowImage


def naive(rows: list[Row], depth: int, document_mask: bool) -> tuple[list, list, list, list, list]:
    inputs, labels, masks = ([[] for _ in range(depth + 1)] for _ in range(3))
    positions, cu = [], [0]
    for row in rows:
        cuts = row.cu_seqlens.tolist() if document_mask else [0, row.tokens.size]
        for begin, end in pairwise(cuts):
            cu.append(cu[-1] + end - begin)
            for i in range(begin, end):
                positions.append(i - begin)
                for k in range(depth + 1):
                    inputs[k].append(int(row.tokens[i + k]) if i + k < end else 0)
                    labels[k].append(int(row.tokens[i + k + 1]) if i + k + 1 < end else 0)
                    masks[k].append(float(row.loss_mask[i + k + 1]) if i + k + 1 < end else 0.0)
    return inputs, labels, masks, positions, cu


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_equals_the_contract(data: st.DataObject, seq_len: int, count: int, depth: int, document_mask: bool) -> None:
    rows = []
    for n in range(count):
        cuts = sorted(data.draw(st.sets(st.integers(1, seq_len - 1)))) if seq_len > 1 else []
        mask = data.draw(st.lists(st.integers(0, 1), min_size=seq_len, max_size=seq_len))
        tokens = data.draw(st.lists(st.integers(1, 60000), min_size=seq_len, max_size=seq_len))
        cu = np.array([0, *cuts, seq_len], "<i4")
        rows.append(Row(f"{n}", np.array(tokens, "<u2"), cu, np.array(mask, "u1")))
    batch = collate(rows, depth, document_mask)
    inputs, labels, masks, positions, cu = naive(rows, depth, document_mask)
    assert batch.inputs.tolist() == inputs and batch.inputs.dtype == torch.int64
    assert batch.labels.tolist() == labels and batch.labels.dtype == torch.int64
    assert batch.loss_mask.tolist() == masks and batch.loss_mask.dtype == torch.float32
    assert batch.positions.tolist() == positions and batch.positions.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == cu and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == max(np.diff(cu)) and (batch.rows, batch.seq_len) == (count, seq_len)


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_row_by_hand(document_mask: bool) -> None:
    row = Row("0", np.array([5, 6, 7, 8], "<u2"), np.array([0, 3, 4], "<i4"), np.ones(4, "u1"))
    batch = collate([row], 1, document_mask)
    if document_mask:
        assert batch.labels.tolist() == [[6, 7, 0, 0], [7, 0, 0, 0]]
        assert batch.inputs.tolist() == [[5, 6, 7, 8], [6, 7, 0, 0]]
        assert batch.positions.tolist() == [0, 1, 2, 0]
    else:
        assert batch.labels.tolist() == [[6, 7, 8, 0], [7, 8, 0, 0]]
        assert batch.positions.tolist() == [0, 1, 2, 3]


def test_images_arrive_encoded_with_their_places() -> None:
    image = RowImage(b"\xff\xd8 not decoded", "jpg", 1, 2, (2, 4))
    plain = Row("0", np.array([5, 9, 9, 8], "<u2"), np.array([0, 4], "<i4"), np.ones(4, "u1"))
    batch = collate([plain, Row("1", *list(vars(plain).values())[1:4], images=(image,))], 0, True)
    (found,) = batch.images
    assert (found.start, found.tokens, found.grid, found.data) == (5, 2, (2, 4), image.data)
    assert batch.inputs[0, found.start : found.start + found.tokens].tolist() == [9, 9]
    assert batch.to("cpu").images == batch.images
