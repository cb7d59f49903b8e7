"""Two processes for all tests of this folder, and weights written by transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perilune.parallel.workers import Workers

sys.path.insert(0, str(Path(__file__).parent))  # its processes import hf_ranks by name


@pytest.fixture(scope="session")
def pool() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool
