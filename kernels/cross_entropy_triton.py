"""What cross-entropy does to each logit on a GPU: one reading in forward, one reading and writing in backward.

PyTorch's operations would go over [T, V] some ten times, most of them in fp32. No library has this for logits that are
made in chunks, in 16 bits, of a part of the vocabulary. For fp32 and 16 bits; all is computed in fp32.

T tokens, V vocabulary of this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # logits of one step of a program; not measured on a GPU yet
_LEAST = tl.constexpr(-3.0e38)  # below all logits, and finite: the difference of two infinities is nan


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(logits, at, most, total, label, V, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    columns = tl.arange(0, BLOCK)
    # Each lane has its own maximum and sum, so that lanes meet once in a row.
    m = tl.full((BLOCK,), _LEAST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(start + first + columns, mask=first + columns < V, other=_LEAST).to(tl.float32)
        new = tl.maximum(m, x)
        s = s * tl.exp(m - new) + tl.exp(x - new)
        m = new
    largest = tl.max(m, 0)
    tl.store(most + row, largest)
    tl.store(total + row, tl.sum(s * tl.exp(m - largest), 0))
    tl.store(label + row, tl.load(start + tl.load(at + row)).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(logits, at, log_sum, grad, of_label, V, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + columns
    x = tl.load(place, mask=columns < V, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(log_sum + row)) * tl.load(grad + row)
    p = tl.where(columns == tl.load(at + row), p + tl.load(of_label + row), p)
    tl.store(place, p.to(logits.dtype.element_ty), mask=columns < V)


def statistics(
    logits_TV: torch.Tensor, at_T: torch.Tensor, most_T: torch.Tensor, total_T: torch.Tensor, label_T: torch.Tensor
) -> None:
    """Into the last three, in fp32: a row's maximum, the sum of exp(logit - maximum), the logit at `at_T`."""
    T, V = logits_TV.shape
    statistics_kernel[(T,)](
        logits_TV, at_T, most_T, total_T, label_T, V, logits_TV.stride(0), BLOCK=BLOCK, num_warps=WARPS
    )


def gradient_(
    logits_TV: torch.Tensor, at_T: torch.Tensor, log_sum_T: torch.Tensor, grad_T: torch.Tensor, of_label_T: torch.Tensor
) -> torch.Tensor:
    """exp(logit - log_sum) * grad, and `of_label_T` more at `at_T`, in the place of the logits, which it returns."""
    T, V = logits_TV.shape
    gradient_kernel[(T, triton.cdiv(V, BLOCK))](
        logits_TV, at_T, log_sum_T, grad_T, of_label_T, V, logits_TV.stride(0), BLOCK=BLOCK, num_warps=WARPS
    )
    return logits_TV
