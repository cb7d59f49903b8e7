"""Validation gives the same figures in layouts whose schedule or cut is not one rank's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gloo_ranks
import pytest

from perilune.parallel.workers import Workers
from perilune.pretrain.parity import fixture
from perilune.pretrain.schema import Parallel


@pytest.mark.parametrize("degrees", [{"pp": 2, "vpp": 2}, {"cp": 2}], ids=str)
def test_validation_equals_one_rank(degrees: dict[str, Any], workers: Workers) -> None:
    """Three micro-batches, which interleaved stages of two ranks cannot share out evenly."""
    config = fixture.config("base")
    batches = [(batch, 100 + n) for n, batch in enumerate(fixture.batches("base", 2)[:3])]
    (one,) = workers.run(1, gloo_ranks.validate, config, batches)
    layout = replace(config, parallel=Parallel(**degrees))
    for got in workers.run(2, gloo_ranks.validate, layout, batches):
        assert got == pytest.approx(one, rel=1e-6)
