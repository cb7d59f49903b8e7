"""The command `perilune`: words in, the function that does it, exit code out.

Only click is imported here at the top: `perilune --help` answers at once, and each command imports what it runs.
Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted with its checkpoint written (start the same command again).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from perilune.pretrain.data_cli import FILE_THERE, FOLDER, FOLDER_THERE, inspect, pack, tokenizer
from perilune.pretrain.errors import InputError, Preempted
from perilune.pretrain.launch_cli import jobs, launch
from perilune.pretrain.scaling_cli import fit, predict, sweep
from perilune.pretrain.weights_cli import eval_, export, generate, import_

FAILED, BAD_INPUT, PREEMPTED = 1, 2, 75  # 75: EX_TEMPFAIL of sysexits.h


class _Root(click.Group):
    """Turns the two ways a command ends early on purpose into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"perilune: error: {error}", err=True)
            ctx.exit(BAD_INPUT)
        except Preempted as stop:
            click.echo(f"perilune: preempted: {stop}", err=True)
            ctx.exit(PREEMPTED)


class _PresetCommand(click.Command):
    """A command that takes a preset and keys; its help ends with the presets there are, looked up only then."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "." in error.option_name:
                message = f"No such option {error.option_name!r}: keys take no dashes, as in train.steps=100"
                raise click.UsageError(message, ctx) from error
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from perilune.pretrain import presets

        formatter.write_paragraph()
        formatter.write_text(f"Presets: {', '.join(presets.names())}")
        for name in presets.names():
            if stages := presets.stages(name):
                formatter.write_text(f"Stages of {name}: {', '.join(stages)}")


class _CompareCommand(click.Command):
    """A command whose --compare takes as many folders as follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for word in args:
            if word.startswith("-"):
                taking = word == "--compare"
            elif taking and spread[-1] != "--compare":
                spread.append("--compare")
            spread.append(word)
        return super().parse_args(ctx, spread)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="perilune", message="%(prog)s %(version)s")
def main() -> None:
    """Pretrain mixture-of-experts language models, on a laptop's CPU or on a cluster, with the same code.

    \b
    From nothing to a trained model, one step at a time:
      perilune doctor                                                    can this machine do it?
      perilune tokenizer train --out tok --vocab-size 4096 demo:stdlib
      perilune pack --out packed --tokenizer tok --seq-len 512 demo:stdlib
      perilune train demo data.path=packed/train --run runs/first --nproc 2
    or all of it at once:
      perilune demo

    `perilune COMMAND --help` says more. Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted with a checkpoint
    written (start the same command again).
    """


