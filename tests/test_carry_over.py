"""What a stage takes over from those before it, bit by bit, and what begins anew."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import carry_ranks as ranks
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from perilune.parallel.workers import Workers
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.rules import part_of
from perilune.pretrain.start import Start, checkpoint_at

ROWS = {"text": 20, "vit": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("carry")
    (folder / "a.txt").write_text(" ".join(f"orbit {n * n}" for n in range(900)))
    tokenizer = train_tokenizer([str(folder / "a.txt")], folder / "tok", 300)
    pack([str(folder / "a.txt")], folder / "packed", tokenizer, 64)
    return folder / "packed"


@pytest.fixture(scope="module")
def sources(workers: Workers, tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Runs of one process: text (fp32 and bf16), vision stage (both)."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        f"{stage} {compute}": workers.run(
            1, ranks.save_new, ranks.config_of(stage, compute), folder / stage / compute, step, data, ROWS[stage]
        )[0]
        for stage, step in (("text", 9), ("vit", 4))
        for compute in ("fp32", "bf16")
    }


def tensors_of(path: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The whole global tensors of a checkpoint, put together by torch's own tool, which knows nothing of layouts."""
    out = tmp_path / "whole.pt"
    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=True)


def weight_of(key: str) -> str:
    return key.split(".", 3)[3] if key.startswith("optimizer.state.") else key


@pytest.mark.parametrize(
    ("compute", "parallel"),
    [("fp32", {"ep": 2}), ("bf16", {"tp": 2}), ("bf16", {"pp": 2}), ("bf16", {"ep": 2, "zero1": False})],
)
def test_each_part_goes_on_bit_by_bit_or_begins_anew(
    workers: Workers, sources: dict[str, Path], data: Path, tmp_path: Path, compute: str, parallel: dict[str, Any]
) -> None:
    config = ranks.config_of("joint", compute, **parallel)
    text, vit = sources[f"text {compute}"], sources[f"vit {compute}"]
    found = workers.run(2, ranks.take_over, config, [vit, text], data, tmp_path / "out")[0]
    fresh = workers.run(2, ranks.save_new, config, tmp_path / "fresh", 1, data, 0)[0]
    got, new = tensors_of(found["path"], tmp_path), tensors_of(fresh, tmp_path)
    before = {"vision_tower": tensors_of(vit, tmp_path), "language_model": tensors_of(text, tmp_path)}
    assert got.keys() == new.keys()
    counted = dict.fromkeys(("vision_tower", "language_model", "multi_modal_projector"), 0)
    for key, value in got.items():
        part = part_of(weight_of(key))
        counted[part] += 1
        if part in before:
            expected = before[part][key]
            assert key.startswith("optimizer.") or value.ndim < 2 or not value.equal(new[key]), key
        elif not key.startswith("optimizer."):
            expected = new[key]
        elif key.startswith("optimizer.state.param."):
            expected = new[weight_of(key)].float()
        else:
            expected = torch.zeros_like(value)
        assert value.dtype == expected.dtype and value.equal(expected), key
    assert min(counted.values()) > 3
    assert any("moments from zero: multi_modal_projector" in line for line in found["told"])
    assert any("Adam counts on from 9" in line for line in found["told"])


def test_data_and_history_go_on(workers: Workers, sources: dict[str, Path], data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"  # the same content at another place
    shutil.copytree(data, copied)
    config = ranks.config_of("joint", ep=2)
    found = workers.run(
        2, ranks.take_over, config, [sources["vit fp32"], sources["text fp32"]], copied, tmp_path / "out"
    )[0]
    assert found["state"].earlier == {str(copied): max(ROWS.values())}
    assert (found["state"].samples, found["state"].tokens) == (0, 0)
    assert found["ids"] == ranks.rows_from(data, max(ROWS.values()), 4) != ranks.rows_from(data, 0, 4)
    assert [(one["stage"], one["step"], one["tokens"]) for one in found["history"]] == [
        ("vit", 4, 64 * ROWS["vit"]),
        ("text", 9, 64 * ROWS["text"]),
    ]
    # A stage after that one knows all of them, and reads on where they together were.
    third = workers.run(1, ranks.take_over, ranks.config_of("joint"), [found["path"]], data, tmp_path / "third")[0]
    assert [one["stage"] for one in third["history"]] == ["vit", "text", "joint"]
    assert third["state"].earlier == {str(data): max(ROWS.values())}
    # In the order of another seed that place means nothing: begun there, rows that nobody read would be left out.
    joint = ranks.config_of("joint")
    other = replace(joint, train=replace(joint.train, seed=2))
    anew = workers.run(1, ranks.take_over, other, [found["path"]], data, tmp_path / "anew")[0]
    assert anew["state"].earlier == {str(data): 0}
    said = f"the {max(ROWS.values())} rows that {found['path']} read in the order of train.seed=1 may come again"
    assert any(f"{data}: {said}" in line and "train.seed=2 is another order" in line for line in anew["told"])


@pytest.mark.parametrize("zero1", [True, False])
def test_a_master_of_another_run_gives_way_to_the_weight(
    workers: Workers, sources: dict[str, Path], data: Path, tmp_path: Path, zero1: bool
) -> None:
    config = ranks.config_of("text", "bf16", zero1=zero1)
    other = replace(config, train=replace(config.train, seed=11))
    weights_only = workers.run(1, ranks.save_new, other, tmp_path / "other", 2, data, 0, False)[0]
    found = workers.run(1, ranks.take_over, config, [sources["text bf16"], weights_only], data, tmp_path / "out")[0]
    got, last, first = (tensors_of(path, tmp_path) for path in (found["path"], weights_only, sources["text bf16"]))
    for key, value in got.items():
        if key.startswith("optimizer.state.param."):
            assert value.to(torch.bfloat16).equal(last[weight_of(key)].to(torch.bfloat16)), key
        else:
            assert value.equal((first if key.startswith("optimizer.") else last)[key]), key


def test_the_last_named_wins_and_what_fits_nothing_is_refused(
    workers: Workers, sources: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = ranks.config_of("text")
    other = replace(config, train=replace(config.train, seed=11))
    weights_only = workers.run(1, ranks.save_new, other, tmp_path / "other", 2, data, 0, False)[0]
    order = [sources["text fp32"], weights_only]
    found = workers.run(1, ranks.take_over, config, order, data, tmp_path / "out")[0]
    got, last, moments = (tensors_of(path, tmp_path) for path in (found["path"], weights_only, order[0]))
    for key, value in got.items():
        assert value.equal((moments if key.startswith("optimizer.") else last)[key]), key
    wide = replace(config, model=replace(config.model, hidden_size=32))
    error = workers.run(1, ranks.take_over, wide, [sources["text fp32"]], data, tmp_path / "wide")[0]["error"]
    assert "no part of this model is whole in it" in error and "language_model" in error and "[64" in error


def test_start_is_checked_before_a_process_starts(sources: dict[str, Path], tmp_path: Path) -> None:
    path = sources["text fp32"]
    Start(after=(path,)).check()
    assert checkpoint_at(path) == path
    with pytest.raises(InputError, match="neither a checkpoint nor a run"):
        Start(after=(tmp_path,)).check()
    with pytest.raises(InputError, match="give one of both"):
        Start(path, (path,)).check()
    assert Start(after=(path, path)).words() == ["--after", str(path), "--after", str(path)]
