"""Which weights Muon updates, and which matrices it takes each of them for (arXiv 2502.16982, section 2.2).

A matrix is one projection as the published models have it. So gate and up, which a checkpoint keeps in one tensor, are
two matrices, each expert has its own three, and the tower's queries, keys and values are three. A projection is never
cut by heads (the paper: its updates become too large), and MLA's are those of Moonlight's own code: `q_b_proj`,
`kv_a_proj_with_mqa` (with the key's part that is turned) and `kv_b_proj` (keys and values of all heads) are one each.

AdamW keeps what the paper leaves it, embeddings, head and all vectors; and here also what reads images first, the
embedding of patches and their positions, which are to a tower what word embeddings are to a decoder, and the learned
queries of the contrastive pools, which are a few vectors and no map. Routers and experts are Muon's (figures 9 and 10).

A rows and B columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from perilune.pretrain.rules import PARTS, part_of

_ADAMW = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "text_encoder.embedding.weight",
    "patch_embed.proj.weight",
    "patch_embed.pos_emb.weight",
    "pool.query",
)


def is_muons(key: str, dims: int) -> bool:
    """Whether Muon updates the tensor that checkpoints name `key`, which has so many dims there."""
    return dims >= 2 and not key.endswith(_ADAMW)


class Name(NamedTuple):
    """A matrix of the model: the tensor that holds it, the expert (0 if there is none), and which part of its rows."""

    key: str
    expert: int
    part: int


class Box(NamedTuple):
    """A rectangle of a matrix."""

    name: Name
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Cut:
    """How a stored matrix's rows fall into matrices: row (outer * parts + part) * inner + i is row outer * inner + i of
    matrix `part`."""

    parts: int
    inner: int

    def segments(self, start: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
        """(part, its row, first stored row, how many) of stored rows `start` to `start + rows`."""
        at, end = start, start + rows
        while at < end:
            block, within = divmod(at, self.inner)
            size = min(end - at, self.inner - within)
            yield block % self.parts, block // self.parts * self.inner + within, at, size
            at += size


def cut_of(key: str, rows: int, head_dim: int) -> Cut:
    """How the stored matrix `key` of so many rows is cut; `head_dim` is that of fused queries, keys and values."""
    if key.endswith("linear_qkv.weight"):  # head by head: its queries, its keys, its values
        return Cut(3, head_dim)
    if key.endswith("linear_fc1.weight") and part_of(key) == PARTS[-1]:  # the decoder's are gated: gate, then up
        return Cut(2, rows // 2)
    return Cut(1, rows)
