"""`perilune eval` and `perilune generate`: words in, tables or JSON out, exit code."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perilune.parallel.late_compile import import_megatron_core
from perilune.parallel.quiet import quiet
from perilune.pretrain.errors import InputError, make_folder

if TYPE_CHECKING:
    from perilune.pretrain.evaluate.asked import Class, Question
    from perilune.pretrain.evaluate.captions import Answer
    from perilune.pretrain.evaluate.described import Described
    from perilune.pretrain.evaluate.load import Loaded

_NOTHING = "{} names no validation set: name a packed dataset by --data, or a file by --tasks"
_LINES = 40  # of a table of sources; the file of results has all


def eval_command(
    source: Path,
    tasks: Path | None,
    data: Path | None,
    *,
    tokenizer: Path | None = None,
    max_rows: int = 0,
    captions: int = 0,
    classes: Path | None = None,
    ema: bool = False,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Evaluate `source` on `data` (None: its run's validation set) and on `tasks`; returns the exit code.

    With `ema` it is the average of the weights that is evaluated, and the results say so.
    A model with a tower also describes `captions` of the images in `data`; one that was trained to compare images with
    texts also finds each by the other, and tells images apart by `classes` (None: the dataset's captions). Writes `out`
    (None: a new file in RUN/eval where `source` belongs to a run, and the run's TensorBoard), and beside it the answers
    to images. Raises InputError for what cannot be evaluated, and where there is nothing to evaluate on.
    """
    if out is not None and out.exists():
        raise InputError(f"--out {out} is there already and is never written over")
    if data is None and tasks is None and not ema and (source / "config.json").is_file():
        raise InputError(_NOTHING.format(source))
    quiet()
    about, questions, named = _asked(source, tokenizer, ema, tasks, classes)
    data = data or _own_data(about)
    if data is None and not questions:
        raise InputError(_NOTHING.format(source))
    sees = data is not None and _has_images(data) and about.vision is not None
    no_classes = (
        f"--classes {classes}: {source} has no part that compares images with texts (contrastive.loss), or the dataset "
        "has no images with captions"
    )
    if named and not sees:
        raise InputError(no_classes)
    if sees and captions:
        about.need_text()
    import_megatron_core()
    from perilune.pretrain.evaluate import choices, pairs, results
    from perilune.pretrain.evaluate.load import alone, load

    with alone():
        loaded = load(about)
        out = out or (_new_file(loaded) if loaded.run_dir else None)
        if out is not None:  # before the time that evaluation takes
            make_folder(out.parent)
        answers: list[Answer] = []
        result: dict[str, Any] = {"model": str(loaded.path), "step": loaded.step, "time": _now().isoformat()}
        result |= {"ema": True} if ema else {}
        if data is not None:
            if named and not pairs.comparing(loaded):
                raise InputError(no_classes)
            if sees and pairs.comparing(loaded):
                loaded.need_text()  # before the time that the rows take
            result["validation"] = _validated(loaded, data, max_rows)
            if sees:
                seen, answers = _seen(loaded, data, captions, max_rows, named)
                result |= seen
        if named and "zero_shot" not in result:
            raise InputError(no_classes)
        if questions:
            with _bar("questions") as progress:
                scores = choices.choose(loaded, questions, progress)
            found = choices.accuracies(questions, scores)
            result["tasks"] = {name: accuracy.to_dict() for name, accuracy in found.items()}
            result["tasks_file"] = str(tasks)
    if out is not None:
        results.write(out, result, answers)
    if loaded.run_dir is not None and loaded.vision is not None:
        try:
            results.board(loaded.run_dir, result, answers)
        except OSError as error:  # somebody else's run, perhaps: the figures themselves are there
            print(f"perilune: not in {loaded.run_dir}'s TensorBoard: {error}", file=sys.stderr)
    _print(result, out, as_json)
    return 0


