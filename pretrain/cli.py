"""The command `perilune`: words in, the function that does it, exit code out.

Only click is imported here at the top: `perilune --help` answers at once, and each command imports what it runs.
Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted with its checkpoint written (start the same command again).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from perilune.pretrain.data_cli import FOLDER, FOLDER_THERE, inspect, pack, tokenizer
from perilune.pretrain.errors import InputError, Preempted
from perilune.pretrain.launch_cli import jobs, launch
from perilune.pretrain.scaling_cli import fit, predict, sweep

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


FILE_THERE = click.Path(dir_okay=False, exists=True, path_type=Path)


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
    """Train PRESET, with any of its keys changed by KEY=VALUE.

    The same command on the same --run directory goes on where it stopped, bitwise. Only the keys of length, layout and
    logging may differ then: train.steps, parallel.* and their like.

    A preset of several stages takes stage=NAME; each stage is a run of its own, --after those that it goes on from.

    \b
    Examples:
      perilune train tiny data.path=packed/train train.steps=20
      perilune train demo data.path=packed/train --run runs/first --nproc 2
      perilune train demo data.path=packed/train --run runs/first --nproc 2 train.steps=400
      perilune train proxy_100m --config mine.yaml optim.lr=1e-3 'schedule.milestones=[0.8, 0.9]'
      perilune train demo_vlm stage=align --after runs/demo_vlm/vit --after runs/demo_vlm/text data.path=packed/train
      perilune train deepseek_v3 --nproc 2048 --dry-run --plot schedules.png
      perilune train deepseek_v3 recompute.granularity=none 'recompute.modules=[]' --nproc 2048 --dry-run
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


@main.command(short_help="A checkpoint as a folder that transformers, vLLM and SGLang load.")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=FOLDER_THERE)
@click.option("--out", type=FOLDER, required=True, metavar="HF_DIR", help="Folder to write; must not be there yet.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), help="Of the tensors.  [default: that of the weights]")
@click.option(
    "--format",
    "names",
    type=click.Choice(["deepseek_v3", "kimi_vl", "kimi_k25"]),
    help="Whose names and config.json.  [default: the model's own, kimi_vl with a tower]",
)
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Of a file: 500MB, 5GB, 4GiB..."
)
@click.option("--ema", is_flag=True, help="The average of the weights (optim.ema_decay) in their place.")
@click.option("--verify", is_flag=True, help="Load it with transformers and compare logits, before it has its name.")
@click.pass_context
def export(
    ctx: click.Context,
    source: Path,
    out: Path,
    dtype: str | None,
    names: str | None,
    max_shard_size: str,
    ema: bool,
    verify: bool,
) -> None:
    """Write the newest checkpoint of a run, or a given one, in Hugging Face's layout, with the run's tokenizer.

    Streams tensor by tensor: memory for the largest one is enough, however large the model. With --dtype fp32 a bf16
    run gives its fp32 masters. A model with a tower has Kimi-VL's names, or with --format kimi_k25 Kimi-K2.5's, which
    transformers opens by itself. A model that transformers would compute otherwise is refused with the reason.

    \b
    Examples:
      perilune export runs/first --out first-hf --verify
      perilune export runs/first --out first-average-hf --ema
      perilune export runs/images --out images-hf --format kimi_k25 --verify
      perilune export runs/first/checkpoints/step_00001000 --out hf --dtype bf16 --max-shard-size 10GB
    """
    from perilune.pretrain.hf.commands import export_command

    ctx.exit(export_command(source, out, dtype, names, max_shard_size, verify, ema))


