"""The matrix as a page to look at, as text for a repository, and as JSON for a script."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from perilune.pretrain import doctor
from perilune.pretrain.parity import fixture
from perilune.pretrain.parity.matrix import ROUNDED, TOLERANCES, Result

LABELS = {
    "loss": "loss",
    "mtp": "MTP loss",
    "balance": "balance loss",
    "grad_norm": "gradient norm",
    "gradient": "worst gradient",
    "counts": "expert counts",
    "biases": "router biases",
    "update": "worst update",
    "replicas": "replicas",
}
HERE = Path(__file__).parent


def write(results: Sequence[Result], out: Path, command: str) -> None:
    """`parity.json`, `parity.md` and `parity.html` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(results, command)
    rows = [asdict(result) | {"failures": result.failures} for result in results]
    whole = {"made": facts, "tolerances": TOLERANCES, "results": rows}
    (out / "parity.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "parity.md").write_text(_markdown(results, facts), encoding="utf-8")
    (out / "parity.html").write_text(_html(results, facts), encoding="utf-8")


def _facts(results: Sequence[Result], command: str) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    passed = sum(not result.failures for result in results)
    minutes = sum(result.seconds for result in results) / 60
    return {
        "cases": len(results),
        "passed": passed,
        "text": (
            f"Each row is a layout of one small model ({fixture.ROWS} rows of {fixture.SEQ_LEN} tokens, MLA, MoE with "
            f"group-limited routing, MTP, packed documents with unequal token counts), trained {fixture.STEPS} steps "
            "in fp32 from the same weights on the same batch, beside one process that sees the batch whole. Numbers "
            "are the largest deviation: relative for losses and norm, of a tensor's own norm for the worst gradient "
            f"(first step) and the worst update (all steps), absolute for the rest; of updates a last digit in at "
            f"most {ROUNDED} elements of a weight is none. No expert is chosen by less than {fixture.MARGIN:g}, so no "
            "tie decides."
        ),
        "made": (
            f"{command}; {os.cpu_count()} x {doctor.cpu_name()}, {versions}, Python {platform.python_version()}, "
            f"{datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes"
        ),
    }


def _cell(result: Result, key: str) -> str:
    value = result.deviations.get(key)
    if value is None:
        return ""
    return "equal" if value == 0 else f"{value:.1e}"


def _markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    head = ["layout", "processes", *LABELS.values()]
    lines = [
        f"# {facts['passed']} of {facts['cases']} layouts equal one rank",
        "",
        facts["text"],
        "",
        f"Made by `{facts['made'].split('; ')[0]}`; {facts['made'].split('; ', 1)[1]}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        "| at most | | " + " | ".join(f"{TOLERANCES[key]:g}" for key in LABELS) + " |",
    ]
    for result in results:
        cells = [_cell(result, key) + (" **out**" if key in result.failures else "") for key in LABELS]
        if result.error:
            cells = ["**failed**: " + result.error.strip().splitlines()[-1], *[""] * (len(LABELS) - 1)]
        name = result.name.replace("|", "\\|")
        lines.append(f"| {name} | {result.world} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _html(results: Sequence[Result], facts: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for result in results:
        cells = [
            {"text": _cell(result, key), "out": key in result.failures, "room": _room(result, key)} for key in LABELS
        ]
        rows.append(asdict(result) | {"cells": cells})
    columns = [{"label": label, "tolerance": f"{TOLERANCES[key]:g}"} for key, label in LABELS.items()]
    return environment.get_template("parity.html").render(facts=facts, rows=rows, columns=columns)


def _room(result: Result, key: str) -> float:
    """1 where nothing deviates, 0 at the tolerance or beyond: two decades of it make the colour."""
    value, most = result.deviations.get(key, 0.0), TOLERANCES[key]
    if value == 0:
        return 1.0
    return min(1.0, max(0.0, math.log10(most / value) / 2)) if most and value == value else 0.0
