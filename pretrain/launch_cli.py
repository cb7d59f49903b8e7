"""`perilune launch` and `perilune jobs`: words in, `pretrain/launch_command.py` does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

RUN = click.Path(file_okay=False, exists=True, path_type=Path)
COUNT = click.IntRange(min=1)


class Nodes(click.ParamType):
    """N, or FEWEST-MOST."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(fewest, most)"""
        if isinstance(value, tuple):
            return value
        low, dash, high = str(value).partition("-")
        if not low.isdigit() or (dash and not high.isdigit()) or int(low) < 1 or int(high or low) < int(low):
            self.fail(f"{value!r}: a number of nodes, as in 4, or the fewest and the most, as in 2-4", param, ctx)
        return int(low), int(high or low)


def placed(*extra: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The options that every launcher has, after its own, and the command to launch."""
    common = [
        click.option("--restarts", type=click.IntRange(min=0), default=3, show_default=True, metavar="N",
                     help="Starts after a failure; being preempted counts for none."),
        click.option("--hang-after", type=click.FloatRange(min=1), default=600.0, show_default=True, metavar="SECONDS",
                     help="A rank without a sign of life for this long, after its first step, counts as hung."),
        click.option("--start-within", type=click.FloatRange(min=1), default=1800.0, show_default=True,
                     metavar="SECONDS", help="Until the first step of every rank."),
        click.option("--threads", type=COUNT, metavar="N", help="CPU threads a process.  [default: cores / processes]"),
        click.option("--env", "env", multiple=True, metavar="NAME=VALUE",
                     help="Set for every process. No secrets: those are inherited from this environment."),
        click.option("--dry-run", is_flag=True, help="Print exactly what would run; start nothing."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object: the job, and where it went."),
        click.argument("arguments", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED),
    ]  # fmt: skip

    def decorate(function: Any) -> Any:
        for option in reversed([*extra, *common]):
            function = option(function)
        return function

    return decorate


NODES = click.option("--nodes", type=Nodes(), default="1", show_default=True,
                     help="With MIN-MAX it starts, and goes on after a loss, on as many as there are.")  # fmt: skip
PROCS = click.option("--procs-per-node", type=COUNT, metavar="N", help="[default: the GPUs a node, or 1]")
GPUS = click.option("--gpus-per-node", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                    help="One process drives each; 0: CPU.")  # fmt: skip


@click.group(short_help="Start a run here, on Slurm or on Ray; it comes back after failures.")
def launch() -> None:
    """Start `train` under supervision: it is restarted from its newest valid checkpoint, and given up with a diagnosis.

    The same command everywhere; what follows `--` is that of `perilune` itself.

    \b
    Examples:
      perilune launch local --nproc 2 -- train demo data.path=packed/train --run runs/a
      perilune launch slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
      perilune launch ray --address http://127.0.0.1:8265 --nodes 2 -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
      perilune launch slurm --nodes 4 --gpus-per-node 8 --dry-run -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
    """


@launch.command("local", short_help="On this machine.")
@placed(
    click.option("--nproc", type=COUNT, metavar="N", help="Processes.  [default: the GPUs, or what the layout needs]")
)
@click.pass_context
def launch_local(ctx: click.Context, **options: Any) -> None:
    """Start COMMAND on this machine and stay with it to its end. Ctrl-C and SIGTERM end it with a checkpoint, code 75.

    \b
    Examples:
      perilune launch local --nproc 2 -- train demo data.path=packed/train --run runs/a
      perilune launch local --nproc 8 --restarts 10 --hang-after 120 -- train proxy_100m data.path=packed/train
      perilune launch local --nproc 8 -- doctor --cluster
    """
    from perilune.pretrain.launch_command import launch_local as run

    ctx.exit(run(**options))


@launch.command("slurm", short_help="By sbatch.")
@placed(
    NODES,
    PROCS,
    GPUS,
    click.option("--per", type=click.Choice(["process", "node"]), default="process", show_default=True,
                 help="One srun task a process, or one a node that starts its processes."),
    click.option("--time", "time_limit", metavar="[D-]HH:MM:SS", help="Time limit.  [default: the partition's]"),
    click.option("--signal-before", type=COUNT, default=120, show_default=True, metavar="SECONDS",
                 help="Before the limit a checkpoint is written and the job requeued."),
    click.option("--partition", metavar="NAME"),
    click.option("--account", metavar="NAME"),
    click.option("--qos", metavar="NAME"),
    click.option("--exclude", metavar="NODES", help="Nodes not to use, as in node[3,7]."),
    click.option("--image", default="", metavar="IMAGE", help="Container: a .sif by Apptainer, else by enroot, pyxis."),
    click.option("--mount", "mounts", multiple=True, metavar="SOURCE:TARGET[:ro]", help="Seen in the container."),
    click.option("--site", type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE",
                 help="YAML of what is particular to the cluster: environment, sbatch options, setup lines."),
    click.option("--sweep", "sweep", multiple=True, metavar="KEY=V1,V2",
                 help="An array job, a task a value; several: every combination. Runs go to RUN/KEY=VALUE."),
    click.option("--chain", type=COUNT, default=1, show_default=True, metavar="N",
                 help="Jobs, each after the one before it: for runs longer than a time limit."),
    click.option("--script", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="Where to write it.  [default: RUN/launch/job.sh]"),
)  # fmt: skip
@click.pass_context
def launch_slurm(ctx: click.Context, **options: Any) -> None:
    """Write an sbatch script that can be read and submitted again without Perilune's help, and submit it.

    \b
    Examples:
      perilune launch slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
      perilune launch slurm --nodes 2-4 --gpus-per-node 8 --site site.yaml -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
      perilune launch slurm --sweep optim.lr=1e-3,2e-3 --gpus-per-node 8 -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/lr
      perilune launch slurm --nodes 4 --gpus-per-node 8 -- doctor --cluster
    """
    from perilune.pretrain.launch_command import launch_slurm as run

    ctx.exit(run(**options))


@launch.command("ray", short_help="As a job on a Ray cluster.")
@placed(
    NODES,
    PROCS,
    GPUS,
    click.option("--address", metavar="URL", help="The cluster's job server, as http://head:8265.  [default: a cluster "
                 "of this machine, for this run]"),
    click.option("--insecure", is_flag=True, help="Allow a cluster beyond loopback that asks for no token."),
    click.option("--wait/--no-wait", default=True, show_default=True, help="Stay with it to its end."),
)  # fmt: skip
@click.pass_context
def launch_ray(ctx: click.Context, **options: Any) -> None:
    """Submit COMMAND by Ray's job API. Its workers are placed one node's processes together.

    The token of a cluster with authentication is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as by Ray's tools.

    \b
    Examples:
      perilune launch ray --procs-per-node 2 -- train demo data.path=packed/train --run runs/a
      perilune launch ray --address http://head:8265 --nodes 2 --gpus-per-node 8 -- \\
          train proxy_100m data.path=/nfs/train --run /nfs/a
    """
    from perilune.pretrain.launch_command import launch_ray as run

    ctx.exit(run(**options))


@click.group(short_help="Runs that were launched: status, logs, cancel.")
def jobs() -> None:
    """Ask about a run that `perilune launch` started, wherever it is; RUN is its run directory."""


@jobs.command("status")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def jobs_status(ctx: click.Context, run_dir: Path, as_json: bool) -> None:
    """Where it is, its state there, its step, restarts, and which rank is behind."""
    from perilune.pretrain.jobs_command import status

    ctx.exit(status(run_dir, as_json))


@jobs.command("logs")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="This one's alone.")
@click.option("--lines", type=COUNT, default=20, show_default=True, metavar="N", help="The last ones of each.")
@click.option("--follow", is_flag=True, help="Go on as they grow.")
@click.pass_context
def jobs_logs(ctx: click.Context, run_dir: Path, rank: int | None, lines: int, follow: bool) -> None:
    """The last lines of its logs, those of a rank that failed first."""
    from perilune.pretrain.jobs_command import logs

    ctx.exit(logs(run_dir, rank, lines, follow))


@jobs.command("cancel")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--now", is_flag=True, help="Without a checkpoint.")
@click.pass_context
def jobs_cancel(ctx: click.Context, run_dir: Path, now: bool) -> None:
    """End it: with a checkpoint, so that the same launch continues it, or --now."""
    from perilune.pretrain.jobs_command import cancel

    ctx.exit(cancel(run_dir, now))


@jobs.command("watch", short_help="For scripts: wait until some rank hangs.")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--attempt", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="PERILUNE_ATTEMPT of its processes.")  # fmt: skip
@click.option("--processes", type=COUNT, metavar="N", help="[default: all of the job's]")
@click.pass_context
def jobs_watch(ctx: click.Context, run_dir: Path, attempt: int, processes: int | None) -> None:
    """Watch the heartbeats of a run that is under way: exit code 0 once every rank is done, 3 if some rank gives no
    sign of life for the job's limit, after a line that names it and where the others wait. It ends nothing.
    """
    from perilune.pretrain.jobs_command import watch

    ctx.exit(watch(run_dir, attempt, processes))


@jobs.command("judge", short_help="For scripts: would another attempt end better?")
@click.argument("run_dir", metavar="RUN", type=RUN)
@click.option("--code", type=int, required=True, metavar="N", help="With which the attempt ended; -N: by signal N.")
@click.option(
    "--attempt",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="PERILUNE_ATTEMPT of its processes.",
)
@click.option("--restarts", type=click.IntRange(min=0), metavar="N",
              help="Counted so far.  [default: as many as the attempt's number]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def jobs_judge(ctx: click.Context, run_dir: Path, code: int, attempt: int, restarts: int | None, as_json: bool) -> None:
    """Say why an attempt ended: exit code 0 if it should be started again, 1 if not. A checkpoint that was found
    damaged is set aside, so that the next attempt goes on from the one before it.
    """
    from perilune.pretrain.jobs_command import judge

    ctx.exit(judge(run_dir, attempt, code, restarts, as_json))
