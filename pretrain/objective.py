"""What is minimised: an objective is `(losses, batch, weights) -> loss sum, token count, metrics`.

T tokens of the micro-batch, D the MTP depth.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from perilune.pretrain.data.batch import PackedBatch


class Objective(Protocol):
    """Per-token losses [1+D, T] into the sum to differentiate, the count of main-loss tokens, and sums to log."""

    def __call__(
        self, losses_DT: torch.Tensor, batch: PackedBatch, mtp_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]: ...


def next_token(
    losses_DT: torch.Tensor, batch: PackedBatch, mtp_weight: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token loss plus lambda/D times the sum of the deeper depths' (V3 eq. 24 and 25), as sums over tokens.

    A training step divides all of it by the global batch's main-loss tokens, every depth, whatever the layout.
    """
    sums_D = (losses_DT * batch.loss_mask).sum(-1)
    counts_D = batch.loss_mask.sum(-1)
    depth = sums_D.numel() - 1
    objective = sums_D[0] + (mtp_weight / depth) * sums_D[1:].sum() if depth else sums_D[0]
    return objective, counts_D[0].to(torch.int), {"sums": sums_D.detach(), "counts": counts_D}


def mean_over(
    outputs: Any, batch: PackedBatch, mtp_weight: float, *, objective: Objective, tokens: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`objective` over the global batch's main-loss tokens: gradients add up to those of the mean."""
    total, count, found = objective(outputs, batch, mtp_weight)
    return total / tokens, count, found


def captions_and_pairs(
    outputs: tuple[torch.Tensor, ...],
    batch: PackedBatch,
    mtp_weight: float,
    *,
    captions: Objective,
    caption_weight: float,
    tokens_per_pair: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The pairs' loss, a mean over pairs, plus `caption_weight` times `captions`, a mean over tokens (2504.07491, 2.3).

    `outputs` are the losses of the tokens, then what `vision.pairs.Contrastive` gives. `tokens_per_pair` is the global
    batch's counted tokens over its pairs: what divides all of it is the tokens.
    """
    losses_DT, contrast, count, scale = outputs
    objective, tokens, found = captions(losses_DT, batch, mtp_weight)
    pairs = torch.stack((contrast.detach().double(), count.double()))
    return (
        caption_weight * objective + tokens_per_pair * contrast,
        tokens,
        found | {"pairs": pairs, "scale": scale.double()},
    )
