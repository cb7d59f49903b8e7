"""What `perilune eval` is asked: questions and classes from JSON Lines files, a line each.

Nothing of torch: a line that breaks the form, or a question that the model cannot be asked, is told at once.

One line is one question:

    {"task": "capitals", "context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

Context and choice are one text, encoded together; the context's part are as many tokens as it has alone, and white
space at its end goes to the choices, since tokens begin with it (both as the harness has it). Where a token spans the
seam and the texts of a question part before that, the choices' part begins there: for all of them at the same token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.described import Described, Text

_KEYS = {"task": str, "context": str, "choices": list, "answer": int}
_MAX_LINE_BYTES = 1 << 26
_MAX_CLASS_BYTES = 1 << 20
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
class Class:
    """A line of a file of classes: what captions call it, and the texts that it is recognised by."""

    label: str
    prompts: tuple[str, ...]


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


def encoded(about: Described, questions: Sequence[Question]) -> list[tuple[list[list[int]], int]]:
    """Each question as `encode` has it.

    Raises InputError for one that is longer than the model's max_position_embeddings or has no context.
    """
    text, limit = about.need_text(), about.model.max_position_embeddings
    found = [encode(question, text) for question in questions]
    for question, (rows, _) in zip(questions, found, strict=True):
        longest = max(map(len, rows))
        if longest > limit:
            raise InputError(
                f"{question.place}: context and choice are {longest} tokens; the model's max_position_embeddings is "
                f"{limit}: shorten the context"
            )
    return found


def read_classes(path: Path) -> list[Class]:
    """The classes of a file of JSON lines. Raises InputError naming file, line and rule where one breaks the form."""
    classes: dict[str, Class] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_MAX_CLASS_BYTES), b""), start=1):
            if line.isspace():
                continue
            found = _class(line, f"{path}:{number}")
            if found.label in classes:
                raise InputError(f"{path}:{number}: label {found.label[:60]!r} is there twice; join its prompts")
            classes[found.label] = found
    if len(classes) < 2:
        raise InputError(f"{path}: {len(classes)} classes; to choose, there must be two or more")
    return list(classes.values())


def _class(line: bytes, place: str) -> Class:
    rule = 'a line is {"label": "...", "prompts": ["...", ...]}, no text of it empty'
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not a line of JSON: {error}; {rule}") from error
    match value:
        case {"label": str(label), "prompts": [*prompts], **rest} if not rest and prompts:
            texts = [label.strip(), *prompts]
            if all(isinstance(text, str) and text.strip() for text in texts):
                if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                    raise InputError(f"{place}: half a surrogate pair is not Unicode text")
                return Class(texts[0], tuple(prompts))
    raise InputError(f"{place}: {line[:60]!r}; {rule}")
