"""A global batch dealt to data-parallel ranks and micro-batches so that all of them take about as long.

Rows hold the same number of tokens but not the same work: attention grows with the square of a document's length, and
images bring patches. What a row costs is known from the manifest, so every rank computes the same deal without
reading a row. Each rank gets as many rows and micro-batches as the others: only who computes a row changes, no loss.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.vision_counts import image_flops
from perilune.pretrain.schema import Model, Vision


@dataclass(frozen=True)
class CostModel:
    """FLOPs of training on a row: linear in its tokens, in the squares of its documents' lengths, and in patches."""

    token: float
    square: float
    patch: float = 0.0

    def of(self, squares: np.ndarray, patches: np.ndarray, seq_len: int) -> np.ndarray:
        """Costs [rows] of rows of `seq_len` tokens with these sums of squared lengths and patches."""
        return self.token * seq_len + self.square * squares + self.patch * patches


def cost_model(model: Model, vision: Vision | None = None) -> CostModel:
    """Of a decoder: the i-th token of a document attends to i tokens, so L tokens cost L(L+1)/2 pairs.

    A patch costs what the weights of tower and projector do; which images share a row's patches the manifest does not
    say, so their attention among each other is left out.
    """
    one, two = (flops_per_token(model, seq_len).training for seq_len in (1, 3))  # mean contexts of 1 and of 2 tokens
    pair = two - one
    patch = 3 * image_flops(vision, model.hidden_size).patch if vision is not None else 0.0
    return CostModel(token=one - pair + pair / 2, square=pair / 2, patch=patch)


def deal(costs: np.ndarray, dp_size: int, micro_batch_size: int) -> np.ndarray:
    """Places in the global batch of every rank's rows: int64 [dp_size, micro_batches, micro_batch_size].

    Longest processing time first (Graham 1969): the costliest row left goes to the rank with the least, among those
    that have room; inside a rank its micro-batches are filled likewise. A rank's micro-batches then stand in order of
    cost, since those of all ranks that run at the same time wait for each other where experts are spread over them.
    Ties go to the lower number. Raises InputError where the rows do not divide.
    """
    rows, at_once = len(costs), dp_size * micro_batch_size
    if rows < 1 or rows % at_once:
        raise InputError(
            f"a global batch of {rows} rows does not divide by {dp_size} data-parallel ranks x micro-batches of "
            f"{micro_batch_size} rows = {at_once}; change train.global_batch_size or train.micro_batch_size"
        )
    dealt = np.empty((dp_size, rows // at_once, micro_batch_size), np.int64)
    for rank, mine in enumerate(_longest_first(costs, dp_size)):
        micros = mine[_longest_first(costs[mine], rows // at_once)]
        dealt[rank] = micros[np.argsort(-costs[micros].sum(1), kind="stable")]
    return dealt


def _longest_first(costs: np.ndarray, bins: int) -> np.ndarray:
    """Indices of `costs` by bin: [bins, len(costs) / bins]."""
    room = len(costs) // bins
    filled: list[list[int]] = [[] for _ in range(bins)]
    least = [(0.0, number) for number in range(bins)]  # a heap
    for index in np.argsort(-costs, kind="stable").tolist():
        load, number = least[0]
        filled[number].append(index)
        if len(filled[number]) < room:
            heapq.heapreplace(least, (load + float(costs[index]), number))
        else:
            heapq.heappop(least)
    return np.array(filled, np.int64)
