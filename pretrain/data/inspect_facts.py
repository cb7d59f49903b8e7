"""What a packed dataset holds, in plain JSON and as tables: from its manifest, from a pass over it, and of one row."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perilune.pretrain.data.inspect_verify import Verified, check_docs
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.report.describe import Bar, Fact, Table, count, gib, si

MAX_SOURCES = 32  # rows of the mixture; the rest are one row
KEPT = "\n\t"  # control characters that do no harm on a terminal


def facts(path: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The dataset by its manifest. Raises InputError where what it says of packing is not of the format."""
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    known = {
        "path": path,
        "format_version": manifest["format_version"],
        "fingerprint": manifest["fingerprint"],
        "tokenizer": manifest["tokenizer"],
        "seq_len": manifest["seq_len"],
        "rows": manifest["rows"],
        "tokens": manifest["tokens"],
        "shards": len(sizes),
        "bytes": sum(sizes),
    }
    try:
        return known | _packing(manifest.get("packing", {}), manifest.get("recipe", {}))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: what its manifest says of packing breaks the format: {error!r}") from error


def _packing(packing: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "packing": {name: value for name, value in packing.items() if isinstance(value, int)},
        "document_lengths": {span: int(n) for span, n in packing.get("document_lengths", {}).items()},
        "pieces_per_row": {max(1, int(n)): int(rows) for n, rows in packing.get("pieces_per_row", {}).items()},
        "recipe": {name: value for name, value in recipe.items() if name != "files"},
        "mixture": {
            spec: {
                "documents": int(of["documents"]),
                "tokens": int(of["document_tokens"]),
                "bytes": int(of["raw_bytes"]),
            }
            for spec, of in packing.get("sources", {}).items()
        },
        "mixture_of": "By SRC of the command, as packing counted.",
    }


def verified_facts(found: Verified) -> dict[str, Any]:
    """A pass over the dataset."""
    return {
        "bytes": found.bytes,
        "rows": found.rows,
        "lost_rows": found.lost_rows,
        "damage": [
            {"shard": damage.shard, "sample": damage.sample, "offset": damage.offset, "what": damage.what}
            for damage in found.damage
        ],
        "sources": {name: dict(counts) for name, counts in found.sources.items()},
    }


# ---------------------------------------------------------------- one row