def _print(result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    print(_told(result))
    if out is not None:
        print(f"results: {out}")


def _asked(
    source: Path, tokenizer: Path | None, ema: bool, tasks: Path | None, classes: Path | None
) -> tuple[Described, Sequence[Question], Sequence[Class]]:
    """The model, and what it is asked: what is wrong with them is told before the seconds of imports that follow."""
    from perilune.pretrain.evaluate import asked
    from perilune.pretrain.evaluate.described import describe

    questions = asked.read_tasks(tasks) if tasks else []
    named = asked.read_classes(classes) if classes else []
    about = describe(source, tokenizer, average=ema)
    if questions:
        asked.encoded(about, questions)
    return about, questions, named


def _has_images(data: Path) -> bool:
    """Whether they stand in a packed dataset. Raises InputError for what is none."""
    from perilune.pretrain.data.manifest import image_rule, read_manifest

    return image_rule(read_manifest(data)) is not None


def generate_command(
    source: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    *,
    images: tuple[Path, ...] = (),
    tokenizer: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print each prompt with its continuation, or a line of JSON for each; returns the exit code.

    `images` go into every prompt, as `prompts.encode_prompts` says. Raises InputError for an empty prompt, for one
    that, continued, is longer than the model's positions, and for images that it cannot be given.
    """
    if not prompts and not images:
        raise InputError("nothing to continue: give a text by --prompt, an image by --image, or both")
    prompts = prompts or ("",)
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature}: must be a finite number")
    if temperature == 0 and top_p < 1:
        raise InputError(
            f"--top-p {top_p} without --temperature: the likeliest token is taken; set --temperature above 0"
        )
    quiet()
    from perilune.pretrain.evaluate.described import describe
    from perilune.pretrain.evaluate.prompts import encode_prompts, read_picture

    # Whatever can be told is told before the seconds of imports that follow.
    about = describe(source, tokenizer)
    text = about.need_text()
    pictures = [read_picture(path, about.need_tower()) for path in images]
    rows, shown = encode_prompts(about, prompts, max_new_tokens, pictures)
    import_megatron_core()
    from perilune.parallel import mesh as meshes
    from perilune.pretrain.evaluate.generate import generate
    from perilune.pretrain.evaluate.load import alone, load

    with alone():
        loaded = load(about)
        start = time.monotonic()
        found = generate(
            loaded.net,
            rows,
            max_new_tokens,
            images=shown.to(meshes.device()) if shown else None,
            eos_ids=loaded.ends(),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        seconds = time.monotonic() - start
    for prompt, row, continuation in zip(prompts, rows, found, strict=True):
        ids = [token for token in continuation.tokens if token not in loaded.ends()]
        said = text.tokenizer.decode(ids)
        if as_json:
            line = {
                "prompt": prompt,
                "text": said,
                "prompt_tokens": row,
                "tokens": list(continuation.tokens),
                "ended": continuation.ended,
                **({"images": [str(path) for path in images]} if images else {}),
            }
            print(json.dumps(line))
        else:
            print(prompt + said)
    count = sum(len(one.tokens) for one in found)
    if sys.stderr.isatty():
        print(f"{count} tokens in {seconds:.1f} s", file=sys.stderr)
    return 0


def _own_data(about: Described) -> Path | None:
    """The validation set of the model's run; of a checkpoint that was moved, if it is still there."""
    path = Path(about.config.valid.path) if about.config and about.config.valid.path is not None else None
    return path if path is not None and (about.run_dir is not None or path.is_dir()) else None


def _validated(loaded: Loaded, data: Path, max_rows: int) -> dict[str, Any]:
    from perilune.pretrain.evaluate import validation

    with _bar("rows") as progress:
        found = validation.validate(
            loaded.net,
            data,
            vocab_size=loaded.model.vocab_size,
            document_mask=loaded.config.data.document_mask if loaded.config else True,
            tokenizer_fingerprint=loaded.text.tokenizer.fingerprint if loaded.text else None,
            vision=loaded.vision,
            max_rows=max_rows,
            progress=progress,
        )
    return {
        "data": str(data),
        "fingerprint": found.fingerprint,
        "rows": found.rows,
        **found.total.to_dict(),
        "sources": {name: figures.to_dict() for name, figures in found.sources.items()},
    }


def _seen(
    loaded: Loaded, data: Path, limit: int, max_rows: int, classes: Sequence[Class]
) -> tuple[dict[str, Any], list[Answer]]:
    """What the model makes of the images of a dataset that has some; nothing without texts that follow them."""
    from perilune.pretrain.data.manifest import image_rule
    from perilune.pretrain.data.reader import PackedDataset
    from perilune.pretrain.evaluate import captions, pairs, results

    compares = pairs.comparing(loaded) is not None
    dataset, answers, found = PackedDataset(data), [], dict[str, Any]()
    try:
        rule = image_rule(dataset.manifest)
        assert rule is not None
        if not (limit or compares):
            return {}, []
        asked = captions.find(dataset, loaded.need_text().tokenizer, None if compares else limit, max_rows)
        if not asked:
            return {}, []
        if compares:
            with _bar("pairs") as progress:
                features = pairs.features(loaded, dataset, asked, rule, progress)
            found["retrieval"] = pairs.retrieval(features)
            found["zero_shot"] = pairs.zero_shot(loaded, features, classes)
        if limit:
            with _bar("captions") as progress:
                answers = list(captions.ask(loaded, dataset, asked[:limit], rule, results.PICTURES, progress))
            found["captions"] = captions.figures(answers)
    finally:
        dataset.close()
    return found, answers


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be told (done, total), drawn on a terminal and silent elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _new_file(loaded: Loaded) -> Path:
    """A name in RUN/eval that is not taken."""
    assert loaded.run_dir is not None
    stem = f"step_{loaded.step:08d}_{_now():%Y%m%dT%H%M%SZ}"
    names = (f"{stem}{more}.json" for more in ("", *(f"_{number}" for number in range(2, 1000))))
    return next(path for name in names if not (path := loaded.run_dir / "eval" / name).exists())


def _told(result: dict[str, Any]) -> str:
    """The results as tables."""
    step = "" if result["step"] is None else f", step {result['step']:,}"
    average = ", the average of its weights" if result.get("ema") else ""
    parts = [f"{result['model']}{step}{average}"]
    if "validation" in result:
        whole = result["validation"]
        rows = [["source", "loss", "bits per byte", "tokens", "bytes"]]
        shown = list(whole["sources"].items())[:_LINES]
        rows += [_line(name, figures) for name, figures in [*shown, ("all", whole)]]
        left = len(whole["sources"]) - len(shown)
        parts.append(f"{whole['data']}: {whole['rows']:,} rows\n{_table(rows)}")
        if left:
            parts.append(f"{left} sources with fewer bytes are in the total and, one by one, in --json")
    if "captions" in result:
        found = result["captions"]
        rows = [["images", "captions", "exact match", "of them"]]
        for what, key in (("as they are", "exact_match"), ("mid-grey", "exact_match_blanked")):
            exact = _part(found[key], found[f"{key}_stderr"])
            rows.append([what, f"{found['captions']:,}", exact, f"{found[f'{key}_count']:,}"])
        parts.append(_table(rows))
    if "retrieval" in result:
        found = result["retrieval"]
        rows = [["retrieval", *(f"recall@{k}" for k in found["image_to_text"])]]
        for what, key in (("texts of an image", "image_to_text"), ("images of a text", "text_to_image")):
            rows.append([what, *(f"{part:.4f}" for part in found[key].values())])
        parts.append(f"{found['images']:,} images, {found['texts']:,} texts\n{_table(rows)}")
        found = result["zero_shot"]
        rows = [["zero-shot", *(f"top-{k}" for k in found["accuracy"])]]
        rows.append(["accuracy", *(f"{part:.4f}" for part in found["accuracy"].values())])
        others = f", {found['left_out']:,} of other captions left out" if found["left_out"] else ""
        parts.append(f"{found['images']:,} images among {found['classes']:,} classes{others}\n{_table(rows)}")
    if "tasks" in result:
        rows = [["task", "questions", "accuracy", "by byte"]]
        for name, task in result["tasks"].items():
            raw, normalised = (_part(task[kind], task[f"{kind}_stderr"]) for kind in ("raw", "by_byte"))
            rows.append([name, f"{task['questions']:,}", raw, normalised])
        parts.append(_table(rows))
    return "\n\n".join(parts)


def _line(name: str, figures: dict[str, Any]) -> list[str]:
    bits = "-" if figures["bits_per_byte"] is None else f"{figures['bits_per_byte']:.4f}"
    return [name, f"{figures['loss']:.4f}", bits, f"{figures['tokens']:,}", f"{figures['bytes']:,}"]


def _part(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _table(rows: list[list[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]))
    return "\n".join(lines)
