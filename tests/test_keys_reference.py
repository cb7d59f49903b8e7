"""docs/keys.md has every key of the schema once, in its order, with its type, default and limits, and no other."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from perilune.pretrain import ranges
from perilune.pretrain.schema import Config

PAGE = Path(__file__).parent.parent / "docs" / "keys.md"
ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| (.+?) \| `([^`]+)` \| (.+) \|$")


def _kind(annotation: str) -> str:
    if words := re.findall(r'"([^"]+)"', annotation):
        return ", ".join(f"`{word}`" for word in words)
    if annotation.startswith("dict"):
        return "mapping"
    plain = annotation.replace(" | None", " or null").replace("str", "text").replace("bool", "true or false")
    return re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", plain)


def _written(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _expected() -> list[tuple[str, str, str]]:
    """(key, type, default) of every key, as the page has to write them."""
    rows = []
    for section in fields(Config):
        value = getattr(Config(), section.name)
        if is_dataclass(value):
            for f in fields(value):
                rows.append((f"{section.name}.{f.name}", _kind(str(f.type)), _written(getattr(value, f.name))))
        else:
            rows.append((section.name, _kind(str(section.type)), _written(value)))
    return rows


def test_the_page_has_every_key_once_with_its_type_and_default() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    rows = [match.groups() for line in lines if (match := ROW.match(line))]
    assert len(rows) == len(lines), [line for line in lines if not ROW.match(line)]
    assert [row[:3] for row in rows] == _expected()
    assert all(row[3].strip() for row in rows)


def test_limits_of_single_numbers_are_those_that_are_checked() -> None:
    meaning = {match[1]: match[4] for line in PAGE.read_text().splitlines() if (match := ROW.match(line))}
    for section, named in ranges.RANGES.items():
        for name, allowed in named.items():
            told = meaning[f"{section}.{name}"]
            if allowed.most < 2**62:
                assert f"{allowed.least:g} to {allowed.most:g}" in told, (section, name)
                assert ("1 excluded" in told) == allowed.below, (section, name)
            elif allowed.least:
                assert f"{allowed.least:g}" in told, (section, name)
