"""`perilune doctor`: what this machine has, what is missing, what that costs, what to install; can the main job run?

Versions come from the installed packages' metadata against what `setup.py` asks for, so this file repeats no list of
versions. Torch and Megatron-core are imported in a process of their own: a crash, a hang or a broken wheel there is a
finding, not the end of the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

Status = Literal["ok", "missing", "warning", "error"]

JSON_VERSION = 1  # of the structure that --json prints; keys are only ever added under one number
PROBE_SECONDS = 300  # a first import from a cold network disk is slow; a hang must end
GIB = 1 << 30
LOW_DISK = 5 * GIB  # about what torch's own wheels take; a run on less soon fails to write its checkpoints
LOW_SHM = 1 * GIB  # containers often start with 64 MiB, too little for NCCL's buffers and Ray's object store

GPU_EXTRA = "in the repository: pip install --no-build-isolation -e '.[gpu]'"  # its torch parts are built against torch
OPTIONAL = {
    "transformer-engine": (
        "on a GPU, Perilune's own layers instead of Transformer Engine's: slower, and no fp8 there; nothing on a CPU",
        f"{GPU_EXTRA} (all of Transformer Engine or none of it)",
    ),
    "flash-attn-4": (
        "on Hopper and Blackwell GPUs, PyTorch's attention instead of FlashAttention 4; nothing on a CPU",
        GPU_EXTRA,
    ),
    "transformers": ("models cannot be compared with Hugging Face's, and their tests do not run", "make install"),
    "pytest": ("the tests do not run", "make install"),
}
"""Distribution -> (what its absence costs, how to get it). Of setup.py's extras, those that are worth a line."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cost` and `remedy` are empty where nothing is wrong."""

    name: str
    status: Status
    found: str
    cost: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """`ok` is whether the main job can run here: no finding is an error."""

    versions: dict[str, str | None]
    devices: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.status == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "doctor": JSON_VERSION,
            "ok": self.ok,
            "versions": self.versions,
            "devices": self.devices,
            "findings": [asdict(finding) for finding in self.findings],
        }


def main(as_json: bool) -> int:
    """Print the report on stdout; returns the exit code, 1 if the main job cannot run here."""
    report = examine()
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif sys.stdout.isatty():
        _print_tables(report)
    else:
        _print_plain(report)
    return 0 if report.ok else 1


def examine() -> Report:
    """Look at everything; takes the seconds that importing torch and Megatron-core takes."""
    probe = run_probe()
    findings = [
        check_python(sys.version_info[:3]),
        *check_requirements(),
        *check_optional(),
        *check_transformer_engine(),
        check_apex(importlib.util.find_spec("apex")),
        *check_bare_kernels(importlib.util.find_spec("kernels")),
        *check_devices(probe),
        *check_space(),
        check_probe(probe),
    ]
    return Report(find_versions(), find_devices(probe), tuple(findings))


# ---------------------------------------------------------------- packages


