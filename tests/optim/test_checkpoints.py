"""Muon's state in checkpoints: bitwise on resume, and in any other layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_ranks
import optim_ranks as ranks
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from perilune.parallel.workers import Workers

MOMENTUM, FIRST = "optimizer.state.momentum_buffer.", "optimizer.state.exp_avg."


def tensors_of(path: Path, out: Path) -> dict[str, torch.Tensor]:
    """The whole global tensors of a checkpoint, put together by torch's own tool."""
    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=True)


def test_stopped_and_resumed_equals_straight_on_bitwise(workers: Workers, tmp_path: Path) -> None:
    configs = [ranks.config_of("bf16", ep=2), ranks.config_of("fp32", tp=2, zero1=False)]
    for results in workers.run(2, checkpoint_ranks.straight_and_resumed, configs, tmp_path):
        for config, result in zip(configs, results, strict=True):
            assert result["resumed"] == result["straight"], config.parallel
            at_2, at_4 = result["straight"]["at 2"], result["straight"]["at 4"]
            assert {"weights", "masters", "momentum_buffer", "exp_avg_sq", "step"} <= at_4.keys()
            assert all(at_2[key] != value for key, value in at_4.items())


@pytest.fixture(scope="module")
def by_two(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bf16 run of two data-parallel ranks."""
    return workers.run(2, ranks.saved, ranks.config_of("bf16"), tmp_path_factory.mktemp("two"))[0]


def test_two_ranks_state_is_one_s(by_two: dict[str, Any], workers: Workers, tmp_path: Path) -> None:
    expected = tensors_of(by_two["path"], tmp_path / "source.pt")
    momenta = {name.removeprefix(MOMENTUM) for name in expected if name.startswith(MOMENTUM)}
    firsts = {name.removeprefix(FIRST) for name in expected if name.startswith(FIRST)}
    trained = {name for name in expected if not name.startswith("optimizer.") and "expert_bias" not in name}
    assert momenta | firsts == trained and not momenta & firsts
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= firsts
    assert "decoder.layers.1.mlp.router.weight" in momenta
    configs = [ranks.config_of("bf16"), ranks.config_of("bf16", zero1=False)]
    for again in workers.run(1, checkpoint_ranks.load_and_save_again, configs, by_two["path"], tmp_path)[0]:
        found = tensors_of(again["path"], tmp_path / "again.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again["loss"] == pytest.approx(by_two["loss"], rel=1e-3)


def test_one_rank_s_state_is_split_by_tensor_parallelism(workers: Workers, tmp_path: Path) -> None:
    one = workers.run(1, ranks.saved, ranks.config_of("fp32"), tmp_path / "one")[0]
    expected = tensors_of(one["path"], tmp_path / "one.pt")
    configs = [ranks.config_of("fp32", tp=2, etp=2)]
    for again in workers.run(2, checkpoint_ranks.load_and_save_again, configs, one["path"], tmp_path)[0]:
        found = tensors_of(again["path"], tmp_path / "again.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_another_optimizer_s_run_is_not_resumed(by_two: dict[str, Any], workers: Workers) -> None:
    for said in workers.run(1, ranks.refused, checkpoint_ranks.config_of("bf16"), by_two["path"]):
        assert "momentum_buffer" in said and "optim.name" in said
