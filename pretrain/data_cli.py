"""`perilune tokenizer`, `pack` and `inspect`: words in, `pretrain/data/` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

FILE_THERE = click.Path(dir_okay=False, exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
FOLDER_THERE = click.Path(file_okay=False, exists=True, path_type=Path)


@click.group()
def tokenizer() -> None:
    """Make a tokenizer."""


@tokenizer.command("train")
@click.option(
    "--out", type=FOLDER, required=True, help="Folder to write; transformers' PreTrainedTokenizerFast loads it."
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), metavar="N", required=True, help="Tokens, reserved ones included."
)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
def tokenizer_train(out: Path, vocab_size: int, sources: tuple[str, ...]) -> None:
    """Train a byte-level BPE tokenizer on SRC.

    SRC is a file, a folder, a glob (.txt .md .py, .jsonl[.gz|.zst], .parquet, .tar), or demo:stdlib, the source of the
    running Python's standard library, or demo:glyphs, drawn characters with their names. The same sources give the same
    tokenizer.

    \b
    Examples:
      perilune tokenizer train --out tok --vocab-size 4096 demo:stdlib
      perilune tokenizer train --out tok --vocab-size 65536 'corpus/**/*.jsonl.zst' notes/
    """
    from perilune.pretrain import secrets
    from perilune.pretrain.data.tokenizer import train_tokenizer

    secrets.refuse("SRC", sources)
    click.echo(f"tokenizer: {train_tokenizer(list(sources), out, vocab_size)}")


@click.command(short_help="Documents into packed shards.")
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option("--tokenizer", type=FOLDER_THERE, required=True, help="Folder of `perilune tokenizer train`.")
@click.option(
    "--seq-len", type=click.IntRange(min=2), metavar="N", required=True, help="Tokens a row; the run's data.seq_len."
)
@click.option(
    "--valid-fraction",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    metavar="PART",
    default=0.0,
    show_default=True,
    help="Part of the documents held out for validation; demo:stdlib and demo:glyphs hold out their own.",
)
@click.option(
    "--shuffle",
    "shuffle_seed",
    type=int,
    metavar="SEED",
    help="Shuffle rows within a buffer, by this seed; without it, in the sources' order.",
)
@click.option(
    "--buffer-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    default=1 << 25,
    show_default=True,
    help="Tokens arranged into rows at once; 0 for all of them, at 0.5 kB of memory a document.",
)
@click.option(
    "--fim-rate",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    metavar="PART",
    default=0.0,
    show_default=True,
    help="Part of the text documents rearranged as prefix, suffix, middle (DeepSeek-V3: 0.1); never held-out ones.",
)
@click.option(
    "--patch-limit",
    type=click.IntRange(min=4),
    metavar="N",
    default=4096,
    show_default=True,
    help="Patches of an image, above which it is scaled down.",
)
@click.option("--max-patches", type=click.IntRange(min=4), metavar="N", help="Image patches a row holds at most.")
@click.option(
    "--rows-per-shard",
    type=click.IntRange(min=1),
    metavar="N",
    default=4096,
    show_default=True,
    help="Rows a tar file.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Processes that encode and write; all cores if not said."
)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
def pack(out: Path, tokenizer: Path, seq_len: int, sources: tuple[str, ...], **options: Any) -> None:
    """Turn SRC into rows of exactly --seq-len tokens, in WebDataset tar shards.

    SRC is a file, a folder or a glob, here or behind fsspec (s3://, gs://, https://): text (.txt .md .py), a Megatron
    dataset (.idx beside .bin), or text and image-text documents as .jsonl[.gz|.zst], .parquet or WebDataset .tar;
    demo:stdlib; or demo:glyphs[:documents=N], pictures of characters and words with their names.

    Documents are cut to fill a row, never padded, and the rows remember where each one begins. Where a part is held out
    the folder holds `train` and `valid`, and a run that is given `train` finds `valid` beside it. The same command
    again continues a run that was cut short; what it writes does not depend on --workers.

    \b
    Examples:
      perilune pack --out packed --tokenizer tok --seq-len 512 demo:stdlib
      perilune pack --out packed --tokenizer tok --seq-len 4096 --valid-fraction 0.01 'corpus/*.parquet'
      perilune pack --out glyphs --tokenizer tok --seq-len 512 demo:glyphs:documents=5000
      perilune pack --out packed --tokenizer tok --seq-len 8192 --max-patches 16384 s3://bucket/pairs/
    """
    from perilune.pretrain import secrets
    from perilune.pretrain.data.pack import pack as run
    from perilune.pretrain.data.pack_report import lines

    secrets.refuse("SRC", sources)  # the rows remember where each document is from
    done = run(list(sources), out, tokenizer, seq_len, **options)
    for name, part in done.items():
        for line in lines(name, part):
            click.echo(line)


@click.command(short_help="What a packed dataset holds; --verify reads all of it.")
@click.argument("path", metavar="DIR")
@click.option("--verify", "check", is_flag=True, help="Hash and check every byte; exit code 1 on any damage.")
@click.option("--sample", type=click.IntRange(min=0), metavar="I", help="Show row I, decoded, document by document.")
@click.option("--tokenizer", type=FOLDER_THERE, help="Tokenizer's folder.  [default: the one that the dataset names]")
@click.option("--html", is_flag=True, help="Also write all of it as one page that needs no network.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="[default: DIR/inspect.html]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.pass_context
def inspect(
    ctx: click.Context,
    path: str,
    check: bool,
    sample: int | None,
    tokenizer: Path | None,
    html: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tell what the packed dataset in DIR holds: statistics, mixture, lengths of documents.

    --verify reads every shard: its SHA-256, the CRC-32 of every sample, and whether each row keeps the promises of the
    format. It names all damage by shard, sample and byte.

    \b
    Examples:
      perilune inspect packed/train
      perilune inspect packed/train --verify
      perilune inspect packed/train --sample 12 --html --out row.html
    """
    from perilune.pretrain.data.inspect_command import inspect_command

    ctx.exit(
        inspect_command(path, check=check, sample=sample, tokenizer=tokenizer, html=html, out=out, as_json=as_json)
    )
