"""Multiple choice by likelihood: accuracy on the questions of `asked.py`, raw and by byte.

The model answers with the choice of the highest log P(choice | context): raw, or divided by the choice's UTF-8 bytes,
which takes from long choices the burden of their length (`acc` and, by character there, `acc_norm` of EleutherAI's
lm-evaluation-harness). The first of equals counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perilune.pretrain.evaluate.asked import Question, encoded
from perilune.pretrain.evaluate.likelihood import log_likelihoods
from perilune.pretrain.evaluate.load import Loaded


@dataclass(frozen=True)
class Accuracy:
    """Of a task: the part of questions answered rightly, with the standard error of that part."""

    questions: int
    raw: float
    raw_stderr: float | None  # None: of a single question there is none
    by_byte: float
    by_byte_stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))


def choose(
    loaded: Loaded, questions: Sequence[Question], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[list[float]]:
    """log P(choice | context) in nats, of every choice of every question.

    `progress` is told questions done and questions to do. Raises InputError as `encoded`.
    """
    rows_of = encoded(loaded, questions)
    found: Iterator[torch.Tensor] = log_likelihoods(loaded.net, (row for rows, _ in rows_of for row in rows))
    scores = []
    for rows, given in rows_of:
        scores.append([float(next(found)[given - 1 :].sum()) for _ in rows])
        progress(len(scores), len(questions))
    return scores


def accuracies(questions: Sequence[Question], scores: Sequence[Sequence[float]]) -> dict[str, Accuracy]:
    """Of each task, in the order in which the file first names them."""
    right: dict[str, list[tuple[bool, bool]]] = {}
    for question, values in zip(questions, scores, strict=True):
        by_byte = [value / len(choice.encode()) for value, choice in zip(values, question.choices, strict=True)]
        right.setdefault(question.task, []).append(
            (_best(values) == question.answer, _best(by_byte) == question.answer)
        )
    found = {}
    for task, pairs in right.items():
        raw, normalised = (sum(one) / len(pairs) for one in zip(*pairs, strict=True))
        found[task] = Accuracy(
            len(pairs), raw, _standard_error(raw, len(pairs)), normalised, _standard_error(normalised, len(pairs))
        )
    return found


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _standard_error(part: float, count: int) -> float | None:
    """Of the mean of `count` zeros and ones: the sample's standard deviation over the root of the count."""
    return math.sqrt(part * (1 - part) / (count - 1)) if count > 1 else None
