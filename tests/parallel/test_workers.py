"""Processes kept alive: what they see of the machine."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest
import torch

from perilune.parallel import workers
from perilune.parallel.workers import WorkerError, Workers


@pytest.mark.parametrize(("gpus", "seen"), [(1, ""), (2, "0,1")])
def test_processes_have_a_gpu_each_or_none(gpus: int, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses two processes on one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name, given in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("PERILUNE_STORE_FD", "0")):  # as in a launched rank
        monkeypatch.setenv(name, given)
    with Workers(2) as pool:
        assert pool.run(1, os.getenv, "CUDA_VISIBLE_DEVICES") == [seen]
        assert pool.run(1, os.getenv, "PERILUNE_STORE_FD") == [None]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_they_are_silent_about_a_toolkit_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    """What a user of `export --verify` sees is what was found."""
    with Workers(1) as pool:
        pool._start(1)
        assert "libtorch" in Path(f"/proc/{pool._processes[0].pid}/maps").read_text()  # before any function's time runs
        pool.run(1, logging.warning, "heard")
        pool.run(1, warnings.warn, "of no interest")
        pool.run(1, logging.getLogger("torch.utils.cpp_extension").warning, "No CUDA runtime, using CUDA_HOME")
    told = capfd.readouterr().err
    assert "heard" in told and "interest" not in told and "CUDA_HOME" not in told


def test_a_call_that_is_interrupted_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "wait", interrupt)
    with Workers(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.run(1, os.getpid)
        assert not pool._processes and not pool._pipes


def test_their_start_has_a_time_of_its_own() -> None:
    """Importing, on a loaded machine, takes longer than a function may."""
    said = r"ranks \[0\] of 1 had not started in 0.05 s"
    with Workers(1, start_s=0.05) as pool, pytest.raises(WorkerError, match=said):
        pool.run(1, os.getpid)