@main.command(short_help="What this machine has, what is missing, what that costs.")
@click.option(
    "--cluster", is_flag=True, help="The nodes of an allocation, beside one another; run in all its processes."
)
@click.option(
    "--within",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="With --cluster: a process is waited for at the start.",
)
@click.option("--below", type=click.FloatRange(0, 1), default=0.7, show_default=True, metavar="PART",
              help="With --cluster: of the median, under which one is a straggler.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.pass_context
def doctor(ctx: click.Context, cluster: bool, within: float, below: float, as_json: bool) -> None:
    """Say what this machine has, what is missing, what that costs and what to install.

    Imports torch and Megatron-core for real, in a process of its own, and brings up a process group of one: some
    seconds. Exit code 1 if a model cannot be trained here.

    --cluster compares the nodes of an allocation: versions, clocks, the run directory's disk, matrix products,
    bandwidth within each node and of each pair of them. It names what differs, is slow or does not answer: exit code 1.

    \b
    Examples:
      perilune doctor
      perilune launch slurm --nodes 4 --gpus-per-node 8 -- doctor --cluster
      torchrun --nproc-per-node 4 --no-python -- perilune doctor --cluster --json
    """
    if cluster:
        from perilune.pretrain.doctor_cluster import main as run_cluster

        ctx.exit(run_cluster(as_json, within, below))
    from perilune.pretrain.doctor import main as run

    ctx.exit(run(as_json))


@main.command(cls=_PresetCommand, short_help="Train a preset, or go on with a run.")
@click.argument("preset")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--config", "config_file", type=FILE_THERE, help="YAML of keys, between the preset and KEY=VALUE.")
@click.option(
    "--run", "run_dir", type=FOLDER, help="Run directory; one that holds a run is resumed.  [default: runs/PRESET]"
)
@click.option(
    "--nproc", type=click.IntRange(min=1), metavar="N", help="Processes to start here; none under RANK and WORLD_SIZE."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration, the layout and counts; train nothing.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="With --dry-run: draw the schedules over the run's tokens.",
)
@click.option("--profile", is_flag=True, help="Write a trace that Perfetto opens.")
@click.option("--init-from", type=FOLDER_THERE, metavar="CHECKPOINT", help="Start from the weights of a checkpoint.")
@click.option(
    "--after",
    type=FOLDER,
    multiple=True,
    metavar="RUN_OR_CHECKPOINT",
    help="Go on from an earlier stage: weights, moments and data position of each part that fits; the last named wins.",
)
@click.pass_context
def train(
    ctx: click.Context,
    preset: str,
    overrides: tuple[str, ...],
    config_file: Path | None,
    run_dir: Path | None,
    nproc: int | None,
    dry_run: bool,
    plot: Path | None,
    profile: bool,
    init_from: Path | None,
    after: tuple[Path, ...],
) -> None:
    """Train PRESET, with any of its keys (docs/keys.md has all of them) changed by KEY=VALUE.

    The same command on the same --run directory goes on where it stopped, bitwise. Only the keys of length, layout and
    logging may differ then: train.steps, parallel.* and their like.

    A preset of several stages takes stage=NAME; each stage is a run of its own, --after those that it goes on from.

    \b
    Examples:
      perilune train tiny data.path=packed/train train.steps=20
      perilune train demo data.path=packed/train --run runs/first --nproc 2
      perilune train demo data.path=packed/train --run runs/first --nproc 2 train.steps=400
      perilune train proxy_100m --config mine.yaml data.path=packed/train optim.lr=1e-3 'schedule.milestones=[0.8, 0.9]'
      perilune train demo_vlm stage=align --after runs/demo_vlm/vit --after runs/demo_vlm/text data.path=packed/train
      perilune train deepseek_v3 --nproc 2048 --dry-run --plot schedules.png
      perilune train deepseek_v3 parallel.pp=8 parallel.ep=32 parallel.layout=null --nproc 1024 --dry-run
      torchrun --nproc-per-node 8 --no-python -- perilune train proxy_100m data.path=packed/train --run runs/a
    """
    from perilune.pretrain.start import Start
    from perilune.pretrain.train_command import train_command

    start = Start(init_from, after)
    ctx.exit(train_command(preset, overrides, config_file, run_dir, nproc, dry_run, profile, start, plot))


@main.command(cls=_CompareCommand, short_help="A run's curves and facts as one HTML file.")
@click.argument("run_dir", metavar="RUN", type=FOLDER)
@click.option(
    "--compare", type=FOLDER, multiple=True, metavar="RUN...", help="Other runs, drawn beside the first; 7 at most."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="[default: RUN/report.html]"
)
def report(run_dir: Path, compare: tuple[Path, ...], out: Path | None) -> None:
    """Write a report on the run directory RUN: one HTML file that needs no network and no other file.

    Loss, bits per byte, learning rate, speed, gradient norm, where the experts' tokens went, data, model, configuration
    and environment. A run that still goes on is shown as far as it is.

    \b
    Examples:
      perilune report runs/first
      perilune report runs/first --compare runs/second runs/third --out comparison.html
    """
    from perilune.pretrain.report.page import write_report

    click.echo(f"report: {write_report(run_dir, compare, out)}")


@main.command(cls=_PresetCommand, short_help="Memory and time of every recomputation policy, measured here.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of a table.")
@click.argument("preset", metavar="PRESET")
@click.argument("overrides", metavar="[key=value ...]", nargs=-1)
@click.pass_context
def recompute(ctx: click.Context, preset: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure what each policy of activation recomputation (gradient checkpointing) saves and costs.

    One forward and backward of a micro-batch in one process, for no recomputation, each module alone, those that
    DeepSeek-V3 recomputes, and full. Gradients are compared with those without: exit code 1 if a policy changes them.

    \b
    Examples:
      perilune recompute tiny
      perilune recompute proxy_100m model.num_layers=4 data.seq_len=1024 precision.compute=fp32
    """
    from perilune.parallel.late_compile import import_megatron_core

    import_megatron_core()
    from perilune.pretrain.plan.recompute import recompute_command

    ctx.exit(recompute_command(preset, overrides, as_json))


@main.command(short_help="Prove on this machine that every layout gives one loss and one gradient.")
@click.option(
    "--max-procs",
    type=click.IntRange(min=1, max=8),
    default=8,
    show_default=True,
    metavar="N",
    help="Leave out layouts of more processes; they may be more than the cores.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Only this model: base, mtp2, no-mtp, moonlight, dense, yarn, whole-rows, or vlm, whose rows have images.",
)
@click.option("--out", type=FOLDER, default=Path("parity"), show_default=True, help="Folder for the pages.")
@click.option("--only", metavar="WORDS", help="Only layouts whose name has all these words, as in 'tp2 cp2'.")
@click.option("--dry-run", is_flag=True, help="List the layouts.")
@click.pass_context
def parity(ctx: click.Context, max_procs: int, model: str | None, out: Path, only: str | None, dry_run: bool) -> None:
    """Train a small model in every layout, and compare each with one process.

    Losses, expert counts, router biases, every gradient and every weight's update after three steps, in fp32, from the
    same weights on the same packed batch. Writes parity.html, parity.md and parity.json; exit code 1 if any layout
    is out of tolerance. All of it takes about half an hour on two cores.

    \b
    Examples:
      perilune parity --max-procs 2
      perilune parity --only 'tp2 pp2'
      perilune parity --model vlm --dry-run
    """
    from perilune.pretrain.parity.command import parity_command

    ctx.exit(parity_command(max_procs, out, model, only, dry_run))


@main.command(short_help="All of it once, small.")
@click.option("--vlm", is_flag=True, help="A vision-language model, stage after stage, on glyphs.")
@click.option(
    "--run",
    "run_dir",
    type=FOLDER,
    help="Run directory; what is there already is not made again.  [default: runs/demo, runs/demo_vlm]",
)
@click.pass_context
def demo(ctx: click.Context, vlm: bool, run_dir: Path | None) -> None:
    """Everything once, in under ten minutes on two cores: tokenizer, shards, train, stop, resume, validate.

    Text is the source of the running Python's standard library, so nothing is downloaded. At the end: bits per byte on
    held-out files beside what `xz -9` makes of them, and where TensorBoard's events are.

    --vlm goes through the stages of a vision-language model: a text run, images beside their captions, alignment, joint
    training. At the end: how many letters it names that stand in no training image, and with the image blanked.
    """
    if vlm:
        from perilune.pretrain.demo_vlm import main as run_vlm

        ctx.exit(run_vlm(run_dir or Path("runs/demo_vlm")))
    from perilune.pretrain.demo import main as run

    ctx.exit(run(run_dir or Path("runs/demo")))


for command in (tokenizer, pack, inspect, export, import_, eval_, generate, launch, jobs, sweep, fit, predict):
    main.add_command(command)

if __name__ == "__main__":
    main()
