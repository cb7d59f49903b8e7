"""Models that see: decoding with images, captions right and wrong, and the two commands on a run."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import caption_ranks as ranks
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perilune.parallel.workers import Workers
from perilune.pretrain.data.demo_glyphs import Picture, draw
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.tokenizer import load_tokenizer, train_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate import captions
from perilune.pretrain.evaluate.asked import read_classes
from perilune.pretrain.evaluate.pairs import Features, retrieval
from perilune.pretrain.hf.export import export
from perilune.vision.contrastive import unit

SEQ_LEN, VOCAB = 128, 290
TEXTS = {"A": "CAPITAL A", "Ω": "OMEGA", "♥": "HEART", "7": "SEVEN"}


@dataclass(frozen=True)
class Learnt:
    """A run that knows its data by heart."""

    run: Path
    home: Path  # of 0.png to 3.png
    data: Path
    loss: float
    bits: float


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Learnt:
    """Four images with their texts, two of them in one document."""
    home = tmp_path_factory.mktemp("glyphs")
    for number, character in enumerate(TEXTS):
        picture = Picture(character, "", "DejaVuSans-Bold", 56, 56, 1.0, 0.5, 0.5, (0, 0, 0), (255, 255, 255))
        (home / f"{number}.png").write_bytes(draw(picture))
    a, b, c, d = TEXTS.values()
    documents = [[(0, a)], [(1, b)], [(2, c + "\n"), (3, d)]]
    lines = [
        {"parts": [part for n, text in document for part in ({"image": f"{n}.png"}, {"text": text})]}
        for document in documents
    ]
    (home / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "words.jsonl").write_text(json.dumps({"text": " ".join([*TEXTS.values(), "image"] * 2)}) + "\n")
    train_tokenizer([str(home / "words.jsonl")], home / "tok", VOCAB)
    pack([str(home / "pairs.jsonl")], home / "packed", home / "tok", SEQ_LEN, patch_limit=1000)
    loss, bits = workers.run(1, ranks.learn, home / "run", home / "packed", VOCAB, SEQ_LEN)[0]
    return Learnt(home / "run", home, home / "packed", loss, bits)


def test_what_is_asked(learnt: Learnt) -> None:
    """Each text after its image, with all that stands before it in its document and no other."""
    dataset, tokenizer = PackedDataset(learnt.data), load_tokenizer(learnt.home / "tok")
    found = captions.find(dataset, tokenizer, 100)
    assert sorted(caption.text for caption in found) == sorted(TEXTS.values())
    assert captions.find(dataset, tokenizer, 3) == found[:3]
    for caption in found:
        before = tokenizer.decode(dataset[caption.row].tokens[caption.begin : caption.start])
        assert before.startswith("<|media_start|>image<|media_content|>") and before.endswith("<|media_end|>")
        assert before.count("<|media_start|>") == caption.image - caption.first + 1 == 1 + (caption.text == "SEVEN")
        assert ("HEART\n" in before) == (caption.text == "SEVEN")
    dataset.close()


COMMANDS = """
import json, sys
from perilune.pretrain.cli import main
for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
"""


def test_commands(learnt: Learnt) -> None:
    """All right with the images, not without; the marks around images are those that packing writes."""
    one, two = str(learnt.home / "0.png"), str(learnt.home / "3.png")
    run = str(learnt.run)
    words = [
        ["eval", run, "--json"],
        ["generate", run, "--image", one, "--json"],
        ["generate", run, "--image", str(learnt.home / "2.png"), "--image", two,
         "--prompt", "<image>HEART\n<image>", "--json"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result, first, second = (json.loads(text) for text in done.stdout.splitlines())
    assert result["validation"]["loss"] == pytest.approx(learnt.loss, rel=1e-5)
    assert result["validation"]["bits_per_byte"] == pytest.approx(learnt.bits, rel=1e-5)
    said = result["captions"]
    assert (said["captions"], said["exact_match_count"], said["exact_match"]) == (4, 4, 1.0)
    assert said["exact_match_blanked_count"] < 4
    assert result["retrieval"]["images"] == result["retrieval"]["texts"] == result["zero_shot"]["classes"] == 4
    assert result["zero_shot"]["accuracy"]["1"] == result["retrieval"]["image_to_text"]["1"] > 0.5
    assert first["text"] == "CAPITAL A" and first["ended"] and first["images"] == [one]
    assert second["text"] == "SEVEN" and second["ended"]
    dataset, tokenizer = PackedDataset(learnt.data), load_tokenizer(learnt.home / "tok")
    packed = {
        caption.text: dataset[caption.row].tokens[caption.begin : caption.start].tolist()
        for caption in captions.find(dataset, tokenizer, 9)
    }
    assert first["prompt_tokens"] == packed["CAPITAL A"] and second["prompt_tokens"] == packed["SEVEN"]
    dataset.close()
    board = EventAccumulator(str(learnt.run / "tensorboard" / "eval"), {"images": 0, "tensors": 0}).Reload()
    assert [(event.step, event.value) for event in board.Scalars("eval/exact_match")] == [(ranks.STEP, 1.0)]
    assert {f"eval/right/{number}" for number in range(4)} == set(board.Tags()["images"])
    assert b"CAPITAL A" in board.Tensors("eval/right/text_summary")[0].tensor_proto.string_val[0]
    figures, answers = sorted((learnt.run / "eval").iterdir(), key=lambda path: len(path.name))
    assert json.loads(figures.read_text()) == result
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["expected"] for line in lines} == set(TEXTS.values()) and all(line["right"] for line in lines)
    assert sum(line["blanked"] == line["expected"] for line in lines) == said["exact_match_blanked_count"]
    assert all(Image.open(io.BytesIO(base64.b64decode(line["png"]))).size == (56, 56) for line in lines)


@pytest.mark.parametrize("names", ["kimi_vl", "kimi_k25"])
def test_exports_say_the_same(learnt: Learnt, workers: Workers, tmp_path: Path, names: str) -> None:
    """Of a run that compares images with texts: what does so is left out, and the limit of patches goes along."""
    files = [learnt.home / f"{number}.png" for number in (0, 1)]
    said = ["CAPITAL A", "OMEGA"]
    assert workers.run(1, ranks.described, learnt.run, files)[0] == (said, 1000, True)
    export(learnt.run, tmp_path / "hf", names=names)
    assert workers.run(1, ranks.described, tmp_path / "hf", files)[0] == (said, 1000, False)


def test_pairs_are_those_of_training(learnt: Learnt, workers: Workers, tmp_path: Path) -> None:
    """Their features one by one give the recall that the batches' features give."""
    classes = tmp_path / "classes.jsonl"
    lines = [{"label": "HEART", "prompts": ["HEART\n", "HEART"]}, {"label": "SEVEN", "prompts": ["SEVEN"]},
             {"label": "MOON", "prompts": ["OMEGA"]}]  # fmt: skip
    classes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = workers.run(1, ranks.compared, learnt.run, learnt.data, classes)[0]
    mine = dict(zip((found.mine.texts[n] for n in found.mine.text_of_N), found.mine.images_ND, strict=True))
    texts = [text.removesuffix("<|eos|>").strip() for text in found.texts]
    assert sorted(texts) == sorted(mine) == sorted(TEXTS.values())
    for text, image, feature in zip(texts, found.images_BD, found.texts_BD, strict=True):
        torch.testing.assert_close(mine[text], image, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.mine.texts_MD[found.mine.texts.index(text)], feature, atol=1e-5, rtol=1e-4)
    nearest = (unit(found.images_BD) @ unit(found.texts_BD).T).argmax(1)
    result = retrieval(found.mine)
    assert result["image_to_text"]["1"] == float((nearest == torch.arange(4)).double().mean()) > 0.5
    assert result["image_to_text"]["5"] == result["text_to_image"]["5"] == 1.0
    assert (found.by_class["classes"], found.by_class["images"], found.by_class["left_out"]) == (3, 2, 2)
    assert found.by_class["accuracy"] == {"1": 1.0, "5": 1.0}


