"""Data that a run cannot use are refused by the command, before a process of it starts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from perilune.pretrain.data import storage
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config, Data, Model, Valid
from perilune.pretrain.train_command import check_data_if_seen, ready

MODEL = Model(vocab_size=512)


def test_a_validation_set_of_another_tokenizer(packed: Path, corpus: str, tmp_path: Path) -> None:
    pack([corpus], tmp_path / "other", train_tokenizer([corpus], tmp_path / "tok", 300), 64)
    data = Data(path=str(packed), seq_len=64)
    check_data_if_seen(ready(Config(model=MODEL, data=data, valid=Valid(path=str(packed), every=5))))
    with pytest.raises(InputError, match=r"other: packed with tokenizer \w+, the training data with \w+; pack both"):
        check_data_if_seen(ready(Config(model=MODEL, data=data, valid=Valid(path=str(tmp_path / "other"), every=5))))


def test_one_folder_twice_in_a_blend(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(packed)
    monkeypatch.chdir(packed.parent)
    for again in (f"{packed}/", packed.name, str(tmp_path / "link")):
        with pytest.raises(InputError, match=rf"{packed} and {again} are both {packed}; name it once"):
            ready(Config(data=Data(blend={str(packed): 0.5, again: 0.3})))
    blend = {packed.name: 0.5, "s3://bucket/a": 0.3, "s3://bucket/a/": 0.1}
    assert ready(Config(data=Data(blend=blend))).data.blend == {
        str(packed.resolve()): 0.5,
        "s3://bucket/a": 0.3,
        "s3://bucket/a/": 0.1,
    }


def test_an_address_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own processes would wait for the store for minutes."""
    monkeypatch.setattr(storage, "FIRST_RETRY_S", 0.3)
    data = Data(path="http://no-such-host.invalid/packed", retry_s=30.0)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"no-such-host.invalid/.*json cannot be read: .*address is right"):
        check_data_if_seen(Config(data=data, valid=Valid(every=0)))
    assert time.monotonic() - began < 15
