"""Likelihoods against transformers' log-softmax; task files, good and bad."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate_ranks as ranks
import pytest
import torch
from click.testing import CliRunner

from perilune.parallel.workers import Workers
from perilune.pretrain.cli import main
from perilune.pretrain.data.tokenizer import load_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.asked import Question, encode, read_tasks
from perilune.pretrain.evaluate.choices import accuracies
from perilune.pretrain.evaluate.described import Text

GOOD = {"task": "t", "context": "The Moon", "choices": [" a", " b"], "answer": 1}
QUESTIONS = [
    Question("f:1", "moons", "The Moon's nearest", (" point", " perilune is", " 漢字"), 0),
    Question("f:2", "moons", "9 moons, ", ("81 craters", "return"), 0),  # white space that goes to the choices
    Question("f:3", "code", "def perilune(a: float, e: float) -> float:\n", ("    return a", "for e in"), 0),
]


def log_softmax_sum(net: Any, ids: list[int], given: int) -> float:
    with torch.no_grad():
        logs = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logs[at - 1, ids[at]] for at in range(given, len(ids))))


def test_log_likelihoods_equal_transformers(
    hf: Callable[[str], Path], workers: Workers, transformers_model: Callable[[Path], Any]
) -> None:
    """Documents packed into several forward passes; the MTP layer of the folder is not in the way."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (2, 30, 9, 41, 5)]
    ours = workers.run(1, ranks.log_likelihoods, hf("MTP 1"), rows, 45)[0]
    net = transformers_model(hf("MTP 1"))
    for row, values in zip(rows, ours, strict=True):
        assert values.shape == (len(row) - 1,)
        assert float(values.sum()) == pytest.approx(log_softmax_sum(net, row, 1), abs=1e-4)
        assert float(values[-1]) == pytest.approx(log_softmax_sum(net, row, len(row) - 1), abs=2e-5)


def test_choices_equal_transformers(
    hf: Callable[[str], Path],
    workers: Workers,
    transformers_model: Callable[[Path], Any],
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    """Tokens by transformers' tokenizer too: of the whole text, less those of the context without its last blanks."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "hf"
    shutil.copytree(hf("plain"), folder)
    for file in tokenizer_path.iterdir():
        shutil.copy(file, folder)
    scores = workers.run(1, ranks.scores, folder, QUESTIONS)[0]
    net, tokenizer = transformers_model(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for question, ours in zip(QUESTIONS, scores, strict=True):
        given = len(tokenizer(question.context.rstrip())["input_ids"])
        for choice, value in zip(question.choices, ours, strict=True):
            ids = tokenizer(question.context + choice)["input_ids"]
            assert value == pytest.approx(log_softmax_sum(net, ids, given), abs=1e-4)


def test_accuracy_raw_and_by_byte() -> None:
    """Eight questions whose first choice is right; the long choice wins by byte only."""
    questions = [Question(f"f:{n}", "t", "x", (" long answer", " b"), 0) for n in range(8)]
    scores = [[-1.0, -2.0]] * 2 + [[-5.0, -4.0]] * 5 + [[-90.0, -1.0]]
    found = accuracies(questions, scores)["t"]
    assert (found.questions, found.raw, found.by_byte) == (8, 2 / 8, 7 / 8)
    for part, error in ((found.raw, found.raw_stderr), (found.by_byte, found.by_byte_stderr)):
        right = torch.tensor([1.0] * round(8 * part) + [0.0] * round(8 * (1 - part)))
        assert error == pytest.approx(float(right.std()) / math.sqrt(8))
    assert accuracies(questions[:1], [[0.0, -1.0]])["t"].raw_stderr is None
    assert [*accuracies([*questions, QUESTIONS[2]], [*scores, [0.0, -1.0]])] == ["t", "code"]


def test_choices_part_from_the_context_at_one_token(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = Text(tokenizer, (), frozenset({tokenizer.eos_id}))
    # "perilu" + "ne" is one text: where its tokens span the seam, they are the choice's.
    rows, given = encode(Question("f:1", "t", "the perilu", ("ne", "x"), 0), text)
    assert [tokenizer.decode(row) for row in rows] == ["the perilune", "the perilux"]
    assert rows[0][:given] == rows[1][:given] and 1 <= given < min(map(len, rows))
    with_bos = Text(tokenizer, (0,), frozenset())
    assert encode(Question("f:1", "t", "", ("a", "b"), 0), with_bos)[1] == 1
    for context in ("", " \n"):
        with pytest.raises(InputError, match=r"^f:1: context is .* predicted from nothing$"):
            encode(Question("f:1", "t", context, ("a", "b"), 0), text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not a line of JSON"),
        (b"\xff", "is not a line of JSON"),
        (b"[" * 100_000, "is not a line of JSON"),
        (b"[1]", "a list; a line is an object with exactly task, context, choices, answer"),
        ({"task": "t", "context": "x", "choices": [" a", " b"]}, "'choices', 'context', 'task'"),
        (GOOD | {"anwser": 1}, "with exactly task, context, choices, answer"),
        (GOOD | {"task": ""}, "task is ''; it must be a name"),
        (GOOD | {"task": 3}, "task is 3; it must be of type str"),
        (GOOD | {"context": None}, "context is None; it must be of type str"),
        (GOOD | {"choices": "ab"}, "choices is 'ab'; it must be of type list"),
        (GOOD | {"choices": ["a"]}, "choices is ['a']; it must hold two or more strings"),
        (GOOD | {"choices": ["a", ""]}, "none of them empty"),
        (GOOD | {"choices": ["a", 1]}, "choices is ['a', 1]; it must hold two or more strings"),
        (GOOD | {"answer": 2}, "answer is 2; it must be from 0 to 1"),
        (GOOD | {"answer": -1}, "answer is -1; it must be from 0 to 1"),
        (GOOD | {"answer": True}, "answer is True; it must be of type int"),
        (GOOD | {"answer": 1.0}, "answer is 1.0; it must be of type int"),
        (GOOD | {"context": "\ud800"}, "holds half a surrogate pair"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "tasks.jsonl"
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(InputError) as caught:
        read_tasks(file)
    assert str(caught.value).startswith(f"{file}:3: ") and message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_good_file_and_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"answer": 0}) + "\n")
    assert [(question.place, question.answer) for question in read_tasks(file)] == [(f"{file}:1", 1), (f"{file}:3", 0)]
    file.write_text("\n")
    with pytest.raises(InputError, match="no line holds a question"):
        read_tasks(file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "--prompt", ""], "--prompt '': the first token is predicted from nothing; give some text"),
        (["generate", "--prompt", "moon", "--max-new-tokens", "128"], "max_position_embeddings 128; ask for fewer"),
        (["generate", "--prompt", "moon", "--image", "tasks.jsonl"], "without a vision tower: it sees no image"),
        (["eval", "--tasks", "tasks.jsonl"], "max_position_embeddings is 128: shorten the context"),
        (["eval", "--data", "."], "not a packed dataset"),
    ],
)
def test_what_a_model_cannot_be_asked_is_told_before_it_is_loaded(
    hf: Callable[[str], Path], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("tasks.jsonl").write_text(json.dumps(GOOD | {"context": "Moon. " * 200}) + "\n")
    monkeypatch.setitem(sys.modules, "perilune.pretrain.evaluate.load", None)  # importing it raises
    command, *more = words
    done = CliRunner().invoke(main, [command, str(hf("plain")), "--tokenizer", str(tokenizer_path), *more])
    assert done.exit_code == 2 and says in done.stderr, done.output
