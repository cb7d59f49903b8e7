"""Initial weights as a function of (seed, parameter name, global index): every layout starts from the same model.

A weight's rows are drawn in blocks, each from a generator seeded by a hash of (seed, name, block); a rank draws the
blocks that it holds a part of, and cuts. The draw is on the CPU whatever the device, so that it is the same there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

# Values a block; what is drawn depends on it, so it is fixed for ever.
_BLOCK = 1 << 20


def normal_slice(
    seed: int, name: str, shape: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...], std: float
) -> torch.Tensor:
    """The block `[starts, starts + sizes)` of a global fp32 tensor of `shape` drawn from N(0, std^2)."""
    if len(shape) > 2:  # experts: one matrix after another, each under its own name
        first = range(starts[0], starts[0] + sizes[0])
        return torch.stack([normal_slice(seed, f"{name}[{i}]", shape[1:], starts[1:], sizes[1:], std) for i in first])
    columns = shape[1] if len(shape) == 2 else 1
    rows_a_block = max(1, _BLOCK // columns)
    begin, end = starts[0], starts[0] + sizes[0]
    parts = []
    for block in range(begin // rows_a_block, -(-end // rows_a_block)):
        low, high = block * rows_a_block, min((block + 1) * rows_a_block, shape[0])
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        drawn = torch.empty(high - low, columns).normal_(0.0, std, generator=generator)
        parts.append(drawn[max(begin, low) - low : min(end, high) - low])
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if len(shape) == 1:
        return whole[:, 0].clone()
    return whole[:, starts[1] : starts[1] + sizes[1]].clone()


def draw_weights(model: torch.nn.Module, seed: int, std: float | Callable[[str], float]) -> None:
    """Fill this rank's weights: N(0, std^2) for matrices (V3 section 4.2), ones for norms, zeros for biases.

    `std` is a number, or gives one for each name. A parameter that has the attribute `starts_at` is filled with that.
    Names and places are those of the checkpoint (`sharded_state_dict`), which do not depend on the layout.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    std_of = std if callable(std) else lambda name: std

    def draw(part: ShardedTensor) -> torch.Tensor:
        if (number := getattr(part.data, "starts_at", None)) is not None:
            return torch.full(part.local_shape, number)
        if part.key.endswith("bias"):
            return torch.zeros(part.local_shape)
        if len(part.local_shape) == 1:
            return torch.ones(part.local_shape)
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        shape, starts = tuple(part.global_shape), tuple(part.global_offset)
        values = normal_slice(seed, part.key, shape, starts, sizes, std_of(part.key))
        return values.reshape(part.local_shape)

    with torch.no_grad():
        for entry in model.sharded_state_dict().values():  # type: ignore[operator]
            if isinstance(entry, ShardedTensorFactory):
                entry.data.copy_(torch.cat([draw(part) for part in entry.build()], dim=entry.data.ndim - 2))
            elif isinstance(entry, ShardedTensor):
                entry.data.copy_(draw(entry))
