"""`perilune export`, `import`, `eval` and `generate`: words in, `pretrain/hf/` and `pretrain/evaluate/` do it."""

from __future__ import annotations

from pathlib import Path

import click

from perilune.pretrain.data_cli import FILE_THERE, FOLDER, FOLDER_THERE


@click.command(short_help="A checkpoint as a folder that transformers, vLLM and SGLang load.")
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


@click.command("import", short_help="A Hugging Face folder as a checkpoint to start from.")
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


@click.command("eval", short_help="Loss and bits per byte by source; multiple choice by likelihood.")
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


@click.command(short_help="Continue a text, or describe images.")
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
