"""docs/science.md says what `perilune fit` finds in the trials beside it."""

from __future__ import annotations

from pathlib import Path

from perilune.pretrain.scaling.fit import fit
from perilune.pretrain.scaling.trials import read_csv


def test_the_docs_say_of_the_ladder_what_its_trials_say(tmp_path: Path) -> None:
    """docs/science.md and docs/tables/ladder.csv."""
    docs = Path(__file__).parents[2] / "docs"
    head, *lines = (docs / "tables" / "ladder.csv").read_text().splitlines()
    budget = head.split(",").index("budget")
    below = [line for line in lines if 5e10 < float(line.split(",")[budget]) < 2e12]
    (tmp_path / "below.csv").write_text("\n".join([head, *below]) + "\n")
    found = fit(read_csv([tmp_path / "below.csv"]))
    said = (docs / "science.md").read_text()
    m, loss = found.laws["m_opt"], found.laws["loss"]
    exponent = m.exponent
    assert f"M_opt = {m.k.value:.0f} C^{exponent.value:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]" in said
    low, high = loss.interval(2.2e12) or (0, 0)
    assert f"| loss there | {loss(2.2e12):.3f} [{low:.3f}, {high:.3f}] |" in said
    low, high = m.interval(2.2e12) or (0, 0)
    assert f"| best M | {m(2.2e12) / 1e3:.0f}k [{low / 1e3:.0f}k, {high / 1e3:.0f}k] |" in said
