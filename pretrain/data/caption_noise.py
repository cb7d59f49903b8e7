"""What a model reads of captions in training, not all of it true: so that it believes the image, not what it has read.

A decoder that reads its captions' first words right can learn from them which words follow, and never looks. It then
cannot name what it sees put together for the first time: training's captions say that the two never stand together.
Word dropout (arXiv 1511.06349, section 3.1), in the form that puts words where such words stand.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np

from perilune.pretrain.data.shard import Row


def misread(row: Row, part: float) -> np.ndarray:
    """Tokens [S] of `row` as a model is to read them; its labels are the row's own.

    `part` of the tokens that count in the loss are those at the same place of a text of the row that is drawn at
    random, its own among them: a text alone stays true. Texts are cut by images and documents; a document's end is part
    of its last. A row without images is read as it is. The row's key decides the draws: it is always
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
    order = np.argsort(offsets, kind="stable")
    for at in np.split(texts[order], np.cumsum(np.bincount(offsets))[:-1]):  # the same place of each text
        for place in at:
            if draw() < part:
                read[place] = row.tokens[at[int(draw() * len(at))]]
    return read
