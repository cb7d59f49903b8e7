"""Contrastive objectives on features: InfoNCE, CLIP's symmetric form of it, and SigLIP's sigmoid of every pair.

All of them return, as the other objectives do, the *sum* of this rank's losses and the count of its terms. The
gradients of all ranks added up and divided by the count over all ranks are those of the mean over the whole batch,
which is what the ranks of `group` hold together at one call: one rank with all of it gives the same.

Backward sends messages too: every rank runs it, as often as the others, and where the features of one need a gradient
those of all do, of a rank without pairs too. Whatever their type, they are compared in fp32 (float64 stays float64).

B pairs of this rank, C of another one, A of all ranks; Q queries, K keys; D feature dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from perilune.kernels.cross_entropy import linear_cross_entropy
from perilune.vision.ring import Ring

BLOCK = 1 << 22  # products of features held at once (16 MB in fp32)


def info_nce(
    queries_QD: torch.Tensor, keys_KD: torch.Tensor, positives_Q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (arXiv 1807.03748, eq. 4): -log(f(q, its key) / sum of f(q, key) over all keys), with f = exp(q . key).

    `positives_Q` (int64) says which of the K keys each query belongs to; the other K - 1 are its negatives. What makes
    the product a logit (a temperature, CPC's W_k) is in the queries already. Returns the sum over queries in nats and
    their count; log K minus the mean is a lower bound of the mutual information (section 2.3) where negatives are
    independent draws. Logits are held for a few queries at a time, so never [Q, K].

    Raises ValueError where shapes do not fit or a positive is none of the keys.
    """
    Q, K = len(queries_QD), len(keys_KD)
    if queries_QD.ndim != 2 or queries_QD.shape[1:] != keys_KD.shape[1:] or positives_Q.shape != (Q,):
        raise ValueError(
            f"queries {list(queries_QD.shape)}, keys {list(keys_KD.shape)} and positives {list(positives_Q.shape)} "
            "must be [Q, D], [K, D] and [Q]"
        )
    if Q:
        low, high = torch.stack(positives_Q.aminmax()).tolist()
        if low < 0 or high >= K:
            raise ValueError(f"positives from {low} to {high}: each must be the row of one of the {K} keys")
    queries_QD, keys_KD = wide(queries_QD), wide(keys_KD)
    losses_Q = linear_cross_entropy(queries_QD, keys_KD, positives_Q, keep=False) if K else queries_QD.sum(1)
    return losses_Q.sum(), _count(Q, queries_QD)


