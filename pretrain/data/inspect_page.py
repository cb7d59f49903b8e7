"""`perilune inspect --html`: what a packed dataset holds as one HTML file: no script, nothing from a network.

Text reaches the page through Jinja2's escaping after control characters have become pictures; the Content-Security-
Policy forbids every request and every script.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from perilune.pretrain import doctor
from perilune.pretrain.data import inspect_facts
from perilune.pretrain.data.inspect_pictures import pictures
from perilune.pretrain.data.manifest import image_rule
from perilune.pretrain.data.shard import Row
from perilune.pretrain.errors import InputError
from perilune.pretrain.report import describe, page

MAX_SHARDS = 1000  # rows of the table
MAX_PIECE = 1 << 16  # characters shown of one piece
HERE = Path(__file__).parent


def write_page(out: Path, known: dict[str, Any], manifest: dict[str, Any], row: Row | None) -> Path:
    """Write the page on `known` (of `inspect_facts`) to `out`, whole or not at all; InputError where it cannot be."""
    text = render(known, manifest, row)
    partial = out.with_name(f".{out.name}.partial.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {out}: {error.strerror}; name another file by --out") from error
    return out


def render(known: dict[str, Any], manifest: dict[str, Any], sample: Row | None) -> str:
    """The page as text; `sample` is the row whose images it shows."""
    templates = Environment(
        loader=FileSystemLoader([HERE, page.HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    passed, row = known.get("verified"), known.get("sample")
    tables = [
        inspect_facts.mixture_table(known["mixture"], known["mixture_of"]),
        inspect_facts.lengths_table(known),
        inspect_facts.pieces_table(known),
        inspect_facts.packing_table(known),
    ]
    return templates.get_template("inspect.html").render(
        title=inspect_facts.printable(known["path"]),
        note=f"format {known['format_version']} · fingerprint {known['fingerprint']}",
        tiles=inspect_facts.tiles(known),
        warnings=[] if passed is None or not passed["damage"] else [inspect_facts.verdict(passed)],
        damage=inspect_facts.damage_table(passed["damage"]) if passed and passed["damage"] else None,
        tables=tables,
        row=None if row is None else _row(row),
        pictures=pictures(sample, image_rule(manifest)),
        shards=_shards(manifest["shards"], passed),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=doctor.installed("perilune") or "",
        style=Markup((page.HERE / "page.css").read_text(encoding="utf-8")),
        is_bar=lambda cell: isinstance(cell, describe.Bar),
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    pieces = [
        {"tokens": piece["tokens"], "title": inspect_facts.piece_title(piece), "shown": _shown(piece)}
        for piece in row["pieces"]
    ]
    return {"index": row["index"], "name": row["name"], "note": inspect_facts.row_note(row), "pieces": pieces}


def _shown(piece: dict[str, Any]) -> str:
    text = inspect_facts.piece_text(piece)
    return text if len(text) <= MAX_PIECE else f"{text[:MAX_PIECE]}\n… {len(text) - MAX_PIECE:,} characters more"


def _shards(shards: list[dict[str, Any]], passed: dict[str, Any] | None) -> describe.Table:
    hurt = {one["shard"] for one in passed["damage"]} if passed is not None else set()
    rows: list[list[str | describe.Bar]] = [
        [shard["name"], shard["sha256"], f"{shard['bytes']:,}", f"{len(shard['samples']):,}"]
        for shard in shards[:MAX_SHARDS]
    ]
    note = f"{len(shards) - MAX_SHARDS:,} more are not listed" if len(shards) > MAX_SHARDS else ""
    marked = [number for number, shard in enumerate(shards[:MAX_SHARDS]) if shard["name"] in hurt]
    return describe.Table(["shard", "SHA-256", "bytes", "samples"], rows, note=note, numbers=2, marked=marked)