def find_tokenizer(manifest: dict[str, Any], folder: Path | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the rows were packed with, from `folder` or from where the manifest says; else why not.

    Raises InputError where `folder` holds another one, whose text would be wrong.
    """
    named = folder if folder is not None else Path(str(manifest["tokenizer"].get("path", "")))
    try:
        coder = load_tokenizer(named)
    except InputError as error:
        if folder is not None:
            raise
        return None, f"ids only: {error}; or name its folder by --tokenizer"
    if coder.fingerprint != manifest["tokenizer"]["fingerprint"]:
        what = (
            f"{named}: this tokenizer's fingerprint is {coder.fingerprint}, the dataset's is "
            f"{manifest['tokenizer']['fingerprint']}; name the folder of the one it was packed with by --tokenizer"
        )
        if folder is not None:
            raise InputError(what)
        return None, f"ids only: {what}"
    return coder, ""


def row_facts(row: Row, index: int, name: str, coder: Tokenizer | None) -> dict[str, Any]:
    """One row, piece by piece, with its text where there is a tokenizer, else with its ids."""
    pieces = []
    for piece, begin, end in zip(
        check_docs(row), row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True
    ):
        shown = {"ids": row.tokens[begin:end].tolist()} if coder is None else {"text": _text(row, begin, end, coder)}
        pieces.append({**piece, "begin": begin, "end": end, "counted": int(row.loss_mask[begin:end].sum()), **shown})
    images = [
        {"start": image.start, "tokens": image.tokens, "patches": list(image.grid), "kind": image.ending,
         "bytes": len(image.data)}
        for image in row.images
    ]  # fmt: skip
    return {"index": index, "name": name, "counted": int(row.loss_mask.sum()), "pieces": pieces, "images": images}


def _text(row: Row, begin: int, end: int, coder: Tokenizer) -> str:
    """The text of tokens [begin, end), each image's placeholders as one word."""
    text, at = "", begin
    for number, image in enumerate(row.images):
        if begin <= image.start < end:
            word = f"⟨image {number}: {image.grid[0]} x {image.grid[1]} patches, {image.tokens} tokens⟩"
            text += coder.decode(row.tokens[at : image.start]) + word
            at = image.start + image.tokens
    return text + coder.decode(row.tokens[at:end])


def piece_title(piece: dict[str, Any]) -> str:
    """Where a piece lies, of which document, and whether it is all of it."""
    whole = piece["tokens"] == piece["of"]
    end = piece["start"] + piece["tokens"]
    part = "whole" if whole else f"tokens {piece['start']:,} to {end:,} of {piece['of']:,}"
    marks = [
        "continues from another row" if piece["continues"] else "",
        "goes on in another row" if piece["continued"] else "",
        "repeated to fill the row, masked" if piece["repeat"] else "",
    ]
    title = f"[{piece['begin']:,}, {piece['end']:,}) document {piece['doc']:,}, {piece['source']}: {part}"
    return printable(", ".join([title, *filter(None, marks)])).replace("\n", "␊")


def printable(text: str) -> str:
    """`text` that can be looked at: control characters become pictures, what turns or hides text its code."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in KEPT else _picture(character) for character in text)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # Cc: C1 controls; Cf: bidirectional and zero-width marks; Cs, Co, Cn: what no font shows.
    return f"\\u{{{code:x}}}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character


# ---------------------------------------------------------------- tables


def packing_table(known: dict[str, Any]) -> Table:
    """How documents became rows: what was counted, and by which options."""
    always = ("splits", "forced_splits", "repeat_tokens")
    numbers = {name: value for name, value in known["packing"].items() if value or name in always}
    numbers |= {name: value for name, value in known["recipe"].items() if isinstance(value, int | float) and value}
    rows: list[list[str | Bar]] = [[printable(name.replace("_", " ")), f"{n:,}"] for name, n in numbers.items()]
    return Table(["", ""], rows, title="Packing", numbers=1)


def lengths_table(known: dict[str, Any]) -> Table:
    """Documents by length in tokens."""
    return _histogram(known["document_lengths"], "tokens", "documents", "Documents by length")


def pieces_table(known: dict[str, Any]) -> Table:
    """Rows by how many pieces of documents they hold, in powers of two."""
    spans: Counter[int] = Counter()
    for pieces, rows in known["pieces_per_row"].items():
        spans[pieces.bit_length() - 1] += rows
    named = {f"{1 << p}-{(2 << p) - 1}" if p else "1": spans[p] for p in sorted(spans)}
    return _histogram(named, "pieces", "rows", "Rows by pieces of documents")


def _histogram(counts: dict[str, int], of: str, what: str, title: str) -> Table:
    largest = max(counts.values(), default=1) or 1
    rows: list[list[str | Bar]] = [[printable(span), Bar(f"{n:,}", n / largest)] for span, n in counts.items()]
    return Table([of, what], rows, title=title, numbers=1)


def mixture_table(sources: dict[str, dict[str, int]], note: str) -> Table:
    """Sources by tokens, the largest first."""
    ranked = sorted(sources.items(), key=lambda item: (-item[1]["tokens"], item[0]))
    total = sum(counts["tokens"] for counts in sources.values()) or 1
    if len(ranked) > MAX_SOURCES:
        rest = [counts for _, counts in ranked[MAX_SOURCES - 1 :]]
        summed = {name: sum(counts.get(name, 0) for counts in rest) for name in ("documents", "tokens", "bytes")}
        ranked = [*ranked[: MAX_SOURCES - 1], (f"{len(rest)} others", summed)]
    largest = max((counts["tokens"] for _, counts in ranked), default=1) or 1
    rows: list[list[str | Bar]] = [
        [
            printable(name),
            f"{counts.get('documents', 0):,}",
            f"{counts.get('bytes', 0):,}",
            f"{counts['tokens']:,}",
            Bar(f"{counts['tokens'] / total:.1%}", counts["tokens"] / largest),
        ]
        for name, counts in ranked
    ]
    return Table(["source", "documents", "bytes", "tokens", "share"], rows, title="Mixture", note=note, numbers=1)


def damage_table(damage: Sequence[dict[str, Any]]) -> Table:
    """Findings of a pass, in the order of the shards."""
    rows: list[list[str | Bar]] = [
        [one["shard"], one["sample"] or "", f"{one['offset']:,}", printable(one["what"])] for one in damage
    ]
    return Table(["shard", "sample", "byte", "what"], rows, title="Damage")


# ---------------------------------------------------------------- in words


def tiles(known: dict[str, Any]) -> list[Fact]:
    """The figures that come first."""
    packing, passed = known["packing"], known.get("verified")
    documents, tokens = packing.get("documents", 0), packing.get("document_tokens", 0)
    first = [
        Fact("Rows", f"{known['rows']:,}", remark=f"of {known['seq_len']:,} tokens"),
        Fact("Tokens", si(known["tokens"]), remark=f"{known['tokens']:,}"),
        Fact("Documents", si(documents), remark=f"mean {tokens / max(1, documents):,.0f} tokens"),
        Fact(
            "Text",
            gib(packing.get("raw_bytes", 0)),
            remark=f"{packing.get('raw_bytes', 0) / max(1, tokens):.2f} bytes a token",
        ),
        Fact("Shards", f"{known['shards']:,}", remark=gib(known["bytes"])),
        Fact(
            "Tokenizer",
            printable(known["tokenizer"]["fingerprint"][:12]),
            remark=f"{known['tokenizer']['vocab_size']:,} tokens",
        ),
    ]
    return (
        [*first, Fact("Verified", "damaged" if passed["damage"] else "whole", remark=gib(passed["bytes"]))]
        if passed
        else first
    )


def verdict(passed: dict[str, Any]) -> str:
    """A pass in one sentence."""
    if not passed["damage"]:
        return f"whole: {passed['bytes']:,} bytes hashed, {passed['rows']:,} rows decoded and checked"
    return (
        f"damaged: {count(len(passed['damage']), 'finding')}; {passed['lost_rows']:,} of "
        f"{passed['lost_rows'] + passed['rows']:,} rows cannot be read. Copy the named shards again from where they "
        "came, or pack the dataset again"
    )


def finding(one: dict[str, Any]) -> str:
    """A finding on one line: shard, sample, byte, what."""
    sample = "" if one["sample"] is None else f"/{one['sample']}"
    return printable(f"{one['shard']}{sample} at byte {one['offset']}: {one['what']}")


def row_note(row: dict[str, Any]) -> str:
    """A row in one sentence."""
    size = row["pieces"][-1]["end"]
    note = f"{count(len(row['pieces']), 'piece')}; {row['counted']:,} of {size:,} tokens count in the loss"
    images = f"; {count(len(row['images']), 'image')}" if row["images"] else ""
    return f"{note}{images}" + (f"; {row['why_no_text']}" if row["why_no_text"] else "")


def piece_text(piece: dict[str, Any]) -> str:
    """What a piece holds, safe to look at."""
    return printable(piece["text"]) if "text" in piece else " ".join(map(str, piece["ids"]))
