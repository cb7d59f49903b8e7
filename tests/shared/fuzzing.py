"""Deterministic mutations of good input: bits, cuts, splices, hostile words, and hostile values inside JSON."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

INPUTS = int(os.environ.get("PERILUNE_FUZZ_INPUTS", "1500"))  # tried on each reader; docs/data.md says how many were
DEEP = 400  # levels of a list in a list, as deep as Python's parsers go
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, -0.0, float("inf"), float("nan"),
    "", "0", "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "shard-000000.tar", "pipe:true", "<script>", "é" * 300,
    [], {}, [[]], [{}], {"": {}}, [None, None, None, None, None, None],
)  # fmt: skip


def inputs(name: str, count: int = INPUTS) -> Iterator[random.Random]:
    """`count` sources of chance; the same for a name in every run."""
    for number in range(count):
        yield random.Random(f"{name} {number}")


def mutated(rng: random.Random, data: bytes, words: Sequence[bytes]) -> bytes:
    """`data` after one to four changes; `words` are what the format is sensitive to."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 4, 16, 512, len(out))))
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 0xFF, 0x7F, 0x80, ord("0"), ord("9"), ord("\n")))
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[rng.randrange(len(out) + 1) :][: end - at]
            case 4:
                out[at:end] = bytes(end - at)
            case 5:
                out[at:at] = rng.choice(words)
            case 6:
                word = rng.choice(words)
                out[at : at + len(word)] = word
            case _:
                there = [(p, word) for word in words if word and (p := out.find(word)) >= 0]
                if there:
                    p, word = rng.choice(there)
                    out[p : p + len(word)] = rng.choice(words)
        out = out[: 4 * len(data) + 4096]
    return bytes(out)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy of `value` (a dict or list) in which one to three nodes are replaced, removed or told twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        parent = value
        while True:
            if not parent:
                break
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
            if isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.7:
                parent = parent[key]
                continue
            match rng.randrange(4):
                case 0:
                    del parent[key]
                case 1 if isinstance(parent, list):
                    parent.insert(key, copy.deepcopy(parent[key]))
                case 2 if isinstance(parent[key], int):
                    parent[key] += rng.choice((-1, 1, 512, 2**32, -(2**32)))
                case _:
                    parent[key] = copy.deepcopy(rng.choice(VALUES)) if rng.random() < 0.97 else _deep()
            break
    return value


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(DEEP):
        value = [value]
    return value
