"""The feed-forward of many experts at once on tokens sorted by expert: two grouped matmuls around SwiGLU.

R routed copies of tokens (tokens x top-k), sorted by expert; H hidden, F expert FFN, E experts on this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from perilune.kernels.experts_loop import routed_swiglu
from perilune.kernels.permute import Order


def grouped_swiglu(
    x_RH: torch.Tensor,
    w1_EGH: torch.Tensor,
    w2_EHF: torch.Tensor,
    counts_E: torch.Tensor,
    probs_R: torch.Tensor,
    recompute: bool = False,
    compiled: bool = False,
) -> torch.Tensor:
    """prob * (silu(x gate) * (x up)) down, for each expert on its own rows. Returns [R, H].

    `w1_EGH` is [E, 2F, H], gate rows before up rows; `w2_EHF` is [E, H, F]; `counts_E` the rows of each expert (a sum
    of R; an expert may have none). The probability scales before the down projection, as Megatron-core does: the same
    number, and the gradient of the probability needs no second matmul. With `recompute`, backward computes silu, the
    product and the scaling again instead of keeping them (R * F numbers three times); a CPU always does. With
    `compiled`, Megatron-core's compiled function does all three where it is no CPU, keeps their input alone, and scales
    before it rounds.
    """
    if _loops(x_RH):
        return routed_swiglu(x_RH, w1_EGH, w2_EHF, probs_R, Order.sorted(counts_E))
    if not _aligned(x_RH, w1_EGH, w2_EHF):
        return reference(x_RH, w1_EGH, w2_EHF, counts_E, probs_R)
    ends = counts_E.to(device=x_RH.device).cumsum(0).to(torch.int32)
    h_RG = F.grouped_mm(x_RH, w1_EGH.transpose(1, 2), offs=ends)

    def down(h_RG: torch.Tensor, probs_R: torch.Tensor) -> torch.Tensor:
        act_RF = _compiled(h_RG, probs_R) if compiled else _by_operations(h_RG, probs_R)
        return _Contiguous.apply(F.grouped_mm(act_RF, w2_EHF.transpose(1, 2), offs=ends))

    if not recompute:
        return down(h_RG, probs_R)
    # It stops before the second matmul: by then all that backward wants is there again.
    return checkpoint(down, h_RG, probs_R, use_reentrant=False, preserve_rng_state=False)


def _by_operations(h_RG: torch.Tensor, probs_R: torch.Tensor) -> torch.Tensor:
    """prob * silu(gate) * up, one operation of PyTorch after the other. Returns [R, F]."""
    gate, up = h_RG.chunk(2, dim=-1)
    return F.silu(gate) * up * probs_R.unsqueeze(-1).to(h_RG.dtype)


def _compiled(h_RG: torch.Tensor, probs_R: torch.Tensor) -> torch.Tensor:
    """The same by Megatron-core."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    act_RF: torch.Tensor = weighted_bias_swiglu_impl(h_RG, None, probs_R.unsqueeze(-1))
    return act_RF


def _loops(x_RH: torch.Tensor) -> bool:
    """On a CPU, grouped_mm reaches four fifths of the rate of one matmul an expert into memory that is there."""
    return x_RH.device.type == "cpu"


def _aligned(*tensors: torch.Tensor) -> bool:
    """grouped_mm wants every row to be a multiple of 16 bytes."""
    return all(t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is made contiguous: grouped_mm's backward refuses an expanded (stride 0) one."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


def reference(
    x_RH: torch.Tensor, w1_EGH: torch.Tensor, w2_EHF: torch.Tensor, counts_E: torch.Tensor, probs_R: torch.Tensor
) -> torch.Tensor:
    """The same by a loop over experts; for tests, and where a size is not a multiple of 16 bytes."""
    outs = []
    sizes = counts_E.tolist()
    for e, (x, p) in enumerate(zip(x_RH.split(sizes), probs_R.split(sizes), strict=True)):
        gate, up = (x @ w1_EGH[e].T).chunk(2, dim=-1)
        outs.append((F.silu(gate) * up * p.unsqueeze(-1).to(x.dtype)) @ w2_EHF[e].T)
    return torch.cat(outs)
