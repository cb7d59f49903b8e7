"""Many features to one: attention with a learned query, inside each segment of what is packed.

X tokens or patches end to end, B segments (texts or images), H hidden, N heads, E = H / N, D feature dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class AttentionPool(torch.nn.Module):
    """One feature for each segment: a weighted mean of values in every head, LayerNorm, and a linear map.

    Each head has a query of its own that is learned, as CoCa's poolers have (arXiv 2205.01917, section 3.2); its
    product with a projection of the keys, learned as well, would be no more than a product with the keys themselves,
    so they are not projected. Nothing is split over tensor-parallel ranks, which hold and compute the same.
    """

    def __init__(self, hidden: int, heads: int, features: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.empty(heads, hidden, dtype=dtype))
        self.value = torch.nn.Linear(hidden, hidden, dtype=dtype)
        self.norm = torch.nn.LayerNorm(hidden, eps=eps, dtype=dtype)
        self.projection = torch.nn.Linear(hidden, features, bias=False, dtype=dtype)

    def forward(self, x_XH: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[B, D] of segments that begin and end at `cu_seqlens` ([B + 1], int32), none of them empty."""
        N = self.query.shape[0]
        scores_XN = F.linear(x_XH, self.query).float() / math.sqrt(x_XH.shape[1])
        weights_XN = segment_softmax(scores_XN, cu_seqlens)
        values_XNE = self.value(x_XH).unflatten(1, (N, -1))
        pooled_BNE = _over_segments(weights_XN[..., None] * values_XNE.float(), "sum", cu_seqlens.diff())
        out: torch.Tensor = self.projection(self.norm(pooled_BNE.flatten(1).to(x_XH.dtype)))
        return out


def segment_softmax(scores_XN: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Softmax over the rows of each segment, each column by itself. No segment may be empty."""
    lengths_B = cu_seqlens.diff()
    most_BN = _over_segments(scores_XN.detach(), "max", lengths_B)
    raised_XN = (scores_XN - most_BN.repeat_interleave(lengths_B, dim=0)).exp()
    return raised_XN / _over_segments(raised_XN, "sum", lengths_B).repeat_interleave(lengths_B, dim=0)


def _over_segments(x: torch.Tensor, how: str, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B, ...]: the sum or the maximum of each segment's rows, in their order, so the same in every run."""
    reduced: torch.Tensor = torch.segment_reduce(x, how, lengths=lengths_B, axis=0)
    return reduced
