"""What a GPU runs, run on the CPU (tests/shared/played_gpu.py): tensors are where a GPU wants them, numbers as ever.

A GPU that is played has no kernels of its own, no NCCL and no Transformer Engine: tests/gpu asks a real one for those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import played_ranks
import pytest
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset
from played_gpu import played

from perilune.parallel.workers import Workers
from perilune.pretrain import config as configs
from perilune.pretrain.parity import layouts
from perilune.pretrain.parity.matrix import Matrix
from perilune.pretrain.schema import Kernels

ALL = {case.name: case for case in layouts.matrix(2)}


@pytest.fixture(scope="module")
def players() -> Iterator[Workers]:
    """Processes that have never computed without the GPU."""
    with Workers(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def matrices(workers: Workers, players: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, Matrix]:
    """(of layouts on played GPUs, of what they are compared with)"""
    folder = tmp_path_factory.mktemp("played")
    return Matrix(players, folder), Matrix(workers, folder)


def test_what_a_gpu_refuses_is_refused(players: Workers) -> None:
    (found,) = players.run(1, played, played_ranks.refused)
    fine = [name for name, error in found.items() if not error]
    assert fine == [
        "rows by a CPU's numbers",
        "a number of the CPU's",
        "there and back",
        "made there",
        "copied",
        "NCCL on the GPU",
        "modules",
    ], found
    assert len(found) == len(fine) + 11


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("tp2 ep2", Kernels()),
        ("cp2 micro2", Kernels(rope="triton")),
        ("pp2 vpp2 micro2 (mtp2)", Kernels(swiglu="compiled")),
        ("tp2 micro2 (vlm)", Kernels()),
    ],
)
def test_a_layout_equals_one_process_on_the_cpu(name: str, kernels: Kernels, matrices: tuple[Matrix, Matrix]) -> None:
    """Losses, gradients, routing, biases and updates, by Megatron-core as it is shipped."""
    on_gpus, on_cpu = matrices
    case = ALL[name]
    on_gpus._one_rank[case.fixture, case.optimizer] = on_cpu.one_rank(case.fixture, case.optimizer)
    result = on_gpus.compare(case, played, played_ranks.trained_with, kernels)
    assert not result.failures, f"{result.deviations} {result.worst} {result.error}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = random_rows(packed_lengths(lognormal_lengths(90, median=40), 64), vocab_size=512)
    return write_dataset(folder / "packed", rows, 64, 512)


@pytest.mark.parametrize(("compute", "optimizer", "apart"), [("bf16", "adamw", 1e-2), ("fp32", "muon", 1e-4)])
def test_a_run_saved_in_the_background_validated_continued_and_asked(
    compute: str, optimizer: str, apart: float, workers: Workers, players: Workers, data: Path, tmp_path: Path
) -> None:
    words = [f"data.path={data}", f"valid.path={data}", f"precision.compute={compute}", f"optim.name={optimizer}",
             "train.global_batch_size=4", "data.workers=0", "train.async_save=true", "valid.every=2", "valid.steps=2",
             "schedule.lr=constant"]  # fmt: skip
    runs = [configs.resolve("tiny", [*words, f"train.steps={steps}"]) for steps in (2, 4)]
    prompts = [[5, 6, 7, 8], [9, 3]]
    told: dict[str, Any] = {}
    for name, pool, how in (("cpu", workers, ()), ("gpu", players, (played,))):
        folder = tmp_path / name
        folder.mkdir()
        configs.save(runs[-1], folder / "config.yaml")
        pool.run(1, *how, played_ranks.training, runs, folder)
        ((likely, tokens),) = pool.run(1, *how, played_ranks.asked, folder, prompts)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        told[name] = lines, likely, tokens
    (lines, likely, tokens), (want, as_likely, as_tokens) = told["gpu"], told["cpu"]
    assert [line.get("step") for line in lines] == [line.get("step") for line in want] and len(lines) >= 4
    for key in ("loss", "valid_loss", "grad_norm"):
        got, expected = ([line[key] for line in some if key in line] for some in (lines, want))
        assert got == pytest.approx(expected, rel=apart) and got, key
    for row, as_row in zip(likely, as_likely, strict=True):
        assert row == pytest.approx(as_row, rel=apart)
    assert compute != "fp32" or tokens == as_tokens
