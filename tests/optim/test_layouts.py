"""Part of Muon in `perilune parity`: in every layout the weights move as one rank's. The rest runs there."""

from __future__ import annotations

import pytest

from perilune.parallel.workers import Workers
from perilune.pretrain.parity import layouts
from perilune.pretrain.parity.matrix import Matrix

ALL = {case.name: case for case in layouts.matrix(8) if case.optimizer == "muon"}
HERE = """
dp2 micro2 muon
tp2 micro2 muon
pp2 micro2 muon
cp2 micro2 muon
dp2 ep2 micro2 muon
dp2 etp2 micro2 muon
tp2 micro2 muon (vlm)
dp4 etp2 micro2 muon
""".strip().splitlines()


@pytest.fixture(scope="module")
def matrix(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(workers, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("name", HERE)
def test_a_layout_takes_the_update_of_one_rank(name: str, matrix: Matrix) -> None:
    case = ALL[name]
    result = matrix.compare(case)
    assert not result.failures, f"{result.deviations} {result.worst} {result.error}"
    rms = [step.update_rms for step in matrix.one_rank(case.fixture, "muon").trained.steps]
    assert all(one is not None and 0.15 < one < 0.22 for one in rms)