@main.command("import", short_help="A Hugging Face folder as a checkpoint to start from.")
@click.argument("folder", metavar="HF_DIR", type=FOLDER_THERE)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--out", type=FOLDER, required=True, metavar="CHECKPOINT", help="Folder to write; must not be there yet.")
@click.pass_context
def import_(ctx: click.Context, folder: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Turn the DeepSeek-V3-style weights in HF_DIR (safetensors; fp32, bf16 or FP8 blocks) into a checkpoint.

    Every tensor must be there, of its shape and type, and no other; nothing is run that lies in the folder. KEY=VALUE
    changes the configuration written beside the weights: model.num_nextn_predict_layers=0 leaves MTP layers out.

    \b
    Examples:
      perilune import Moonlight-16B-A3B --out moonlight
      perilune train demo --config moonlight/config.yaml --init-from moonlight data.path=packed/train
    """
    from perilune.pretrain.hf.commands import import_command

    ctx.exit(import_command(folder, out, overrides))


@main.command("eval", short_help="Loss and bits per byte by source; multiple choice by likelihood.")
@click.argument("source", metavar="RUN_OR_HF", type=FOLDER_THERE)
@click.option("--tasks", type=FILE_THERE, metavar="FILE.jsonl", help="Questions, one a line.")
@click.option(
    "--data", type=FOLDER_THERE, metavar="PACKED_DIR", help="Packed dataset.  [default: the run's valid.path]"
)
@click.option("--max-rows", type=click.IntRange(min=0), default=0, metavar="N", help="Of the dataset; 0: all.")
@click.option("--captions", type=click.IntRange(min=0), default=1000, show_default=True, metavar="N",
              help="Images to be described, where the model sees; 0: none.")  # fmt: skip
@click.option("--classes", type=FILE_THERE, metavar="FILE.jsonl", help="For zero-shot classification of images.")
@click.option("--ema", is_flag=True, help="The average of a run's weights (optim.ema_decay) in their place.")
@click.option("--tokenizer", type=FOLDER_THERE, help="Tokenizer's folder.  [default: the one that the model names]")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="[default: a new one in RUN/eval]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.pass_context
def eval_(
    ctx: click.Context,
    source: Path,
    tasks: Path | None,
    data: Path | None,
    max_rows: int,
    captions: int,
    classes: Path | None,
    ema: bool,
    tokenizer: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate a run's newest checkpoint, a given one, or a Hugging Face folder, in one process.

    Validation loss and bits per UTF-8 byte on a packed dataset, by source of its documents; and the accuracy on
    questions, each a line of FILE.jsonl:

    \b
      {"task": "capitals", "context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

    The answer is the choice of the highest likelihood: raw, and by byte.

    A model with a vision tower also says, greedily, what text follows each of N images: how many are exactly that of
    the dataset, and how many still are when all images are mid-grey. One that was trained to compare images with texts
    (contrastive.loss) finds the dataset's captions by their images and the other way round, and tells the images apart
    among those captions, or among the classes of a file, a class a line, whose label is what captions say:

    \b
      {"label": "BLACK HEART SUIT", "prompts": ["BLACK HEART SUIT", "a black heart"]}

    \b
    Examples:
      perilune eval runs/first
      perilune eval runs/images --data glyphs/valid --captions 200
      perilune eval runs/first --tasks capitals.jsonl --json
      perilune eval first-hf --data packed/valid --out first.json
    """
    from perilune.pretrain.evaluate.commands import eval_command

    ctx.exit(
        eval_command(
            source,
            tasks,
            data,
            tokenizer=tokenizer,
            max_rows=max_rows,
            captions=captions,
            classes=classes,
            ema=ema,
            out=out,
            as_json=as_json,
        )
    )


@main.command(short_help="Continue a text, or describe images.")
@click.argument("source", metavar="RUN_OR_HF", type=FOLDER_THERE)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Several are done together.")
@click.option("--image", "images", type=FILE_THERE, multiple=True, metavar="FILE", help="JPEG, PNG or WebP.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="N")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="P",
    help="Draw from the fewest likeliest tokens whose probability reaches P.",
)
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, metavar="S")
@click.option("--tokenizer", type=FOLDER_THERE, help="Tokenizer's folder.  [default: the one that the model names]")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each prompt.")
@click.pass_context
def generate(
    ctx: click.Context,
    source: Path,
    prompts: tuple[str, ...],
    images: tuple[Path, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Continue TEXT with a run's newest checkpoint, a given one, or a Hugging Face folder, in one process.

    Stops at the end of a document, or where an image would begin. Past tokens are kept as latents only (multi-head
    latent attention).

    A model with a vision tower is shown every --image in each TEXT: in their order, one where each <image> stands or,
    where TEXT has none, all before it.

    \b
    Examples:
      perilune generate runs/first --prompt 'def main('
      perilune generate runs/images --image moon.png
      perilune generate runs/images --image a.png --image b.png --prompt 'First <image>, then <image>:'
      perilune generate first-hf --prompt 'import ' --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
    """
    from perilune.pretrain.evaluate.commands import generate_command

    ctx.exit(
        generate_command(
            source,
            prompts,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            images=images,
            tokenizer=tokenizer,
            as_json=as_json,
        )
    )


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


for command in (tokenizer, pack, inspect, launch, jobs, sweep, fit, predict):
    main.add_command(command)

if __name__ == "__main__":
    main()
