"""`perilune sweep`, `fit` and `predict`: words in, `pretrain/scaling/` does it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from perilune.pretrain.data_cli import FILE_THERE, FOLDER


class _Positive(click.FloatRange):
    """Above 0 and finite: a comparison lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


POSITIVE = _Positive(min=0, min_open=True)


@click.command(short_help="Many small runs at chosen budgets of compute: the trials that laws are fitted to.")
@click.argument("file", metavar="LADDER.yaml", type=FILE_THERE)
@click.argument("options", metavar="[-- LAUNCH_OPTION...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--out", type=FOLDER, required=True, metavar="DIR", help="One that holds this sweep already is continued."
)
@click.option(
    "--on",
    type=click.Choice(["local", "slurm", "ray"]),
    default="local",
    show_default=True,
    help="Which `perilune launch` starts a trial; its options follow --.",
)
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Trials side by side; on this machine they share its cores or GPUs.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Starts of a trial after a failure, each from its newest checkpoint.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what a sweep before has given up.")
@click.option(
    "--rate", type=POSITIVE, metavar="FLOP/S", help="How fast one trial trains, for times.  [default: as those done]"
)
@click.option("--dry-run", is_flag=True, help="Print every trial with its cost; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.pass_context
def sweep(ctx: click.Context, **options: Any) -> None:
    """Train models of several sizes at each of several budgets of compute C, with learning rates and batch sizes around
    a law, and write what `perilune fit DIR` reads.

    A size is M, the training FLOPs a token besides embedding and head; it is trained on D = C / M tokens. A trial is an
    ordinary run, DIR/runs/TRIAL, begun by `perilune launch`. A sweep that was stopped or killed goes on by the same
    command: trials that have ended are not run again, those half done go on from their checkpoints, and jobs that a
    cluster still runs are waited for. One that fails for good is told at the end, and is exit code 1.

    \b
    A ladder; docs/scaling.md says all keys:
      preset: demo
      set: {data.path: packed/train, parallel.ep: 1, train.micro_batch_size: 1}
      budgets: [1.6e+11, 3.8e+11, 9.0e+11]     # C, FLOPs
      sizes: {count: 5, within: 2}             # from half to twice the best that law.size says of each budget
      law: {size: {k: 95.7, exponent: 0.3686}, lr: {k: 0.16, exponent: -0.125}}
      lr: [0.25, 0.5, 1, 2, 4]                 # times the law's, at the middle size of each budget

    \b
    Examples:
      perilune sweep ladder.yaml --out sweeps/a --dry-run
      perilune sweep ladder.yaml --out sweeps/a --at-once 2
      perilune sweep ladder.yaml --out sweeps/a --on slurm --at-once 20 -- --gpus-per-node 8 --time 04:00:00
      perilune sweep ladder.yaml --out sweeps/a --on ray --at-once 8 -- --address http://head:8265 --gpus-per-node 1
    """
    from perilune.pretrain.scaling.sweep_command import sweep_command

    ctx.exit(sweep_command(**options))


@click.command(short_help="Scaling laws of trials: best size, tokens and learning rate for any compute.")
@click.argument("paths", metavar="CSV_OR_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="A folder for fit.json, pictures and fit.html.")
@click.option("--mixed", is_flag=True, help="Put together what says it has other tokenizers or other data.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws behind the intervals.")
@click.option("--json", "as_json", is_flag=True, help="Print fit.json instead of a table.")
@click.pass_context
def fit(ctx: click.Context, **options: Any) -> None:
    """Fit scaling laws to training runs: IsoFLOP minima and their power laws, L(N, D) = E + A/N^alpha + B/D^beta, the
    best learning rate and batch size over compute, and the loss over compute, E + k C^-e of four budgets or more, each
    constant with a 95% interval.

    A CSV file's first line names its columns: params (then C = 6 N D) or flops_per_token (C = M D), tokens, loss, and
    if it has them lr, batch_tokens, tokenizer, data. params are those that a token meets (of experts the chosen ones
    alone), without embedding and head. A folder is one with a trials.csv.

    \b
    Examples:
      perilune fit trials.csv --out fits/first
      perilune fit small.csv large.csv --out fits/both --json
    """
    from perilune.pretrain.scaling.fit_command import fit_command

    ctx.exit(fit_command(**options))


@click.command(short_help="Model, tokens, batch and learning rate for a budget, from a fit.")
@click.argument("fit_json", metavar="FIT.json", type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--compute", type=POSITIVE, metavar="C", help="Training FLOPs, C = M D as in the fit.")
@click.option(
    "--gpus", type=click.IntRange(min=1), metavar="N", help="With --gpu and --days, in place of --compute; processes."
)
@click.option("--gpu", metavar="NAME", help="As H100, H800, A100, B200.")
@click.option("--days", type=POSITIVE, metavar="D")
@click.option(
    "--mfu",
    type=_Positive(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    metavar="X",
    help="Part of the GPUs' peak that goes into M D: what vocabulary and MTP cost is not in it.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CONFIG.yaml",
    help="Write a configuration of that size for `train`; needs --preset.",
)
@click.option("--preset", metavar="NAME", help="What --out is made from, its layers and width scaled.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def predict(ctx: click.Context, **options: Any) -> None:
    """Say what FIT.json, of `perilune fit`, holds best for C FLOPs: the model's size, tokens, tokens a batch, learning
    rate and loss, each with its 95% interval, and a warning where C lies beyond the trials.

    --out writes a configuration: --preset with its layers and width scaled to that size, and any KEY=VALUE. A size in
    params is of parameters that a token meets, without embedding and head.

    \b
    Examples:
      perilune predict fits/first/fit.json --compute 1e21
      perilune predict fits/first/fit.json --gpus 64 --gpu H100 --days 10 --mfu 0.45
      perilune predict fits/first/fit.json --compute 1e14 --preset demo --out next.yaml data.path=packed/train
    """
    from perilune.pretrain.scaling.predict_command import predict_command

    ctx.exit(predict_command(**options))
