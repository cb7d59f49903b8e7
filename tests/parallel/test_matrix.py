"""Part of the matrix that `perilune parity` runs: each axis, each variant, and products of up to eight processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perilune.parallel.workers import Workers
from perilune.pretrain.parity import fixture, layouts, pages, probe
from perilune.pretrain.parity.layouts import Case
from perilune.pretrain.parity.matrix import TOLERANCES, Matrix, Result, _update, deviations
from perilune.pretrain.schema import Parallel, Recompute

ALL = {case.name: case for case in layouts.matrix(8)}
LARGE = """
dp4 ep2 etp2 micro2
cp2 dp2
cp2 dp2 ep4 micro2
cp4 micro2
pp2 dp2 ep2 allgather micro2
pp2 cp2
pp4
pp4 Et|tt|t|mL
tp2 dp2 ep2 etp2
tp2 cp2 ep4 micro2 (yarn)
tp2 cp2 ep4 micro2 (vlm)
tp2 cp2 ep4 recompute full
tp2 pp2 ep2 allgather micro2
tp4 micro2
dp8 ep8
pp4 dp2 ep2
tp2 pp2 vpp2 cp2 ep2 micro2
pp2 cp2 dp2 ep2 etp2 micro2
""".strip().splitlines()
SMALL = [
    name
    for name, case in ALL.items()
    if case.world <= 2 and "recompute" not in name and case.optimizer == "adamw"  # Muon's are in tests/optim
]


@pytest.fixture(scope="module")
def matrix(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(workers, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_a_layout_equals_one_rank(name: str, matrix: Matrix) -> None:
    result = matrix.compare(ALL[name])
    assert not result.failures, f"{result.deviations} {result.worst} {result.error}"


def test_what_is_nan_or_missing_is_out_of_tolerance(matrix: Matrix) -> None:
    """Python's max passes over nan, and a shard that no rank holds is nan."""
    case = Case(1, fixture="no-mtp", micro_batch_size=fixture.ROWS)
    one = matrix.one_rank("no-mtp")
    whole = one.trained
    key = whole.gradients[5][0]

    def spoilt(pieces: list[probe.Piece], spoil: Callable[[np.ndarray], np.ndarray]) -> list[probe.Piece]:
        return [(k, shape, at, spoil(values) if k == key else values) for k, shape, at, values in pieces]

    nan = [replace(whole.steps[0]), replace(whole.steps[1]), replace(whole.steps[2], loss=math.nan)]
    damaged = {
        "": whole,
        "gradient": replace(whole, gradients=spoilt(whole.gradients, lambda values: values * math.nan)),
        "gradient ": replace(whole, gradients=spoilt(whole.gradients, lambda values: values[:1])),
        "gradient  ": replace(whole, gradients=[piece for piece in whole.gradients if piece[0] != key]),
        "update": replace(whole, weights=[piece for piece in whole.weights if piece[0] != key]),
        "update ": replace(whole, weights=spoilt(whole.weights, lambda values: np.nextafter(values, np.float32(9)))),
        "update replicas": replace(whole, weights=spoilt(whole.weights, lambda values: values * math.nan)),
        "biases": replace(whole, biases=[(k, s, at, v * math.nan) for k, s, at, v in whole.biases]),
        "loss": replace(whole, steps=nan),
        "counts": replace(whole, steps=[replace(step, load_LE=None) for step in whole.steps]),
    }
    for what, trained in damaged.items():
        found, worst = deviations(case, one, [trained])
        assert sorted(Result("", 1, 0.0, found, worst).failures) == sorted(what.split()), what


def test_rounding_is_forgiven_in_an_element_or_two_of_a_weight() -> None:
    start = torch.linspace(0.3, 0.4, 16)
    want = start + 4.5e-6  # as three steps do
    for away, kept in ((0, True), (1, True), (3, True), (4, False), (16, False)):
        got = want.clone()
        got[:away] = torch.nextafter(got[:away], torch.tensor(1.0))
        assert (_update(got, want, start) <= TOLERANCES["update"]) == kept, away
    got = want.clone()
    got[0] += 1e-7  # more than a digit
    assert _update(got, want, start) > TOLERANCES["update"]


def test_the_matrix_is_as_large_as_it_says() -> None:
    """Every axis, at every degree that eight processes have room for, and every variant of the model."""
    assert len(ALL) >= 200 and len(SMALL) + len(LARGE) >= 40
    parallel = [case.parallel for case in ALL.values()]
    for axis, most in {"tp": 8, "pp": 4, "vpp": 2, "cp": 8, "ep": 8, "etp": 8}.items():
        assert max(getattr(p, axis) for p in parallel) == most
    assert {case.fixture for case in ALL.values()} == set(fixture.NAMES)


def test_the_fixture_could_show_a_wrong_normaliser() -> None:
    """Counts differ between micro-batches and ranks, for the main loss and MTP, and so does their ratio."""
    batches = fixture.batches("mtp2", 1)
    counts = [batch.loss_mask.sum(-1) for batch in batches]
    assert any(float(count[0]) == 0 for count in counts)
    ratios = {round(float(count[1] / count[0]), 4) for count in counts if count[0] > 0}
    assert len(ratios) > 3
    halves = [sum(float(count[0]) for count in counts[rank::2]) for rank in range(2)]
    assert halves[0] != halves[1]


def test_a_margin_is_the_least_of_every_choice() -> None:
    model = replace(fixture.config("base").model, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    scores = torch.tensor([[0.9, 0.5, 0.3, 0.1]])  # groups 1.4 and 0.4; experts of the first; raw 0.5 before 0.3
    assert fixture.margin(scores, torch.zeros(4), model) == pytest.approx(0.2)
    assert fixture.margin(scores, torch.tensor([0, 0, 0.5, 0.45]), model) == pytest.approx(0.05)  # groups 1.4 and 1.35


def test_a_name_says_all_that_differs() -> None:
    case = Case(4, Parallel(tp=2, zero1=False), Recompute("selective", ("moe", "mtp")), "yarn", 2)
    assert case.name == "tp2 dp2 no-zero1 recompute moe+mtp micro2 (yarn)"
    assert "does not divide" in str(Case(2, Parallel(tp=2, cp=2)).refusal())


def test_pages_show_what_is_out_of_tolerance(tmp_path: Path) -> None:
    fine = {key: most / 10 for key, most in TOLERANCES.items()}
    results = [
        Result("tp2", 2, 1.0, fine, "model.norm.weight"),
        Result("pp2 Et|tttmL", 2, 1.0, fine | {"gradient": 2e-5}, "lm_head.weight"),
        Result("cp2", 2, 1.0, fine | {"loss": math.nan}, "lm_head.weight"),
        Result("dp2", 2, 1.0, {}, error="Traceback\nRuntimeError: <none>"),
    ]
    assert [result.failures for result in results] == [[], ["gradient"], ["loss"], ["error"]]
    pages.write(results, tmp_path, "perilune parity")
    read = json.loads((tmp_path / "parity.json").read_text())
    assert read["made"]["passed"] == 1 and read["results"][1]["failures"] == ["gradient"]
    text = (tmp_path / "parity.md").read_text()
    assert "1 of 4 layouts" in text and "Et\\|tttmL" in text and text.count("**out**") == 2
    page = (tmp_path / "parity.html").read_text()
    assert page.count("cell out") == 2 and "&lt;none&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
