"""What all tests share: one thread a process, no test on a GPU that is not there, the same examples in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from perilune.parallel.workers import Workers

# Before torch is imported anywhere: processes started by tests share the cores, and inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONSAFEPATH"] = "1"
# `python -m pytest` puts this repository on sys.path, where `kernels` would hide the PyPI package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]

settings.register_profile("perilune", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("perilune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in tests/gpu are skipped, visibly, where there is no GPU."""
    on_gpu = [item for item in items if "gpu" in item.path.relative_to(Path(__file__).parent).parts[:-1]]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


Perilune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def perilune(tmp_path: Path) -> Perilune:
    """`perilune("train", "tiny")`: the command in a process of its own, with its output, in an empty folder."""

    def run(*words: str, timeout: float = 120.0, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("perilune")), *words],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes kept alive for all tests that compare layouts."""
    with Workers(8) as pool:
        yield pool
