"""Multiple choice by likelihood: tasks from a JSON Lines file, accuracy raw and by byte.

One line is one question:

    {"task": "capitals", "context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

The model answers with the choice of the highest log P(choice | context): raw, or divided by the choice's UTF-8 bytes,
which takes from long choices the burden of their length (`acc` and, by character there, `acc_norm` of EleutherAI's
lm-evaluation-harness). The first of equals counts.

Context and choice are one text, encoded together; the context's part are as many tokens as it has alone, and white
space at its end goes to the choices, since tokens begin with it (both as the harness has it). Where a token spans the
seam and the texts of a question part before that, the choices' part begins there: for all of them at the same token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.likelihood import log_likelihoods
from perilune.pretrain.evaluate.load import Loaded, Text

_KEYS = {"task": str, "context": str, "choices": list, "answer": int}
_MAX_LINE_BYTES = 1 << 26
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Question:
    """A line of a task file; `place` is `file:line`."""

    place: str
    task: str
    context: str
    choices: tuple[str, ...]
    answer: int  # index into choices


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


def read_tasks(path: Path) -> list[Question]:
    """The questions of a file. Raises InputError naming file, line, value and rule for one that breaks the form."""
    questions = []
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise InputError(f"{path}:{number}: a line beyond the limit of {_MAX_LINE_BYTES} bytes")
            if not line.isspace():
                questions.append(_question(line, f"{path}:{number}"))
    if not questions:
        raise InputError(f"{path}: no line holds a question")
    return questions


def _question(line: bytes, place: str) -> Question:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: {_shown(line.decode('utf-8', 'replace'))} is not a line of JSON: {error}"
        ) from error
    if not isinstance(value, dict) or value.keys() != _KEYS.keys():
        what = f"keys {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f"{place}: {_shown(what)}; a line is an object with exactly {', '.join(_KEYS)}")
    for key, kind in _KEYS.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise InputError(f"{place}: {key} is {_shown(repr(value[key]))}; it must be of type {kind.__name__}")
    choices = value["choices"]
    if not value["task"]:
        raise InputError(f"{place}: task is ''; it must be a name")
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"{place}: choices is {_shown(choices)}; it must hold two or more strings, none of them empty")
    if not 0 <= value["answer"] < len(choices):
        raise InputError(f"{place}: answer is {value['answer']}; it must be from 0 to {len(choices) - 1}")
    for text in (value["task"], value["context"], *choices):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: {ascii(text)[:_SHOWN]} holds half a surrogate pair: not Unicode text"
            ) from error
    return Question(place, value["task"], value["context"], tuple(choices), value["answer"])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and not value.isspace() else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def encode(question: Question, text: Text) -> tuple[list[list[int]], int]:
    """Token ids of context and choice for each choice, and how many first tokens (1 or more) are the context's.

    Raises InputError for a context that gives the model nothing to begin with.
    """
    context = question.context.rstrip()
    space = question.context[len(context) :]
    texts = [context, *(context + space + choice for choice in question.choices)]
    alone, *both = [[*text.prefix, *ids.tolist()] for ids in text.tokenizer.encode_batch(texts)]
    given = min(len(alone), *(_common(both[0], ids) for ids in both))
    if not given:
        raise InputError(
            f"{question.place}: context is {_shown(repr(question.context))}; it must hold a whole token of text before "
            "the choices, since the first token of a text is predicted from nothing"
        )
    return both, given


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal, leaving at least one of each."""
    count = 0
    while count < min(len(a), len(b)) - 1 and a[count] == b[count]:
        count += 1
    return count


def choose(
    loaded: Loaded, questions: Sequence[Question], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[list[float]]:
    """log P(choice | context) in nats, of every choice of every question.

    `progress` is told questions done and questions to do. Raises InputError for a question that is longer than the
    model's max_position_embeddings or has no context.
    """
    text, limit = loaded.need_text(), loaded.model.max_position_embeddings
    encoded = [encode(question, text) for question in questions]
    for question, (rows, _) in zip(questions, encoded, strict=True):
        longest = max(map(len, rows))
        if longest > limit:
            raise InputError(
                f"{question.place}: context and choice are {longest} tokens; the model's max_position_embeddings is "
                f"{limit}: shorten the context"
            )
    found: Iterator[torch.Tensor] = log_likelihoods(loaded.net, (row for rows, _ in encoded for row in rows))
    scores = []
    for rows, given in encoded:
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
