"""tests/gpu without a GPU: nothing is reported that was not run; the checks' own code runs on a CPU in its place."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from perilune.pretrain import doctor
from perilune.pretrain.parity import probe
from perilune.pretrain.step import StepResult

GPU = Path(__file__).parent / "gpu"
ROOT = GPU.parents[1]
sys.path.append(str(GPU))

import gpu_checks  # noqa: E402


def run_script(folder: Path, root: Path = ROOT, **variables: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """tests/gpu/run.sh on a machine whose GPUs are hidden; what it said, and its JSON."""
    out = folder / "out" / "gpu.json"
    done = subprocess.run(
        [root / "tests" / "gpu" / "run.sh", out],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    return done, json.loads(out.read_text())


def test_without_a_gpu_nothing_is_run_and_nothing_reported(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done, document = run_script(tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert "no GPU: nothing was run" in done.stderr
    assert document["outcome"] == "no GPU: nothing was run"
    assert document["checks"] == [] and document["not_run"] == []
    assert document["machine"]["torch"]["gpus"] == []
    assert document["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.json"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_gpu_that_torch_does_not_see_is_an_error(tmp_path: Path) -> None:
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho NVIDIA H100 80GB HBM3, 580.1, 81559 MiB\n")
    listing.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done, document = run_script(tmp_path, PATH=path, CUDA_VISIBLE_DEVICES="99")
    assert done.returncode == 2 and "torch does not see the GPU" in done.stderr
    assert document["outcome"].startswith("not set up: nvidia-smi lists NVIDIA H100") and document["checks"] == []


def test_without_a_python_that_fits(tmp_path: Path) -> None:
    done, document = run_script(tmp_path, PYTHON="/bin/false")
    assert done.returncode == 2 and "/bin/false; set PYTHON" in done.stderr
    assert document["outcome"].startswith("not set up: no Python") and document["checks"] == []


@pytest.mark.timeout(240)
def test_it_installs_from_what_is_carried_and_says_why_each_check_was_skipped(tmp_path: Path) -> None:
    """The script's whole path but the GPU, from a copy, on top of an environment that has the packages."""
    root = tmp_path / "copy"
    unneeded = ("__pycache__", ".*", "*.egg-info", "runs", "build", "dist", "wheels")
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*unneeded))
    done, document = run_script(tmp_path, root, REHEARSE="1", VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert document["outcome"] == "nothing was run: every check was skipped"
    assert len(document["checks"]) > 20 and document["not_run"] == []
    for check in document["checks"]:
        assert check["outcome"] == "skipped" and check["numbers"] == {}
        assert check["reason"].startswith("Transformer Engine" if "[te" in check["name"] else "needs a GPU"), check
    where = "import perilune.parallel.mesh as m; print(m.__file__)"
    found = subprocess.run([tmp_path / "venv" / "bin" / "python", "-P", "-c", where], capture_output=True, text=True)
    assert found.stdout.strip() == str(root / "parallel" / "mesh.py"), found.stderr


SMALL = """
import gpu_checks
import gpu_contests
import gpu_slice


def test_small(ours, record):
    found = ours.run("attention", "bf16", (1, 20, 43), 2, 192, 128)
    assert not gpu_checks.outside(found, {"forward": 1e-2, "gradient": 1e-2}), found
    assert found["implementation"] == "blocks of queries by document" and not found["operations"], found
    found = record(ours.run("speed", gpu_checks.bench("tiny", "bf16", 64), 2, 1, 2))
    assert len(found["losses"]) == len(found["step_s"]) == 3 and found["losses"][2] < found["losses"][0]
    gpu_slice.check_step(ours.run("slice_speed", gpu_slice.SMALL, 1, 1))
    gpu_contests.check_kernels(ours.run("kernel_speeds", gpu_slice.SMALL, 1))
"""


@pytest.mark.timeout(400)
def test_the_checks_where_a_cpu_stands_for_the_gpu(tmp_path: Path) -> None:
    """The suite's own code, fixtures and record: what does not ask for CUDA passes, what asks for it fails."""
    suite = tmp_path / "suite"
    shutil.copytree(GPU, suite, ignore=shutil.ignore_patterns("wheels", "__pycache__"))
    (suite / "test_small.py").write_text(SMALL)
    document = run_checks(suite, tmp_path / "gpu.json", "nccl_group or dense or grouped or small or bitwise and bf16")
    checks = {check["name"]: check for check in document["checks"]}
    assert document["outcome"] == "failed" and document["not_run"] == []
    assert [name for name, check in checks.items() if check["outcome"] == "failed"] == [
        "test_the_gpu_computes_in_an_nccl_group[ours]"
    ]
    failed = checks["test_the_gpu_computes_in_an_nccl_group[ours]"]
    assert "'cpu' == 'cuda:0'" in failed["reason"] and failed["numbers"]["backend"] == "gloo"
    assert checks["test_fp32_equals_the_cpu[ours-dense]"]["numbers"]["gradient"] == 0  # the same device twice
    assert 0 < checks["test_bf16_is_near_fp32_on_the_cpu[ours-dense]"]["numbers"]["gradients"] < 0.04
    assert checks["test_small"]["numbers"]["tokens_per_s"] > 0 and checks["test_small"]["seconds"] > 0
    passed = {name for name, check in checks.items() if check["outcome"] == "passed"}
    for name in ("test_weights_go_in_by_name_and_come_out_bitwise", "test_a_checkpoint_comes_back_bitwise"):
        assert f"{name}[ours-bf16]" in passed


def run_checks(suite: Path, out: Path, chosen: str) -> Any:
    """pytest on a folder of checks, recorded in `out`."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PERILUNE_GPU_JSON": str(out)}
    subprocess.run([sys.executable, suite / "gpu_result.py", "begin", out], env=variables, check=False)
    words = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--timeout=120", "-k", chosen, str(suite)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


CONFTEST = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.append({gpu!r})
from gpu_result import Recorder

def pytest_configure(config):
    config.pluginmanager.register(Recorder(Path(os.environ["PERILUNE_GPU_JSON"])))
"""
CHECKS = """
import time
import pytest

def test_first(record_property):
    record_property("apart", 1e-6)

def test_second():
    raise RuntimeError("x" * 50_000)

def test_third(request):
    request.getfixturevalue("no such fixture")

@pytest.mark.skip(reason="no such library")
def test_fourth():
    pass

def test_hangs():
    time.sleep(60)

def test_never():
    pass
"""


def test_a_run_that_is_cut_off_keeps_what_it_has_and_names_the_rest(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(gpu=str(GPU)))
    (tmp_path / "test_checks.py").write_text(CHECKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    out, result = tmp_path / "gpu.json", [sys.executable, str(GPU / "gpu_result.py")]
    subprocess.run([*result, "begin", str(out)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False)
    began = json.loads(out.read_text()) | {"outcome": "not finished"}  # as where there is a GPU
    out.write_text(json.dumps(began))
    running = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PERILUNE_GPU_JSON": str(out)},
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while len(json.loads(out.read_text())["checks"]) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        running.wait(30)
    finally:
        running.kill()
    subprocess.run([*result, "end", str(out), "cut off after 1 s"], check=True)
    document = json.loads(out.read_text())
    assert document["outcome"] == "cut off after 1 s" and document["seconds"] > 0
    assert document["not_run"] == ["test_hangs", "test_never"]
    first, second, third, fourth = document["checks"]
    assert first["outcome"] == "passed" and first["numbers"] == {"apart": 1e-6} and "reason" not in first
    assert second["outcome"] == "failed" and 1000 < len(second["reason"]) < 10_000
    assert third["outcome"] == "failed" and "no such fixture" in third["reason"]
    assert fourth["outcome"] == "skipped" and fourth["reason"] == "no such library"


def trained(gradient: float = 1.0, moved: float = 1e-3, bias: float = 0.25, count: int = 64) -> probe.Trained:
    """A step of which one norm and one router's bias are looked at."""
    place = ("decoder.final_layernorm.weight", (128,), (0,))
    step = StepResult(5.0, 5.1, 1.2, 0.9, False, torch.full((1, 16), count), 1, False)
    biases = [("decoder.layers.1.mlp.router.expert_bias", (16,), (0,), np.full(16, bias, np.float32))]
    ahead = np.linspace(-1, 1, 128, dtype=np.float32)
    return probe.Trained(
        [step], [(*place, ahead * np.float32(gradient))], biases, [(*place, 1 + ahead * np.float32(moved))], 1.0
    )


def test_what_deviates_is_found() -> None:
    run = gpu_checks.config("base", "fp32")
    reference = gpu_checks.Reference("", {"model.norm.weight": torch.ones(128)}, trained())

    def outside(got: probe.Trained) -> set[str]:
        return set(gpu_checks.outside(gpu_checks.deviations(run, reference, got), gpu_checks.FP32))

    assert outside(trained()) == set()
    assert outside(trained(gradient=1.001)) == outside(trained(gradient=math.nan)) == {"gradient", "gradients"}
    assert outside(trained(moved=2e-3)) == outside(trained(moved=math.nan)) == {"update"}
    assert outside(trained(bias=0.2501)) == {"biases"}
    assert outside(trained(count=65)) == {"counts"}
    wrong = [replace(trained().steps[0], **{field: 4.0}) for field in ("loss", "mtp_loss", "aux_loss", "grad_norm")]
    keys = ("loss", "mtp", "balance", "grad_norm")
    for key, step in zip(keys, wrong, strict=True):
        assert outside(replace(trained(), steps=[step])) == {key}
    (fine,) = trained().steps
    reference = replace(reference, trained=replace(trained(), steps=[fine, fine]))
    assert outside(replace(trained(), steps=[fine, replace(fine, loss=math.nan)])) == {"loss"}


@pytest.mark.parametrize("script", ["run.sh", "carry.sh"])
def test_scripts_parse(script: str) -> None:
    assert os.access(GPU / script, os.X_OK)
    subprocess.run(["bash", "-n", GPU / script], check=True)


def test_what_is_carried_is_what_setup_asks_for() -> None:
    """Where both name a package they name the same versions."""
    asked = {r.name: r.specifier for extra in (None, "dev") for r in doctor.requirements(extra)}
    lines = (GPU / "needs.txt").read_text().splitlines() + (GPU / "needs_no_deps.txt").read_text().splitlines()
    carried = [Requirement(line) for line in lines if not re.match(r"\s*(#|$)", line)]
    assert {r.name: r.specifier for r in carried if r.name in asked} == {
        r.name: asked[r.name] for r in carried if r.name in asked
    }
    assert {r.name for r in carried} - asked.keys() == {"setuptools"}  # the build backend, of pyproject.toml
