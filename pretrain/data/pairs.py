"""Which text belongs to which image, from what a batch says of its documents.

T tokens of the micro-batch, X tokens of all texts, B pairs.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from perilune.pretrain.data.batch import PackedBatch
from perilune.vision.pairs import Pairs


def pairs_of(batch: PackedBatch) -> Pairs:
    """Each image with the text that follows it in its document, up to the next image: what of it counts in the loss.

    The document's end mark is of its text, as of the loss, but alone it is none. An image without text is in no pair.
    `batch` is on the CPU; its documents are masked (without, a row is one document).
    """
    counts_T = torch.cat((torch.zeros(1, dtype=torch.bool), batch.loss_mask[0, :-1] > 0))  # a label is the token after
    bounds = batch.cu_seqlens.long()
    images: list[int] = []
    places: list[torch.Tensor] = []
    for number, image in enumerate(batch.images):
        after = image.start + image.tokens
        document_end = int(bounds[torch.searchsorted(bounds, after - 1, right=True)])
        until = batch.images[number + 1].start if number + 1 < len(batch.images) else document_end
        text = counts_T[after : min(until, document_end)].nonzero()[:, 0] + after
        if len(text) > 1 or (len(text) and int(text[0]) + 1 != document_end):
            images.append(number)
            places.append(text)
    index_X = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
    bounds_B = torch.tensor(list(accumulate(map(len, places), initial=0)), dtype=torch.int32)
    return Pairs(torch.tensor(images, dtype=torch.int64), batch.labels[0, index_X - 1], bounds_B)