def test_equal_captions_are_one_text() -> None:
    """Three images, two of them of one text, which either of them answers."""
    axes = torch.eye(3)
    images = torch.stack((axes[0], axes[0] + 0.5 * axes[1], axes[2]))
    found = Features(images, torch.stack((axes[0], axes[1])), torch.tensor([0, 0, 1]), ("a", "b"))
    assert retrieval(found)["image_to_text"] == {"1": 2 / 3, "5": 1.0, "10": 1.0}
    assert retrieval(found)["text_to_image"]["1"] == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ('{"label": "a"}', "a line is"),
        ('{"label": "a", "prompts": []}', "a line is"),
        ('{"label": " ", "prompts": ["a"]}', "no text of it empty"),
        ('{"label": "a", "prompts": ["a", 1]}', "a line is"),
        ('{"label": "b", "prompts": ["\\ud800"]}', "half a surrogate pair"),
        ('{"label": "good", "prompts": ["a"]}', "is there twice"),
        ("\n", "1 classes; to choose"),
    ],
)
def test_bad_classes_are_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "classes.jsonl"
    file.write_text('{"label": "good", "prompts": ["a"]}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_classes(file)


def test_cache_equals_recomputation(learnt: Learnt, workers: Workers) -> None:
    """Two prompts of unlike length with two images each."""
    files = [learnt.home / "0.png", learnt.home / "1.png"]
    prompts = ["A <image> and, longer, <image> moons", "two"]
    asked = workers.run(1, ranks.asked, learnt.run, prompts, files)[0]
    more = [[70, 71, 72, 73], [80, 81, 90, 91]]
    cached, whole = workers.run(1, ranks.decoded_and_whole, learnt.run, asked, more)[0]
    assert cached.shape == whole.shape == (2, 5, VOCAB)
    assert float((cached - whole).abs().max()) < 5e-5 * float(whole.abs().max())


def test_refusals(learnt: Learnt, workers: Workers, hf: Callable[[str], Path]) -> None:
    said = workers.run(1, ranks.refusals, learnt.run, hf("plain"), learnt.home / "0.png")[0]
    expected = [
        "has 2 <image> for 3 --image; write one for each",
        "images among them, with --max-new-tokens 1 more than the model's max_position_embeddings",
        "caption_ranks.py: begins with",
        "is of a language model alone, without a vision tower",
    ]
    assert len(said) == len(expected)
    for message, part in zip(said, expected, strict=True):
        assert part in message
