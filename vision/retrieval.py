"""What features are good for without training on a task: retrieval between images and texts, zero-shot classification.

A query is answered by the keys in the order of their cosine. Where a key that is wrong lies level with the best that is
right it counts as before it, so that features which tell nothing apart find nothing.

N images, M texts, C classes, P prompts; Q queries, K keys; D feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perilune.vision.contrastive import blocks, unit

TIE = 1e-6  # cosines nearer than this are level: the same text at two places of a batch is rounded differently


@dataclass(frozen=True)
class Retrieval:
    """Recall by k: the share of queries with a right answer among the first k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval(
    images_ND: torch.Tensor, texts_MD: torch.Tensor, image_of_M: torch.Tensor, at: Sequence[int] = (1, 5, 10)
) -> Retrieval:
    """Recall@k both ways, where text m belongs to image `image_of_M[m]` (int64); an image may have several.

    Any of an image's texts is a right answer to it. Raises ValueError as `places` does: where an image has no text, or
    a text no image.
    """
    image_N = torch.arange(len(images_ND), device=images_ND.device)
    return Retrieval(
        image_to_text=_recall(places(images_ND, texts_MD, image_N, image_of_M), at),
        text_to_image=_recall(places(texts_MD, images_ND, image_of_M, image_N), at),
    )


def zero_shot(
    images_ND: torch.Tensor, classes_CD: torch.Tensor, labels_N: torch.Tensor, at: Sequence[int] = (1,)
) -> dict[int, float]:
    """Top-k accuracy by k of images whose class is that of the nearest row of `classes_CD` (arXiv 2103.00020, 3.1.2).

    Raises ValueError as `places` does: where a label (int64) is none of the C classes.
    """
    class_C = torch.arange(len(classes_CD), device=classes_CD.device)
    return _recall(places(images_ND, classes_CD, labels_N, class_C), at)


@torch.no_grad()
def class_features(prompts_PD: torch.Tensor, class_P: torch.Tensor, classes: int) -> torch.Tensor:
    """[C, D] for `zero_shot`: the mean of the directions of each class's prompts (arXiv 2103.00020, section 3.1.4).

    `class_P` (int64) says which of `classes` classes each prompt names. Raises ValueError for a class without a prompt.
    """
    counts_C = torch.bincount(class_P, minlength=classes)
    if len(counts_C) > classes or not bool(counts_C.all()):
        raise ValueError(
            f"prompts name classes {sorted(set(class_P.tolist()))}: each of the {classes} from 0 on needs one at least"
        )
    directions_PD = unit(prompts_PD)
    sums_CD = directions_PD.new_zeros(classes, directions_PD.shape[1]).index_add_(0, class_P, directions_PD)
    return unit(sums_CD)


@torch.no_grad()
def places(
    queries_QD: torch.Tensor, keys_KD: torch.Tensor, query_ids_Q: torch.Tensor, key_ids_K: torch.Tensor
) -> torch.Tensor:
    """[Q] int64: at which place, from 1 on, each query finds the first key that has its id.

    Cosines are held for a few queries at a time, never [Q, K]. A query of which a cosine is not a number finds nothing
    before what it is compared with. Raises ValueError where shapes do not fit or a query's id is no key's.
    """
    Q, K = len(queries_QD), len(keys_KD)
    if queries_QD.shape[1:] != keys_KD.shape[1:] or query_ids_Q.shape != (Q,) or key_ids_K.shape != (K,):
        raise ValueError(
            f"queries {list(queries_QD.shape)} with ids {list(query_ids_Q.shape)} and keys {list(keys_KD.shape)} with "
            f"ids {list(key_ids_K.shape)} must be [Q, D], [Q], [K, D] and [K]"
        )
    lost = (~torch.isin(query_ids_Q, key_ids_K)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"{len(lost)} of {Q} queries have no right answer among {K} keys, the first of them query {lost[0]} with "
            f"id {int(query_ids_Q[lost[0]])}: leave them out"
        )
    queries_QD, keys_KD = unit(queries_QD), unit(keys_KD)
    places_Q = torch.empty(Q, dtype=torch.int64, device=queries_QD.device)
    for rows in blocks(Q, K):
        cosines = queries_QD[rows] @ keys_KD.T
        right = query_ids_Q[rows, None] == key_ids_K
        best = cosines.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = ~(cosines < best - TIE)  # not the opposite comparison: what is not a number counts as ahead
        places_Q[rows] = 1 + (ahead & ~right).sum(1)
    return places_Q


def _recall(places_Q: torch.Tensor, at: Sequence[int]) -> dict[int, float]:
    """Raises ValueError without queries."""
    if not len(places_Q):
        raise ValueError("recall of 0 queries is not a number: give some features")
    return {k: float((places_Q <= k).double().mean()) for k in at}
