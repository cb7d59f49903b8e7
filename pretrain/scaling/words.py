"""Numbers and lists as they are told to people."""

from __future__ import annotations

from collections.abc import Sequence


def short(value: float) -> str:
    """1.35M"""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def some(found: Sequence[str]) -> str:
    """The first four, and how many more there are."""
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
