"""What tests of kernels share."""

from __future__ import annotations

import pytest

from perilune.kernels import matmul


@pytest.fixture(params=["as bf16", "in fp32"])
def bf16_multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is faster with bf16, and on one that is slower, whichever this one is."""
    monkeypatch.setattr(matmul, "slow_bf16", lambda: request.param == "in fp32")
