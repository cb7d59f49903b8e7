"""`perilune inspect`: a packed dataset in words, as JSON or as a page; with --verify, all of its bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from perilune.pretrain.data import inspect_facts as describe
from perilune.pretrain.data import storage
from perilune.pretrain.data.inspect_verify import verify
from perilune.pretrain.data.manifest import read_manifest, read_token_bytes
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.storage import Remote, Store, is_url, open_store
from perilune.pretrain.errors import InputError
from perilune.pretrain.report.describe import Bar
from perilune.pretrain.report.describe import Table as Facts

HEAD, TAIL = 240, 80  # characters shown of a piece's beginning and end on a terminal
MAX_DAMAGE = 50  # findings told on a terminal; --json and --html tell all
BAR = 16  # characters of a full bar


def inspect_command(
    path: str,
    *,
    check: bool = False,
    sample: int | None = None,
    tokenizer: Path | None = None,
    html: bool = False,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Tell what the packed dataset at `path` holds; 0, or 1 where `check` finds it damaged.

    Raises InputError where it is no dataset, there is no row `sample`, or the page cannot be written.
    """
    manifest = read_manifest(open_store(path, Remote(retry_s=storage.FIRST_RETRY_S)))  # a mistyped host is told soon
    store = open_store(path)
    known = describe.facts(path, manifest)
    if check:
        read_token_bytes(store, manifest)
        known["verified"] = _verify(store, manifest, quiet=as_json)
        if known["verified"]["sources"]:
            known |= {
                "mixture": known["verified"]["sources"],
                "mixture_of": "By file or folder, as the rows hold them.",
            }
    row = None
    if sample is not None:
        known["sample"], row = _sample(path, manifest, sample, tokenizer)
    if as_json:
        print(json.dumps(known))
    else:
        _print(known)
    if html:
        from perilune.pretrain.data.inspect_page import write_page

        page = write_page(out or _beside(path), known, manifest, row)
        click.echo(f"page: {page}", err=as_json)
    return 1 if check and known["verified"]["damage"] else 0


def _beside(path: str) -> Path:
    """Where the page goes by default: into the dataset's folder; a remote prefix's into the working folder."""
    return Path("inspect.html") if is_url(path) else Path(path) / "inspect.html"


def _verify(store: Store, manifest: dict[str, Any], quiet: bool) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task("verifying", total=sum(shard["bytes"] for shard in manifest["shards"]))
        found = verify(manifest, store, lambda size: bar.advance(task, size))
    return describe.verified_facts(found)


def _sample(path: str, manifest: dict[str, Any], index: int, tokenizer: Path | None) -> tuple[dict[str, Any], Row]:
    if not 0 <= index < manifest["rows"]:
        raise InputError(f"--sample {index}: {path} holds rows 0 to {manifest['rows'] - 1}")
    coder, why = describe.find_tokenizer(manifest, tokenizer)
    dataset = PackedDataset(path, whole=False)
    try:
        row, name = dataset[index], dataset.sample_id(index)
    finally:
        dataset.close()
    return {**describe.row_facts(row, index, name, coder), "why_no_text": why}, row


# ---------------------------------------------------------------- on a terminal


def _print(known: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(Text(describe.printable(known["path"]), style="bold"))
    for fact in describe.tiles(known):
        console.print(Text(f"  {fact.name:<10} {fact.value}  ({fact.remark})"))
    console.print(Text(f"  {'content':<10} {known['fingerprint']}"))
    tables = [describe.packing_table(known), describe.lengths_table(known)]
    for table in [*tables, describe.mixture_table(known["mixture"], known["mixture_of"])]:
        _print_table(console, table)
    if row := known.get("sample"):
        console.print(Text(f"\nRow {row['index']:,}: {row['name']}: {describe.row_note(row)}"), soft_wrap=True)
        for piece in row["pieces"]:
            console.print(Text(describe.piece_title(piece), style="bold"), soft_wrap=True)
            console.print(Text(_short(describe.piece_text(piece))))
    if passed := known.get("verified"):
        for one in passed["damage"][:MAX_DAMAGE]:
            console.print(Text(describe.finding(one), style="red"), soft_wrap=True)
        if (more := len(passed["damage"]) - MAX_DAMAGE) > 0:
            console.print(Text(f"{more:,} findings more: --json or --html tells all", style="red"))
        colour = "bold red" if passed["damage"] else "bold green"
        console.print(Text(describe.verdict(passed), style=colour), soft_wrap=True)


def _print_table(console: Console, facts: Facts) -> None:
    if not facts.rows:
        return
    table = Table(title=Text(facts.title), title_justify="left", show_header=any(facts.head))
    for number, head in enumerate(facts.head):
        flush = facts.numbers is not None and number >= facts.numbers
        table.add_column(Text(head), justify="right" if flush else "left", overflow="fold")
    bars = any(isinstance(cell, Bar) for row in facts.rows for cell in row)
    if bars:
        table.add_column("", no_wrap=True)
    for row in facts.rows:
        cells = [Text(cell.text if isinstance(cell, Bar) else cell) for cell in row]
        part = next((cell.part for cell in row if isinstance(cell, Bar)), 0.0)
        table.add_row(*cells, *([Text("█" * max(1, round(BAR * part)), style="blue")] if bars else []))
    console.print(table)


def _short(text: str) -> str:
    if len(text) <= HEAD + TAIL:
        return text
    return f"{text[:HEAD]}\n… {len(text) - HEAD - TAIL:,} characters …\n{text[-TAIL:]}"
