"""`perilune fit`: trials in CSV files into laws, pictures and a page."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perilune.pretrain.errors import InputError, make_folder

if TYPE_CHECKING:
    from perilune.pretrain.scaling.fit import Fit


def fit_command(paths: Sequence[Path], out: Path, *, mixed: bool = False, seed: int = 0, as_json: bool = False) -> int:
    """Fit the trials of `paths` (CSV files, or folders with a trials.csv) and write `out`; returns the exit code.

    Raises InputError for trials that cannot be read, put together or fitted, and if `out` has a fit already.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("perilune fit needs matplotlib: pip install -e '.[scaling]' in the checkout")
    from perilune.pretrain.scaling import pictures
    from perilune.pretrain.scaling.fit import fit
    from perilune.pretrain.scaling.trials import read_csv

    file = out / "fit.json"
    if file.exists():
        raise InputError(f"{file} is there already and is never written over; name another folder with --out")
    trials = read_csv([_table_of(path) for path in paths], mixed)
    found = fit(trials, seed=seed)
    make_folder(out)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    text = re.sub(r"\[\n[-+.,\deE\s]+\]", lambda row: "".join(row[0].split()), text)  # a draw is a line
    try:
        drawn = pictures.draw(found, out)
        (out / "fit.html").write_text(_page(found, drawn), encoding="utf-8")
        part = file.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)  # last: where it is, all of it is
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error}") from error
    if as_json:
        print(text, end="")
        return 0
    for warning in (*found.warnings, *(f"outlier: {one}" for one in found.outliers)):
        print(f"warning: {warning}")
    print(_table(found))
    print(f"{len(found.trials)} trials: {file}, and with pictures {out / 'fit.html'}")
    return 0


def _table_of(path: Path) -> Path:
    """The CSV file of `path`. Raises InputError for a folder that has none."""
    if not path.is_dir():
        return path
    file = path / "trials.csv"
    if not file.exists():
        if (path / "ladder.json").exists():
            raise InputError(f"{path} has no trials.csv: no trial of this sweep has ended yet")
        raise InputError(f"{path} has no trials.csv: name the folder of a `perilune sweep`, or a CSV file")
    return file


def _table(fit: Fit) -> str:
    """Every constant with its interval, numbers below each other."""
    rows = [("constant", "value", "low", "high"), *_constants(fit)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{name:{widths[0]}}  {value:>{widths[1]}}  {low:>{widths[2]}}  {high:>{widths[3]}}"
        for name, value, low, high in rows
    )


def _constants(fit: Fit) -> Iterator[tuple[str, str, str, str]]:
    """(name, value, low, high) of every constant, to be read."""
    every = dict(fit.parametric)
    for name, law in fit.laws.items():
        every |= {f"{name}: k": law.k, f"{name}: exponent of C": law.exponent}
        every |= {f"{name}: E": law.E} if law.E else {}
    for name, constant in every.items():
        yield name, f"{constant.value:.4g}", f"{constant.low:.4g}", f"{constant.high:.4g}"


def _page(fit: Fit, drawn: Sequence[tuple[str, Path]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from perilune.pretrain.scaling.pictures import SIZES

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    computes = [trial.compute for trial in fit.trials]
    return templates.get_template("fit.html").render(
        trials=len(fit.trials),
        least=f"{min(computes):.3g}",
        most=f"{max(computes):.3g}",
        sizes=SIZES[fit.per],
        warnings=[*fit.warnings, *(f"outlier: {one}" for one in fit.outliers)],
        constants=list(_constants(fit)),
        pictures=[(what, base64.b64encode(file.read_bytes()).decode()) for what, file in drawn],
    )
