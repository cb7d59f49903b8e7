"""Captions that a model misreads in training: which tokens, by which others, and what stays true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.caption_noise import misread
from perilune.pretrain.data.collate import to_batch
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.data.prefetch import Recipe, load
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.storage import Remote
from perilune.pretrain.data.tokenizer import train_tokenizer

GLYPHS = "demo:glyphs:documents=1000"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    pack([GLYPHS], folder / "packed", train_tokenizer([GLYPHS], folder / "tok", 700), 128)
    return folder / "packed" / "train"


@pytest.fixture(scope="module")
def rows(packed: Path) -> list[Row]:
    dataset = PackedDataset(packed)
    found = [dataset[i] for i in range(40)]
    dataset.close()
    return found


def texts(row: Row) -> list[list[int]]:
    """Places of each text: what counts, cut by images and documents; told here token by token."""
    starts = set(row.cu_seqlens.tolist())
    found: list[list[int]] = []
    for place, counts in enumerate(row.loss_mask.tolist()):
        if counts and (not found or place in starts or found[-1][-1] != place - 1):
            found.append([])
        if counts:
            found[-1].append(place)
    return found


def test_a_token_is_that_of_another_text_at_the_same_place(rows: list[Row]) -> None:
    changed = drawn = possible = 0
    for row in rows:
        read, found = misread(row, 0.5), texts(row)
        assert len(found) > 1 and np.array_equal(read, misread(row, 0.5))
        outside = row.loss_mask == 0
        assert np.array_equal(read[outside], row.tokens[outside])
        for text in found:
            for offset, place in enumerate(text):
                others = {int(row.tokens[other[offset]]) for other in found if len(other) > offset}
                assert int(read[place]) in others
                changed += int(read[place]) != int(row.tokens[place])
                # At half, of the tokens that have others beside them half are drawn anew, some as what they were.
                same = sum(row.tokens[o[offset]] == row.tokens[place] for o in found if len(o) > offset)
                possible += 1 - same / sum(len(o) > offset for o in found)
                drawn += 1
    assert drawn > 1000 and changed / possible == pytest.approx(0.5, abs=0.06)


def test_what_is_read_as_it_is(rows: list[Row]) -> None:
    row = rows[0]
    assert np.array_equal(misread(row, 0.0), row.tokens)
    alone = Row(row.key, row.tokens, row.cu_seqlens, row.loss_mask)
    assert np.array_equal(misread(alone, 1.0), row.tokens), "a row without images"
    other = Row("another", row.tokens, row.cu_seqlens, row.loss_mask, row.docs_json, row.images)
    assert not np.array_equal(misread(other, 0.5), misread(row, 0.5))


def test_labels_and_pairs_stay_true(packed: Path) -> None:
    dataset = PackedDataset(packed)
    batches: list[PackedBatch] = []
    for noise in (0.0, 0.5):
        recipe = Recipe((str(packed),), (dataset.fingerprint,), 1, True, Remote(), False, noise, decode=True)
        (arrays,) = load([dataset], recipe, [[(0, 0), (0, 1)]]).batches
        batches.append(to_batch(arrays))
    dataset.close()
    true, noisy = batches
    assert not true.inputs.equal(noisy.inputs) and true.labels.equal(noisy.labels)
    assert true.loss_mask.equal(noisy.loss_mask) and true.image_index.equal(noisy.image_index)
    within = noisy.positions[1:] > 0  # of depth 1: the next token as it is read, not as it is
    assert noisy.inputs[1, :-1][within].equal(noisy.inputs[0, 1:][within])
    ours, theirs = pairs_of(noisy), pairs_of(true)
    for one, two in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        assert one.equal(two)
    assert len(ours) > 4