def installed(name: str) -> str | None:
    """The version of an installed distribution, None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(extra: str | None = None) -> list[Requirement]:
    """What setup.py asks for: always, or for one extra alone."""
    parsed = [Requirement(text) for text in metadata.requires("perilune") or []]
    if extra is None:
        return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in parsed if r.marker and r.marker.evaluate({"extra": extra}) and "extra" in str(r.marker)]


def find_versions() -> dict[str, str | None]:
    """Every package that setup.py names, apex, and Python: version, None where it is missing."""
    names = [r.name for extra in (None, "gpu", "dev") for r in requirements(extra)]
    return {"perilune": installed("perilune"), "python": platform.python_version()} | {
        name: installed(name) for name in dict.fromkeys([*names, "apex"])
    }


def check_python(version: tuple[int, ...]) -> Finding:
    """Megatron-core 0.19 needs 3.12; on an older Python pip quietly gives a Megatron-core that does not fit."""
    text = ".".join(map(str, version))
    if version >= (3, 12):
        return Finding("python", "ok", text)
    return Finding("python", "error", text, "Megatron-core 0.19 does not install", "Python 3.12, then `make install`")


def check_requirements(extra: str | None = None) -> Iterator[Finding]:
    """What every installation has, each against its range in setup.py."""
    for requirement in requirements(extra):
        found = installed(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield Finding(requirement.name, "error", "missing", "what uses it fails", f"pip install '{wanted}'")
        elif not requirement.specifier.contains(Version(found), prereleases=True):
            yield Finding(
                requirement.name, "error", found, f"built for {wanted}, checked on no other", f"pip install '{wanted}'"
            )
        else:
            yield Finding(requirement.name, "ok", found)


def check_optional() -> Iterator[Finding]:
    """Packages that some machines go without."""
    for name, (cost, remedy) in OPTIONAL.items():
        found = installed(name)
        yield Finding(name, "ok", found) if found else Finding(name, "missing", "not installed", cost, remedy)


def check_transformer_engine() -> Iterator[Finding]:
    """Transformer Engine is three distributions; some without the others break `import megatron.core`."""
    torch_part = installed("transformer-engine-torch")
    core = {name: installed(name) for name in ("transformer-engine-cu12", "transformer-engine-cu13")}
    parts = {name: version for name, version in core.items() if version} | (
        {"transformer-engine": found} if (found := installed("transformer-engine")) else {}
    )
    if parts and not torch_part:
        listed = ", ".join(f"{name} {version}" for name, version in parts.items())
        yield Finding(
            "transformer-engine-torch",
            "error",
            f"missing beside {listed}",
            "`import transformer_engine.pytorch` fails, and `import megatron.core` with it",
            f"{GPU_EXTRA}, or pip uninstall {' '.join(parts)}",
        )


def check_apex(spec: Any) -> Finding:
    """NVIDIA's apex has `apex.optimizers`; PyPI's `apex` is a web-authentication toolkit of the same name.

    `spec` is what importlib finds for `apex`, None without it.
    """
    if spec is None:
        return Finding(
            "apex",
            "missing",
            "not installed",
            "nothing that Perilune needs: gradient accumulation fusion stays off",
            "only if you want it: build NVIDIA's from its source; never `pip install apex`, which is another project",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("apex", "ok", f"NVIDIA's, {installed('apex') or 'version unknown'}")
    where = ", ".join(map(str, folders)) or str(spec.origin)
    return Finding(
        "apex",
        "warning",
        f"not NVIDIA's: no apex.optimizers in {where}; PyPI's `apex` is a web-authentication toolkit on Pyramid",
        "software that looks for NVIDIA's apex by its name finds the wrong one",
        "pip uninstall apex",
    )


def check_bare_kernels(spec: Any) -> Iterator[Finding]:
    """Our `kernels`, importable without `perilune.` before it, hides the PyPI package that transformers looks for."""
    ours = importlib.util.find_spec("perilune.kernels")
    if spec is None or ours is None or spec.origin is None or ours.origin is None:
        return
    if Path(spec.origin).resolve() == Path(ours.origin).resolve():
        yield Finding(
            "kernels",
            "warning",
            f"{spec.origin} is importable as a bare `kernels`: the repository's folder is on sys.path",
            "transformers takes it for the PyPI package `kernels`",
            "set PYTHONSAFEPATH=1, take the folder out of PYTHONPATH, or start by the command `perilune`",
        )


# ---------------------------------------------------------------- the machine


def find_devices(probe: dict[str, Any]) -> dict[str, Any]:
    """CPU, memory and disk as they are for this process, and the GPUs that torch saw."""
    import psutil

    memory = psutil.virtual_memory()
    flags = cpu_flags()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cpu_bf16": sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "memory_bytes": min(memory.total, container_memory() or memory.total),
        "memory_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "shm_free_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        "gpus": probe.get("gpus", []),
        "cuda": probe.get("cuda"),
    }


def usable_cores() -> int:
    """Cores that this process may use: not all of the machine's under a scheduler or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def container_memory() -> int | None:
    """Bytes that the control group allows, None without a limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return int(text) if text.isdigit() else None


def cpu_flags() -> set[str]:
    """The instruction sets that Linux names (x86 `flags`, Arm `Features`); empty elsewhere."""
    return {flag for line in _cpuinfo("flags", "Features") for flag in line.split()}


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for it; without them, matrices are multiplied in fp32 (`kernels/matmul.py`)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_name() -> str:
    """The processor's name as Linux has it, else what Python knows."""
    return next(_cpuinfo("model name"), "") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> Iterator[str]:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            yield value.strip()


def check_devices(probe: dict[str, Any]) -> Iterator[Finding]:
    """GPUs, and on a CPU whether bf16 is worth it."""
    gpus = probe.get("gpus", [])
    for i, gpu in enumerate(gpus):
        found = f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB, compute capability {gpu['capability']}"
        yield Finding(f"gpu {i}", "ok", found)
    if not gpus and shutil.which("nvidia-smi"):
        yield Finding(
            "gpu",
            "warning",
            f"nvidia-smi is here, but torch (CUDA {probe.get('cuda') or 'not built in'}) sees no GPU",
            "training runs on the CPU",
            "`nvidia-smi` shows whether there is a GPU and which CUDA its driver takes; install torch for that one",
        )
    elif not gpus:
        yield Finding("gpu", "missing", "none", "training runs on the CPU: small models only", "nothing, or a GPU")
    if not multiplies_bf16():
        yield Finding(
            "cpu bf16",
            "missing",
            f"{cpu_name()} has no bf16 instructions",
            "precision.compute=bf16 is not faster than fp32 on this CPU",
            "precision.compute=fp32",
        )


