"""The doctor finds what is wrong, each fault made on purpose, and passes this machine, which runs the tests."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import perilune.kernels
from perilune.pretrain import doctor
from perilune.pretrain.doctor import Finding

ROOT = Path(__file__).parents[1]


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Versions of distributions other than the installed ones; `_` stands for `-`."""
    real = doctor.installed
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "installed", lambda name: changed[name] if name in changed else real(name))


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_requirements_are_those_of_setup_py() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if getattr(call.func, "id", "") == "setup")
    asked = {
        k.arg: ast.literal_eval(k.value) for k in setup.keywords if k.arg in ("install_requires", "extras_require")
    }
    names = {extra: {Requirement(text).name for text in texts} for extra, texts in asked["extras_require"].items()}
    assert {r.name for r in doctor.requirements()} == {Requirement(text).name for text in asked["install_requires"]}
    assert {r.name for r in doctor.requirements("gpu")} == names["gpu"]
    assert {r.name for r in doctor.requirements("dev")} == names["dev"]
    assert set(doctor.OPTIONAL) <= names["gpu"] | names["dev"]


def test_python_below_3_12_is_an_error() -> None:
    assert doctor.check_python((3, 11, 9)).status == "error"
    assert doctor.check_python((3, 12, 0)).status == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [("0.19.0", "ok"), ("0.20.0", "error"), ("0.16.1", "error"), (None, "error")]
)
def test_megatron_core_outside_its_range_is_an_error(
    monkeypatch: pytest.MonkeyPatch, version: str | None, status: str
) -> None:
    pretend(monkeypatch, megatron_core=version)
    found = by_name(doctor.check_requirements())
    assert found["megatron-core"].status == status
    assert ("<0.20" in found["megatron-core"].remedy) == (status == "error")
    assert all(finding.status == "ok" for name, finding in found.items() if name != "megatron-core")


def test_what_is_optional_costs_something(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers=None, pytest="9.0")
    found = by_name(doctor.check_optional())
    assert found["transformers"].status == "missing"
    assert found["transformers"].cost
    assert found["transformers"].remedy
    assert found["pytest"] == Finding("pytest", "ok", "9.0")


NO_TE = {"transformer_engine": None, "transformer_engine_torch": None, "transformer_engine_cu13": None}


def test_transformer_engine_without_its_torch_part_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **(NO_TE | {"transformer_engine_cu13": "2.17.1"}))
    (finding,) = doctor.check_transformer_engine()
    assert finding.status == "error"
    assert "transformer-engine-cu13 2.17.1" in finding.found
    assert "pip uninstall transformer-engine-cu13" in finding.remedy
    whole = {name: "2.17.1" for name in NO_TE}
    pretend(monkeypatch, **whole)
    assert not list(doctor.check_transformer_engine())
    pretend(monkeypatch, **NO_TE)
    assert not list(doctor.check_transformer_engine())


def test_the_wrong_apex_is_told_from_nvidias(tmp_path: Path) -> None:
    for name, folder in (("wrong", "lib"), ("right", "optimizers")):
        (tmp_path / name / "apex" / folder).mkdir(parents=True)
        (tmp_path / name / "apex" / "__init__.py").touch()
    wrong = doctor.check_apex(PathFinder.find_spec("apex", [str(tmp_path / "wrong")]))
    assert wrong.status == "warning"
    assert "web-authentication" in wrong.found
    assert wrong.remedy == "pip uninstall apex"
    assert doctor.check_apex(PathFinder.find_spec("apex", [str(tmp_path / "right")])).status == "ok"
    none = doctor.check_apex(None)
    assert none.status == "missing"
    assert "never `pip install apex`" in none.remedy


def test_our_kernels_as_a_bare_module_is_a_warning(tmp_path: Path) -> None:
    folder = Path(perilune.kernels.__file__).parents[1]
    (finding,) = doctor.check_bare_kernels(PathFinder.find_spec("kernels", [str(folder)]))
    assert finding.status == "warning"
    assert "PYTHONSAFEPATH=1" in finding.remedy
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert not list(doctor.check_bare_kernels(PathFinder.find_spec("kernels", [str(tmp_path)])))
    assert not list(doctor.check_bare_kernels(ModuleSpec("kernels", None)))
    assert not list(doctor.check_bare_kernels(None))
    assert importlib.util.find_spec("kernels") is None  # conftest.py keeps the repository off sys.path


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; sys.exit('no such library')", "code 1: no such library"),
        ("import os; os.abort()", "code -6"),
        ("print('hello')", "code 0"),
        ("import time; print('{}', flush=True); time.sleep(60)", "no answer in 1 s"),
    ],
)
def test_a_probe_that_crashes_or_hangs_is_a_finding(program: str, says: str) -> None:
    finding = doctor.check_probe(doctor.run_probe(program, seconds=1))
    assert finding.status == "error"
    assert says in finding.found


def test_gpus_are_named_and_a_blind_torch_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA H200", "memory_bytes": 141 << 30, "capability": "9.0"}
    found = by_name(doctor.check_devices({"gpus": [gpu], "cuda": "13.2"}))
    assert found["gpu 0"] == Finding("gpu 0", "ok", "NVIDIA H200, 141 GiB, compute capability 9.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert by_name(doctor.check_devices({"gpus": [], "cuda": None}))["gpu"].status == "warning"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2"})
    found = by_name(doctor.check_devices({"gpus": [], "cuda": None}))
    assert found["gpu"].status == "missing"
    assert "fp32" in found["cpu bf16"].remedy


def test_little_space_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.shutil.disk_usage(Path.cwd())
    assert {f.status for f in doctor.check_space()} <= {"ok", "warning"}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: real._replace(total=64 << 20, free=64 << 20))
    findings = list(doctor.check_space())
    assert findings
    assert {f.status for f in findings} == {"warning"}
    assert all(f.cost and f.remedy for f in findings)


def test_this_machine_passes(perilune: Any) -> None:
    done = perilune("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"doctor", "ok", "versions", "devices", "findings"}
    assert report["ok"] is True
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["megatron-core"].startswith("0.19")
    assert report["devices"]["cores"] >= 1
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["main job"]["status"] == "ok"
    for finding in report["findings"]:
        assert set(finding) == {"name", "status", "found", "cost", "remedy"}
        assert finding["status"] == "ok" or (finding["cost"] and finding["remedy"])


def test_a_torch_that_does_not_load_fails_the_doctor(perilune: Any, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = perilune("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "import torch failed: OSError: libcudart.so.13" in done.stdout
    assert done.stdout.endswith("The main job cannot run here: see main job.\n")
    assert done.stderr == ""
