"""Newton-Schulz iteration: a matrix made nearly orthogonal, the singular vectors as they are (arXiv 2502.16982, eq. 2).

The fast path takes many matrices of one shape at once, on the side that makes the smaller product. bf16 is the paper's
type. A CPU without bf16 instructions multiplies bf16 many times slower than fp32 (docs/optim.md), so on a CPU products
are computed in fp32 and rounded to bf16: the factors are bf16 numbers and sums are fp32, as in a GPU's tensor cores, so
that what differs is the order of summation.

n matrices, A rows, B columns.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7  # least norm that is divided by: a matrix of zeros stays


def orthogonalized(x_nAB: torch.Tensor, dtype: torch.dtype, steps: int = STEPS) -> torch.Tensor:
    """Each of `x_nAB` with singular values near 1, computed in `dtype` (fp32 or bf16); in that type, or fp32 on a CPU.

    The singular values come between 0.7 and 1.2 unless they were less than about a thousandth of the norm.
    """
    rounds = dtype is torch.bfloat16 and not x_nAB.is_cuda

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if rounds else x

    a, b, c = COEFFICIENTS
    tall = x_nAB.shape[-2] > x_nAB.shape[-1]
    x = rounded(x_nAB.to(torch.float32 if rounds else dtype))
    x = x.mT if tall else x
    norm_n11 = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = rounded((x / norm_n11.clamp(min=EPS)).to(x.dtype))
    for _ in range(steps):
        gram = rounded(x @ x.mT)
        polynomial = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.baddbmm(x, polynomial, x, beta=a))
    return x.mT if tall else x


def reference(x_AB: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """One matrix by the paper's formula, in the type that it has."""
    a, b, c = COEFFICIENTS
    x = x_AB / x_AB.norm().clamp(min=EPS)
    for _ in range(steps):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x
