"""What `perilune pack` prints of a dataset: one line of totals, then how it was cut and how long documents are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BAR = 40  # characters of the longest bar


def lines(name: str, part: dict[str, Any]) -> Iterator[str]:
    """The lines for one of the datasets in `pack`'s result."""
    how = "already there" if part["already_there"] else f"{part['seconds']:.1f} s"
    yield (
        f"{name}: {part['rows']:,} rows, {part['tokens']:,} tokens, {part['documents']:,} documents, "
        f"{part['raw_bytes']:,} bytes ({how}): {part['path']}"
    )
    if "splits" not in part:
        return
    repeated = part["repeat_tokens"] / part["tokens"]
    yield (
        f"  {part['splits']:,} splits, {part['forced_splits']:,} of them of what is longer than a row; "
        f"{part['repeat_tokens']:,} tokens repeated and masked ({repeated:.3%}); no padding"
    )
    if part["images"]:
        yield f"  {part['images']:,} images: {part['image_tokens']:,} tokens, {part['patches']:,} patches"
    if part["fim_documents"]:
        yield f"  {part['fim_documents']:,} documents rearranged for filling in the middle"
    if len(part["sources"]) > 1:
        for source, counts in part["sources"].items():
            yield f"  {source}: {counts['documents']:,} documents, {counts['document_tokens']:,} tokens"
    yield "  tokens a document:"
    most = max(part["document_lengths"].values())
    width = max(map(len, part["document_lengths"]))
    for span, count in part["document_lengths"].items():
        yield f"  {span:>{width}} {'#' * max(1, round(BAR * count / most))} {count:,}"
