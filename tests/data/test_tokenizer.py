"""The tokenizer: what transformers makes of the folder, exact round trips, the same bytes from every training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from perilune.pretrain.data import tokenizer as module
from perilune.pretrain.data.tokenizer import SPECIAL, Tokenizer, load_tokenizer, train_tokenizer
from perilune.pretrain.errors import InputError

TRAIN = (
    "import sys; from pathlib import Path; from perilune.pretrain.data.tokenizer import train_tokenizer;"
    "train_tokenizer([sys.argv[1]], Path(sys.argv[2]), 400)"
)
# any text that UTF-8 can hold
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def test_transformers_loads_it_and_agrees(tokenizer_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    stock = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    assert (len(stock), stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (400, 0, 1, 2)
    assert stock.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert set(stock.all_special_tokens) == set(SPECIAL)
    for text, ids in zip(texts[:50], tokenizer.encode_batch(texts[:50]), strict=True):
        assert stock.decode(stock.encode(text)) == text
        assert stock.encode(text, split_special_tokens=True) == ids.tolist()


def test_added_tokens_that_are_not_special_are_matched_as_transformers_does(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    """As DeepSeek-V3's `<think>`; what it calls special stays text. One that would take a space along is refused."""
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tokenizer_path, tmp_path / "tok")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([AddedToken("<think>", special=False), AddedToken("<strip>", special=False, lstrip=True)])
    inner.add_special_tokens([AddedToken("<|user|>", special=True)])
    inner.save(str(folder / "tokenizer.json"))
    stock, ours = PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    for text in ("a <think> orbit", "<think></think>\n<think>", "x<strip> y <|user|> <|eos|> z"):
        ids = ours.encode_batch([text])[0].tolist()
        assert ids == stock.encode(text, add_special_tokens=False, split_special_tokens=True) and max(ids) >= 400
        assert ours.decode(ids) == text
    with pytest.raises(InputError, match="this tokenizer alters text"):
        ours.encode_batch(["x <strip> y"])


@settings(deadline=None, max_examples=300)
@given(st.one_of(any_text, st.lists(st.sampled_from([*SPECIAL, " ", "\n", "\r", "a", "é", "1"])).map("".join)))
def test_round_trip_is_exact_and_text_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text
    assert not ids.size or ids.min() >= len(SPECIAL)
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


def test_two_processes_train_the_same_bytes(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    subprocess.run([sys.executable, "-c", TRAIN, corpus, str(tmp_path / "again")], check=True, timeout=60)
    for path in tokenizer_path.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert load_tokenizer(tmp_path / "again").fingerprint == load_tokenizer(tokenizer_path).fingerprint


def test_a_long_text_is_encoded_in_parts_that_change_nothing(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join("    " * (i % 4) + f"(x_{i} +  1)\n" * (i % 3) + " \n\r\n\t\n" * (i % 2) for i in range(300))
    long = "\n".join(texts) + code
    assert len(long) > 10 * 3000
    whole = tokenizer.encode_batch([long])[0].tolist()
    monkeypatch.setattr(module, "LONG_TEXT", 3000)
    assert tokenizer.encode_batch([long])[0].tolist() == whole
    no_newline = "ab" * 5000
    assert tokenizer.decode(tokenizer.encode_batch([no_newline])[0]) == no_newline


def test_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    recipe = (train_tokenizer(["demo:stdlib"], tmp_path / "tok", 300) / "training.json").read_text()
    valid = [f.name for f in module.data_sources.find_files(["demo:stdlib"]) if f.split == "valid"]
    assert valid and "stdlib/" in recipe
    assert not [name for name in valid if f'"{name}"' in recipe]


@pytest.mark.parametrize(("normalizer", "text"), [("Lowercase", "a Moon"), ("NFC", "\uf900")])
def test_a_normalizer_that_changes_text_is_told_though_the_bytes_are_as_many(
    tmp_path: Path, tokenizer_path: Path, normalizer: str, text: str
) -> None:
    path = shutil.copytree(tokenizer_path, tmp_path / "tok")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": normalizer}}))
    coder = load_tokenizer(path)
    assert coder.decode(coder.encode_batch(["a moon, naïve"])[0]) == "a moon, naïve"
    with pytest.raises(InputError, match="its normalizer changes the text"):
        coder.encode_batch(["a moon", text])


def test_refusals(tmp_path: Path, corpus: str, tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match="need 266 or more"):
        train_tokenizer([corpus], tmp_path / "t", 265)
    with pytest.raises(InputError, match="fills only"):
        train_tokenizer([corpus], tmp_path / "t", 1_000_000)
    with pytest.raises(InputError, match="another --out"):
        train_tokenizer([corpus], tokenizer_path, 401)
    before = (tokenizer_path / "tokenizer.json").stat().st_mtime_ns
    train_tokenizer([corpus], tokenizer_path, 400)
    assert (tokenizer_path / "tokenizer.json").stat().st_mtime_ns == before, "the same recipe leaves it as it is"
    damaged = shutil.copytree(tokenizer_path, tmp_path / "damaged")
    (damaged / "training.json").write_text("{")
    with pytest.raises(InputError, match="another --out"):
        train_tokenizer([corpus], damaged, 400)
    with pytest.raises(InputError, match="missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
