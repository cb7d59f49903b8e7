"""What an evaluation leaves behind: its figures as JSON, and beside it the answers to images, a line each.

`NAME.json` and `NAME.answers.jsonl`; of the latter the first lines that have one carry a picture, for the report.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from perilune.pretrain.data.inspect_facts import printable

if TYPE_CHECKING:
    from perilune.pretrain.evaluate.captions import Answer

PICTURES = 12  # of right answers, and of wrong ones
ANSWERS = ".answers.jsonl"


def write(out: Path, result: dict[str, Any], answers: Sequence[Answer] = ()) -> None:
    """The figures to `out`, a file that is not there yet, after the answers beside it."""
    if answers:
        with answers_of(out).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(answer.to_dict()) + "\n" for answer in answers)
    with out.open("x", encoding="utf-8") as stream:
        stream.write(json.dumps(result, indent=1, allow_nan=False) + "\n")


def answers_of(out: Path) -> Path:
    """The file of answers that belongs to a file of figures."""
    return out.with_name(out.name.removesuffix(".json") + ANSWERS)


def board(run_dir: Path, result: dict[str, Any], answers: Sequence[Answer] = ()) -> None:
    """The figures, and pictures of right and wrong answers with their texts, to TensorBoard at the checkpoint's step.

    Those of the average of its weights have names of their own. In a folder of their own below RUN/tensorboard: of a
    folder with several files TensorBoard reads the newest alone, and a run may go on.
    """
    from torch.utils.tensorboard import SummaryWriter

    step, group = result["step"], "eval_ema" if result.get("ema") else "eval"
    writer = SummaryWriter(str(run_dir / "tensorboard" / "eval"))
    try:
        for name, value in _scalars(result):
            writer.add_scalar(f"{group}/{name}", value, step)
        for kind in (True, False):
            shown = [answer for answer in answers if answer.right is kind and answer.png is not None]
            name, lines = f"{group}/{'right' if kind else 'wrong'}", []
            for number, answer in enumerate(shown):
                assert answer.png is not None
                with Image.open(io.BytesIO(answer.png)) as image:
                    writer.add_image(f"{name}/{number}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
                lines += [f"{number}  {answer.sample}, image {answer.image}", f"    is    {_line(answer.expected)}",
                          f"    said  {_line(answer.said)}"]  # fmt: skip
            if lines:  # indented: text as it is, whatever it means in Markdown
                writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)
    finally:
        writer.close()


def _line(text: str) -> str:
    return printable(text).replace("\n", "␊")


def _scalars(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    validation, captions = result.get("validation", {}), result.get("captions", {})
    for of, names in ((validation, ("loss", "bits_per_byte")), (captions, ("exact_match", "exact_match_blanked"))):
        yield from ((name, of[name]) for name in names if of.get(name) is not None)
    for way in ("image_to_text", "text_to_image"):
        for k, part in result.get("retrieval", {}).get(way, {}).items():
            yield f"{way}_recall_at_{k}", part
    for k, part in result.get("zero_shot", {}).get("accuracy", {}).items():
        yield f"zero_shot_top_{k}", part
    for name, task in result.get("tasks", {}).items():
        yield f"tasks/{name}", task["raw"]
