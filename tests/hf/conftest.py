"""Two processes for all tests of this folder, and weights written by transformers."""

from __future__ import annotations

import pytest

from perilune.parallel.workers import Workers


@pytest.fixture(scope="session")
def pool(workers: Workers) -> Workers:
    """The processes that all tests share."""
    return workers
