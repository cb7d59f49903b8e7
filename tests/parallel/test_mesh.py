"""Degrees that fit, and errors that print every number of those that do not."""

import pytest

from perilune.parallel.mesh import LayoutError, Mesh


def test_data_parallel_ranks_are_what_remains() -> None:
    mesh = Mesh(world=2048, tp=1, pp=16, ep=64)  # DeepSeek-V3, arXiv 2412.19437 section 3.2
    assert (mesh.dp, mesh.expert_dp) == (128, 2)
    assert Mesh(world=16, tp=4, pp=2, ep=2, etp=2).expert_dp == 2


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"world": 6, "tp": 4}, ["tp*pp*cp = 4*1*1 = 4", "6 processes", "4 or 8", "tp=3 or 6"]),
        ({"world": 2048, "tp": 5}, ["2048 processes", "2045 or 2050", "tp=4 or 8"]),
        ({"world": 1024, "tp": 3, "cp": 2}, ["3*1*2 = 6", "tp=2 or 4"]),
        ({"world": 4, "ep": 3}, ["etp*ep*pp = 1*3*1 = 3", "ep=2 or 4"]),
        ({"world": 4, "etp": 3}, ["3*1*1 = 3", "etp=2 or 4"]),
        ({"world": 4, "ep": 2, "etp": 8}, ["8*2*1 = 16", "etp=2"]),
        ({"world": 4, "ep": 3, "etp": 3}, ["3*3*1 = 9", "no single one"]),
        ({"world": 10**18 + 1, "tp": 10}, ["tp*pp*cp = 10*1*1", "tp=1 or 101"]),
        ({"world": 4, "vpp": 2}, ["parallel.vpp=2", "parallel.pp"]),
        ({"world": 4, "tp": 0}, ["parallel.tp=0", "at least 1"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(degrees: dict[str, int], words: list[str]) -> None:
    with pytest.raises(LayoutError) as refused:
        Mesh(**degrees)
    for word in words:
        assert word in str(refused.value)
