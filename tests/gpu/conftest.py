"""The processes of the one-GPU checks, and their record where PERILUNE_GPU_JSON names a file that was begun."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # the modules beside this one, which processes started from here import too

from gpu_process import TRANSFORMER_ENGINE, Process
from gpu_result import Recorder

WITH_TE = pytest.param(
    "te",
    marks=pytest.mark.skipif(
        importlib.util.find_spec(TRANSFORMER_ENGINE[1]) is None,
        reason=f"Transformer Engine is not installed (no {TRANSFORMER_ENGINE[1]})",
    ),
)


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get("PERILUNE_GPU_JSON"):
        config.pluginmanager.register(Recorder(Path(path)), "gpu-json")


@pytest.fixture(scope="session")
def processes() -> Iterator[dict[str, Process]]:
    """By whose modules compute on the GPU (ours, te), and cpu."""
    with Process(gpu=False) as cpu, Process(gpu=True) as ours, Process(gpu=True, te=True) as te:
        yield {"cpu": cpu, "ours": ours, "te": te}


@pytest.fixture(scope="session", params=["ours", WITH_TE])
def gpu(processes: dict[str, Process], request: pytest.FixtureRequest) -> Process:
    """The process with the GPU, once with each kind of modules."""
    return processes[request.param]


@pytest.fixture(scope="session")
def speeds() -> dict[tuple[str, str], Any]:
    """What `choice_speed` found by (whose modules, choice)."""
    return {}


@pytest.fixture
def ours(processes: dict[str, Process]) -> Process:
    """The process with the GPU and our modules, for what does not depend on whose modules they are."""
    return processes["ours"]


@pytest.fixture(scope="session")
def references(processes: dict[str, Process], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The steps of each fixture on the CPU in fp32."""
    from gpu_checks import References  # with Megatron-core, whose failing import is then a check's, and on record

    return References(processes["cpu"], tmp_path_factory.mktemp("references"))


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`record(numbers)` puts them into the JSON, before anything is asserted of them."""

    def add(numbers: dict[str, Any]) -> dict[str, Any]:
        for name, value in numbers.items():
            record_property(name, value)
        return numbers

    return add
