"""What the launchers' tests share: a dataset, and the metrics of a run that nothing interrupts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import launched_runs
import pytest
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 random tokens."""
    folder = tmp_path_factory.mktemp("data") / "train"
    return write_dataset(folder, random_rows(packed_lengths(lognormal_lengths(64, median=20), 64)[:16], 512), 64, 512)


@pytest.fixture(scope="session")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of `launched_runs.train`, by two processes of plain `train`, uninterrupted."""
    run = tmp_path_factory.mktemp("whole")
    command = [str(Path(sys.executable).with_name("perilune")), *launched_runs.train(packed)]
    subprocess.run([*command, "--nproc", "2", "--run", str(run)], check=True, timeout=120, stdout=subprocess.DEVNULL)
    found = launched_runs.metrics(run)
    assert [entry["step"] for entry in found] == list(range(1, launched_runs.STEPS + 1))
    return found
