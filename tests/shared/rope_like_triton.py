"""What Megatron-core's Triton kernels of MLA's RoPE compute, in PyTorch; test_rope_triton.py holds it beside them.

T tokens of a rank, N heads, P and E the sizes that are not turned, R the one that is. `bounds` are of the whole packs.
"""

from __future__ import annotations

import torch

calls: list[int] = []  # tokens of each


def queries(
    q_TNX: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    P: int,
    R: int,
    bounds: torch.Tensor,
    rank: int,
    size: int,
) -> torch.Tensor:
    own, turned = q_TNX.split([P, R], dim=-1)
    calls.append(len(q_TNX))
    return torch.cat((own, _turned(turned, cos, sin, bounds, rank, size)), dim=-1)


def keys_and_values(
    kv_TNX: torch.Tensor, key_T1R: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, R: int, P: int, E: int,
    bounds: torch.Tensor, rank: int, size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    own, value = kv_TNX.split([P, E], dim=-1)
    turned = _turned(key_T1R, cos, sin, bounds, rank, size)
    return torch.cat((own, turned.expand(-1, kv_TNX.shape[1], -1)), dim=-1), value


def _turned(
    x_TNR: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: torch.Tensor, rank: int, size: int
) -> torch.Tensor:
    """Neighbours turned, first members before second ones; a document's angles are the table's first ones."""
    places = []
    for length in (bounds // size).diff().tolist():
        at, half = torch.arange(length), length // 2
        late = at - half + (2 * size - rank - 1) * length // 2
        places.append(at if size == 1 else torch.where(at < half, at + rank * length // 2, late))
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape[-1] == x_TNR.shape[-1]
    where = torch.cat(places).to(cos.device)
    cos, sin = (x.flatten(0, -2)[where, None].chunk(2, dim=-1) for x in (cos, sin))
    first, second = x_TNR[..., 0::2].float(), x_TNR[..., 1::2].float()
    halves = first * cos[0] - second * sin[0], second * cos[1] + first * sin[1]
    return torch.cat(halves, dim=-1).to(x_TNR.dtype)
