"""Context parallelism for packed rows: each rank holds a part of every row, and sees the keys of all of them.

A row (not a document) is cut into 2 x cp equal chunks, of which rank r holds chunks r and 2 cp - 1 - r: the zig-zag of
Llama 3 (arXiv 2407.21783, section 3.3.2), which gives each rank early and late tokens, so equal work. Keys and values
are gathered over the ranks before attention, and their gradients summed back. No document is padded, wherever its
boundaries fall: a rank's queries are split into the pieces that its chunks and the documents have in common.

T tokens of the micro-batch, Q = T / cp of them on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist

from perilune.kernels.attention import Pieces


@dataclass(frozen=True)
class Cut:
    """What one rank of a context-parallel group holds of a micro-batch."""

    index_Q: torch.Tensor  # places in the pack of this rank's tokens
    order_T: torch.Tensor  # gathered[order_T] puts what was gathered rank by rank into the pack's order
    pieces: Pieces

    def to(self, device: torch.device | str) -> Cut:
        """The same cut with its indices on `device`."""
        return Cut(self.index_Q.to(device), self.order_T.to(device), self.pieces)


def cut(rows: int, seq_len: int, cu_seqlens: torch.Tensor, rank: int, size: int) -> Cut:
    """The part of rank `rank` of `size` in a pack of `rows` rows with document boundaries `cu_seqlens` (on the CPU).

    Raises ValueError where a row does not divide into 2 x `size` equal chunks.
    """
    index_Q = _places(rows, seq_len, rank, size)
    return Cut(index_Q, _order(rows, seq_len, size), _pieces(index_Q, seq_len // (2 * size), cu_seqlens.tolist()))


@lru_cache(maxsize=16)
def _order(rows: int, seq_len: int, size: int) -> torch.Tensor:
    """[T] where in what is gathered rank by rank each token of the pack stands."""
    return torch.cat([_places(rows, seq_len, rank, size) for rank in range(size)]).argsort()


@lru_cache(maxsize=64)
def _places(rows: int, seq_len: int, rank: int, size: int) -> torch.Tensor:
    """[Q] places in the pack of `rank`'s tokens: of each row its early chunk, then its late one."""
    chunk, left = divmod(seq_len, 2 * size)
    if left:
        raise ValueError(f"a row of {seq_len} tokens does not divide into 2 x {size} equal chunks")
    chunks = torch.arange(rows * seq_len).view(rows, 2 * size, chunk)
    return chunks[:, [rank, 2 * size - 1 - rank]].flatten()


def _pieces(index_Q: torch.Tensor, chunk: int, bounds: list[int]) -> Pieces:
    """Every part of a chunk that lies in one document, with the keys from the document's start to the part's end."""
    queries, keys = [], []
    for at, start in enumerate(index_Q[::chunk].tolist()):  # chunks follow one another in `index_Q`
        for first, last in pairwise(bounds):
            begin, end = max(first, start), min(last, start + chunk)
            if begin < end:
                queries.append((at * chunk + begin - start, at * chunk + end - start))
                keys.append((first, end))
    return Pieces(tuple(queries), tuple(keys))


def gather(x_Q: torch.Tensor, order_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[Q, ...] of this rank into [T, ...] of the whole pack; the gradient is summed over the ranks."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x_Q, group=group).index_select(0, order_T)
