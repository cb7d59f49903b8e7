"""The newest evaluation of a run's images for the report: figures, and pictures of right and wrong answers.

Read from what `perilune eval` left in RUN/eval, without the model. Nothing in these files is believed: numbers must be
numbers, text is escaped as all of the page, and pictures are decoded and encoded anew.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perilune.pretrain.data.inspect_facts import printable
from perilune.pretrain.evaluate.results import answers_of
from perilune.pretrain.report.describe import MISSING, Bar, Table
from perilune.pretrain.report.read import Run

MAX_BYTES = 1 << 24  # of a file of figures, and of the lines of answers that are read
MAX_PICTURES = 12  # right ones, and as many wrong ones, of all runs together
MAX_SIDE = 256  # pixels
MAX_TEXT = 200  # characters shown of a text


@dataclass(frozen=True)
class Shown:
    """An image with what was expected, said, and said of the same in grey."""

    source: str  # data: URI
    sample: str
    expected: str
    said: str
    blanked: str


@dataclass(frozen=True)
class Evaluation:
    """Of one run. `figures` are in words, by name."""

    name: str  # of the run
    figures: dict[str, str]
    right: list[Shown] = field(default_factory=list)
    wrong: list[Shown] = field(default_factory=list)


def read_evaluations(runs: list[Run]) -> list[Evaluation]:
    """The newest evaluation with images of each run that has one; what cannot be read goes to the run's notes."""
    return [found for run in runs if (found := _newest(run, MAX_PICTURES // len(runs))) is not None]


def table(evaluations: list[Evaluation]) -> Table:
    """A row a figure, a column a run."""
    names = list(dict.fromkeys(name for one in evaluations for name in one.figures))
    rows: list[list[str | Bar]] = [[name, *(one.figures.get(name, MISSING) for one in evaluations)] for name in names]
    return Table(["", *(one.name for one in evaluations)], rows, numbers=1)


def _newest(run: Run, pictures: int) -> Evaluation | None:
    best: tuple[str, str, Path, dict[str, Any]] | None = None
    for file in sorted((run.path / "eval").glob("*.json")):
        result = _object(file)
        if result is None:
            run.notes.append(f"eval/{printable(file.name)} could not be read and is left out")
        elif {"captions", "retrieval"} & result.keys():
            key = (str(result.get("time", "")), file.name)
            if best is None or key > best[:2]:
                best = (*key, file, result)
    if best is None:
        return None
    _, _, file, result = best
    found = Evaluation(run.name, dict(_figures(result)))
    for answer in _answers(answers_of(file)):
        kind = found.right if answer.get("right") is True else found.wrong
        shown = _shown(answer) if len(kind) < pictures else None
        if shown is not None:
            kind.append(shown)
    return found


def _object(file: Path) -> dict[str, Any] | None:
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "at step", _whole(result.get("step"))
    if result.get("ema") is True:
        yield "weights", "their average"
    yield "evaluated", printable(str(result.get("time", MISSING)))[:MAX_TEXT]
    captions = _dict(result, "captions")
    if captions:
        yield "captions", _whole(captions.get("captions"))
        for name, key in (("exact match", "exact_match"), ("the same with grey images", "exact_match_blanked")):
            yield name, _part(captions.get(key), captions.get(f"{key}_stderr"))
    retrieval = _dict(result, "retrieval")
    if retrieval:
        yield "images, texts", f"{_whole(retrieval.get('images'))}, {_whole(retrieval.get('texts'))}"
        for name, way in (("text of an image", "image_to_text"), ("image of a text", "text_to_image")):
            for k, part in list(_dict(retrieval, way).items())[:8]:
                yield f"{name}, recall@{printable(k)[:8]}", _part(part)
    zero_shot = _dict(result, "zero_shot")
    if zero_shot:
        classes = _whole(zero_shot.get("classes"))
        for k, part in list(_dict(zero_shot, "accuracy").items())[:8]:
            yield f"zero-shot among {classes} classes, top {printable(k)[:8]}", _part(part)


def _dict(of: dict[str, Any], key: str) -> dict[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> str:
    return f"{value:,}" if type(value) is int and abs(value) < 1 << 53 else MISSING


def _part(value: Any, error: Any = None) -> str:
    if type(value) is not float or not math.isfinite(value):
        return MISSING
    return f"{value:.1%}" + (f" ± {error:.1%}" if type(error) is float and math.isfinite(error) else "")


def _answers(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that carry a picture."""
    read = 0
    try:
        with file.open("rb") as stream:
            while read < MAX_BYTES and (line := stream.readline(MAX_BYTES)):
                read += len(line)
                try:
                    answer = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(answer, dict) and isinstance(answer.get("png"), str):
                    yield answer
    except OSError:
        return


def _shown(answer: dict[str, Any]) -> Shown | None:
    from perilune.vision.images import decode

    try:
        _, picture = decode(base64.b64decode(answer["png"], validate=True))
    except (ValueError, binascii.Error):
        return None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    texts = {name: printable(str(answer.get(name, ""))) for name in ("sample", "expected", "said", "blanked")}
    return Shown(source=_uri(picture), **{name: _clipped(text) for name, text in texts.items()})


def _uri(picture: Any) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
