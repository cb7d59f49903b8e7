"""Which trials are put together, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling.fit import fit
from perilune.pretrain.scaling.fit_command import fit_command
from perilune.pretrain.scaling.trials import Trial, budgets, read_csv

HEAD = "params,tokens,loss,lr,data\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,loss\n1,2\n", "no column tokens"),
        ("tokens,loss\n1,2\n", "no column params or flops_per_token"),
        ("params,flops_per_token,tokens,loss\n", "leave one of them out"),
        (HEAD + "1e6,1e9,x,,\n", r"loss='x' is no number"),
        (HEAD + "1e6,-1,3,,\n", "tokens=-1 must be above 0"),
        (HEAD + "1e6,1e9,3,1,web\n1000000,1e9,3.0,1,web\n", "t.csv:3 is .*t.csv:2 again"),
        (HEAD + "1e6,1e9,3,1,web\n1e6,1e10,2.9,1,\n", "column data: 'web' .*t.csv:2.*nothing for .*t.csv:3"),
        (HEAD + "1e300,1e300,3,1,web\n", "more FLOPs than can be held"),
        (HEAD + "1e6,1e9,3,1,web\n1e6,1e9,3,1,web\n", "t.csv:3 is .*t.csv:2 again: .*column `seed`"),
        (
            "trial,params,tokens,loss,seed\na,1e6,1e9,3,1\na,1e6,1e9,3.1,2\na,1e6,1e9,3.2,1\n",
            "t.csv:4 is .*t.csv:2 again with loss 3.2 in place of 3:",
        ),
        ("trial,params,tokens,loss\na,1e6,1e9,3\nb,1e6,1e9,3\n", "t.csv:3 is .*t.csv:2 again"),
        (HEAD + "1e6,1e9,3,1,web\n1e6,2e9,3,1,code\n", "data: 'web' .*'code' .*--mixed"),
        (
            "params,tokens,loss\n" + "1e6,1e9,3\n1e6,1e9,3.1\n",
            "of 3 budgets of compute.*not of 1.*need 3 budgets",
        ),
        ("params,tokens,loss\n1,250,3.1,99\n", "more cells than 3 columns"),
        ("params,tokens,loss,loss\n1,250,3.1,99\n", "column loss is there twice"),
    ],
)
def test_bad_trials_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        fit(read_csv([tmp_path / "t.csv"]), draws=5)


def test_a_file_named_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEAD + "1e6,1e9,3,1,web\n")
    with pytest.raises(InputError, match=r"t\.csv:2 is read twice: its file is named twice"):
        read_csv([tmp_path / "t.csv"] * 2)


def test_a_folder_without_trials_is_told(tmp_path: Path) -> None:
    for file, message in (("a.txt", "has no trials.csv: name the folder of a"), ("ladder.json", "has ended")):
        (tmp_path / file).write_text("{}")
        with pytest.raises(InputError, match=message):
            fit_command([tmp_path], tmp_path / "fit")
        assert not (tmp_path / "fit").exists()


def test_budgets_are_told_by_gaps() -> None:
    size = 1e8
    for computes, sizes in (((0.95, 0.98, 1.02, 1.05, 1.06), [5]), ((1.0, 1.04, 1.3, 1.32), [2, 2])):
        given = [Trial("t", size, "flops_per_token", compute * 1e10, 3.0) for compute in computes]
        assert [len(group) for group in budgets(given)] == sizes