def clip(
    images_BD: torch.Tensor, texts_BD: torch.Tensor, scale: torch.Tensor, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP (arXiv 2103.00020, figure 3): the mean of InfoNCE of images among texts and of texts among images.

    Row i of both is a pair; they are L2-normalised here. `scale` ([], see `Temperature`) multiplies their cosine. The
    features of all ranks of `group` are candidates on each of them, where the losses are those of its own images and
    texts. Returns the sum over this rank's pairs in nats and their count.

    Raises ValueError, on every rank if on one, where the shapes of the features do not fit.
    """
    ring = Ring.of(images_BD, texts_BD, group)
    images_BD, texts_BD = unit(images_BD), unit(texts_BD)
    width = images_BD.shape[1]
    images_AD, texts_AD = ring.gather(torch.cat((images_BD, texts_BD), dim=1)).split(width, dim=1)
    mine_B = torch.arange(ring.first, ring.first + len(images_BD), device=images_BD.device)
    scale = scale.to(images_BD.dtype)
    by_image, count = info_nce(scale * images_BD, texts_AD, mine_B)
    by_text, _ = info_nce(scale * texts_BD, images_AD, mine_B)
    return (by_image + by_text) / 2, count


def siglip(
    images_BD: torch.Tensor,
    texts_BD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP (arXiv 2303.15343, section 3.2): -sum over images i, texts j of log sigmoid(z_ij (scale x_i.y_j + bias)).

    z is +1 for a pair and -1 else. Row i of both is a pair; they are L2-normalised here. `scale` and `bias` are []
    (see `SigmoidScale`). Each rank compares its images with its texts and then with those of the other ranks, which
    come around the ring (section 3.3), so that each image meets each text on one rank; texts of a single other rank
    are at work at a time, those of the next under way. Logits are held in blocks of `BLOCK`, in backward too, which
    computes them again. Returns the sum over this rank's images in nats and their count.

    Raises ValueError, on every rank if on one, where the shapes of the features do not fit.
    """
    ring = Ring.of(images_BD, texts_BD, group)
    x_BD, y_BD = unit(images_BD), unit(texts_BD)
    loss: torch.Tensor = _SigmoidOfPairs.apply(x_BD, y_BD, scale.to(x_BD.dtype), bias.to(x_BD.dtype), ring)
    return loss, _count(len(x_BD), x_BD)


class _SigmoidOfPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: torch.Tensor, y_BD: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, ring: Ring
    ) -> torch.Tensor:
        y_BD = y_BD.contiguous()
        ctx.save_for_backward(x_BD, y_BD, scale, bias)
        ctx.ring = ring
        scaled_BD, total = scale * x_BD, x_BD.new_zeros(())
        for hop, y_CD in enumerate(ring.chunks(y_BD)):
            for rows in blocks(len(x_BD), len(y_CD)):
                logits = torch.addmm(bias, scaled_BD[rows], y_CD.T)
                if hop == 0:
                    logits.diagonal(rows.start).neg_()
                total -= F.logsigmoid(logits.neg_()).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x_BD, y_BD, scale, bias = ctx.saved_tensors
        ring: Ring = ctx.ring
        scaled_BD, dscaled_BD, dbias = scale * x_BD, torch.zeros_like(x_BD), torch.zeros_like(bias)
        arriving: Callable[[], torch.Tensor] | None = None
        for hop, y_CD in enumerate(ring.chunks(y_BD)):
            dy_CD = torch.zeros_like(y_CD)
            for rows in blocks(len(x_BD), len(y_CD)):
                slopes = torch.addmm(bias, scaled_BD[rows], y_CD.T)
                # By the sign of the pair before and after, for sigmoid(l) - 1 would lose the small ones to rounding.
                if hop == 0:
                    slopes.diagonal(rows.start).neg_()
                slopes.sigmoid_().mul_(grad)
                if hop == 0:
                    slopes.diagonal(rows.start).neg_()
                dscaled_BD[rows].addmm_(slopes, y_CD)
                dy_CD.addmm_(slopes.T, scaled_BD[rows])
                dbias += slopes.sum()
            # The gradient follows its texts: it comes from the rank that had them before, with that rank's part.
            if arriving is not None:
                dy_CD += arriving()
            arriving = ring.pass_on(dy_CD, hop, tag=1)
        assert arriving is not None  # a ring has at least this rank
        return scale * dscaled_BD, arriving(), (x_BD * dscaled_BD).sum(), dbias, None


class _Scalars(torch.nn.Module):
    """Parameters of one number each, fp32 in a 16-bit model too, where a step of training would round to nothing."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {name: parameter.data for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = kept[name].to(parameter.device)
        return self


class Temperature(_Scalars):
    """exp(s), the learned inverse temperature of `clip`: s begins at ln(1/0.07) (arXiv 2103.00020, section 2.5).

    s is clamped to [0, ln 100], as openai/CLIP and mlfoundations/open_clip clamp it after each step: here before it is
    used, on every rank alike. The parameter itself, and with it the master, which for one of fp32 is its own memory: as
    long as a loss pushed against a bound it would run on behind it, and be as long in coming back.
    """

    def __init__(self, initial: float = 1 / 0.07, largest: float = 100.0) -> None:
        """Raises ValueError unless 1 <= `initial` <= `largest`."""
        super().__init__()
        if not 1 <= initial <= largest:
            raise ValueError(f"initial={initial} must lie between 1 and largest={largest}, to which exp(s) is clamped")
        self.largest = largest
        self.log_scale = _number(math.log(initial))

    def forward(self) -> torch.Tensor:
        """[] in [1, largest]."""
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(self.largest))
        return self.log_scale.exp()[0]


class SigmoidScale(_Scalars):
    """t = exp(t') and b of `siglip`: t' begins at ln 10 and b at -10 (arXiv 2303.15343, section 3.2), unclamped."""

    def __init__(self, initial: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.log_scale = _number(math.log(initial))
        self.bias = _number(bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([], []): scale and bias."""
        return self.log_scale.exp()[0], self.bias[0]


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same in fp32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x_BD: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in fp32 at least; a row of zeros stays."""
    return F.normalize(wide(x_BD), dim=-1)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with at most `BLOCK` products with all columns each, or of a single row."""
    height = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _number(value: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.tensor([value], dtype=torch.float32))
    parameter.starts_at = value  # type: ignore[attr-defined]  # what `moe.init` would draw is not for it
    # 0 is no neutral value of a temperature or a bias, and AdamW's decay of lambda holds a weight within about
    # 1 / lambda: with 0.1, SigLIP's bias could not go beyond the -10 at which it begins (pretrain/optim/optimizer.py).
    parameter.undecayed = True  # type: ignore[attr-defined]
    return parameter


def _count(number: int, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int, device=like.device)