def check_space() -> Iterator[Finding]:
    """Disk here and shared memory."""
    free = shutil.disk_usage(Path.cwd()).free
    low = free < LOW_DISK
    yield Finding(
        "disk",
        "warning" if low else "ok",
        f"{free / GIB:.1f} GiB free in {Path.cwd()}",
        "shards and checkpoints may not fit" if low else "",
        "free some, or write elsewhere with --run" if low else "",
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        low = size < LOW_SHM
        yield Finding(
            "/dev/shm",
            "warning" if low else "ok",
            f"{size / GIB:.2f} GiB",
            "NCCL between GPUs and Ray's object store may fail" if low else "",
            "in a container: docker run --shm-size=8g or --ipc=host" if low else "",
        )


# ---------------------------------------------------------------- can the main job run?

PROBE = """
import json, os, sys, tempfile, warnings
warnings.filterwarnings("ignore")
stage = "import torch"
try:
    import torch
    facts = {"cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts["gpus"].append({"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"})
        stage = "a matmul on the GPU"
        a = torch.ones(16, 16, device="cuda")
        assert (a @ a).sum().item() == 16**3
    stage = "torch.nn.functional.grouped_mm on the CPU, forward and backward"
    x, w = torch.ones(8, 16, requires_grad=True), torch.ones(2, 16, 16, requires_grad=True)
    ends = torch.tensor([3, 8], dtype=torch.int32)
    y = torch.nn.functional.grouped_mm(x, w, offs=ends)
    y.backward(torch.ones_like(y))
    assert y.sum().item() == 8 * 16 * 16 and w.grad[0].sum().item() == 3 * 16 * 16
    stage = "a gloo process group of one"
    import torch.distributed as dist
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one.item() == 1
        dist.destroy_process_group()
    stage = "import megatron.core"
    import megatron.core.models.gpt
except BaseException as error:
    facts = {**globals().get("facts", {}), "stage": stage, "error": f"{type(error).__name__}: {error}"}
print("\\n" + json.dumps(facts))
"""
"""Run by `python -P -c`. Its last line is an object with `cuda`, `gpus` and, if it failed, `stage` and `error`."""


def run_probe(program: str = PROBE, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """What `program` found, in a process of its own; `stage` and `error` where it failed, crashed or hung."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        )
    except subprocess.TimeoutExpired:
        return {"stage": "import and bring-up", "error": f"no answer in {seconds:g} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not last.startswith("{"):
        said = (done.stderr.strip().rpartition("\n")[2] or "nothing said").strip()
        return {"stage": "import and bring-up", "error": f"the process ended with code {done.returncode}: {said}"}
    facts: dict[str, Any] = json.loads(last)
    return facts


def check_probe(probe: dict[str, Any]) -> Finding:
    """The verdict of `run_probe`."""
    if "error" not in probe:
        return Finding("main job", "ok", "torch and Megatron-core import, grouped matmul and a gloo group of one work")
    error = " ".join(str(probe["error"]).split())
    return Finding(
        "main job",
        "error",
        f"{probe['stage']} failed: {error}",
        "nothing trains",
        "mend what the lines above call an error; else `make install` in a fresh clone",
    )


# ---------------------------------------------------------------- printing

_COLOUR = {"ok": "green", "missing": "yellow", "warning": "yellow", "error": "bold red"}


def _device_lines(devices: dict[str, Any]) -> list[tuple[str, str]]:
    bf16 = ", ".join(devices["cpu_bf16"]) or "no bf16 instructions"
    gpus = [f"{gpu['name']} ({gpu['memory_bytes'] / GIB:.0f} GiB)" for gpu in devices["gpus"]]
    return [
        ("system", devices["system"]),
        ("cpu", f"{devices['cpu']}, {devices['cores']} cores to use, {bf16}"),
        ("memory", f"{devices['memory_bytes'] / GIB:.1f} GiB, {devices['memory_available_bytes'] / GIB:.1f} available"),
        ("gpus", f"{', '.join(gpus) or 'none'} (torch built for CUDA {devices['cuda'] or 'none'})"),
    ]


def _verdict(report: Report) -> str:
    if report.ok:
        return "The main job can run here."
    bad = ", ".join(finding.name for finding in report.findings if finding.status == "error")
    return f"The main job cannot run here: see {bad}."


def _print_plain(report: Report) -> None:
    for name, text in _device_lines(report.devices):
        print(f"{name:<8} {text}")
    for finding in report.findings:
        print(f"{finding.status:<8} {finding.name}: {finding.found}")
        for label, text in (("cost", finding.cost), ("remedy", finding.remedy)):
            if text:
                print(f"{'':<8} {label}: {text}")
    print(_verdict(report))


def _print_tables(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    machine = Table(title="This machine", title_justify="left", show_header=False)
    for name, text in _device_lines(report.devices):
        machine.add_row(name, escape(text))
    console.print(machine)
    fine = ", ".join(f"{f.name} {f.found}" for f in report.findings if f.status == "ok")
    table = Table(title="What is not as it could be", title_justify="left")
    for heading in ("", "what", "found", "what it costs", "what to do"):
        table.add_column(heading, overflow="fold")
    for f in report.findings:
        if f.status != "ok":
            table.add_row(f"[{_COLOUR[f.status]}]{f.status}[/]", *map(escape, (f.name, f.found, f.cost, f.remedy)))
    if table.row_count:
        console.print(table)
    console.print(f"[green]ok[/]: {escape(fine)}", highlight=False)
    console.print(f"[{'bold green' if report.ok else 'bold red'}]{escape(_verdict(report))}[/]")
