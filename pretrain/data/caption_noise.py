"""What a model reads of captions in training, not all of it true: so that it believes the image, not what it has read.

A decoder that reads its captions' first words right can learn from them which words follow, and never looks. It then
cannot name what it sees put together for the first time: training's captions say that the two never stand together.
Word dropout (arXiv 1511.06349, section 3.1) in the form that leaves no word which gives itself away.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np

from perilune.pretrain.data.shard import Row


def misread(row: Row, part: float) -> np.ndarray:
    """Tokens [S] of `row` as a model is to read them; its labels are the row's own.

    `part` of the tokens that count in the loss are those at the same place of other texts of the row, where texts are
    cut by images and documents. A row without images is read as it is. The row's key decides the draws: it is always
    misread in the same way, whatever the layout, after a resume too.
    """
    if not part or not row.images:
        return row.tokens
    counts = row.loss_mask > 0
    begins = counts & ~np.append(False, counts[:-1])
    begins[row.cu_seqlens[:-1]] = counts[row.cu_seqlens[:-1]]
    firsts = np.flatnonzero(begins)
    texts = np.flatnonzero(counts)
    offsets = texts - firsts[np.cumsum(begins)[texts] - 1]
    draw = random.Random(int.from_bytes(hashlib.sha256(row.key.encode()).digest())).random  # the same in every Python
    read = row.tokens.copy()
    for offset in range(int(offsets.max(initial=-1)) + 1):
        at = texts[offsets == offset]
        for place in at:
            if draw() < part:
                read[place] = row.tokens[at[int(draw() * len(at))]]
    return read
