"""What an evaluation leaves behind: its figures as JSON, and beside it the answers to images, a line each.

`NAME.json` and `NAME.answers.jsonl`; of the latter the first lines that have one carry a picture, for the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    return out.with_suffix(ANSWERS)
