"""The one JSON that a run of the one-GPU checks leaves, kept true at every moment: nothing in it was not run.

    python gpu_result.py begin FILE         begins it with what this machine is; exit code 3 without a GPU, 4 with one
                                            that torch does not see
    python gpu_result.py end FILE REASON    says how the run ended, if the run could not say so itself

Keys: `outcome` (passed; failed; or a sentence why there is neither), `machine`, `commit`, `began`, `seconds`, `checks`
(each with `name`, `outcome` passed, failed or skipped, `reason` unless it passed, `numbers` as measured, `seconds`),
and `not_run`, the names of checks that were to run and did not finish. Imports nothing but the standard library, and
torch where that is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NO_GPU = "no GPU: nothing was run"
UNFINISHED = "not finished"
EXIT_NO_GPU, EXIT_UNSEEN = 3, 4
DISTRIBUTIONS = (
    "perilune torch triton megatron-core transformer-engine transformer-engine-torch transformer-engine-cu12 "
    "transformer-engine-cu13 flash-attn flash-attn-4 apex transformers numpy nvidia-nccl-cu12 nvidia-nccl-cu13"
).split()
LONGEST = 6000  # characters of a reason


def versions() -> dict[str, str | None]:
    """Installed distributions by name, None where one is missing."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _said(*command: str) -> str | None:
    """What a program prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _torch() -> dict[str, Any]:
    """What torch sees of the GPUs."""
    try:
        import torch
    except ImportError as error:
        return {"error": str(error), "gpus": []}
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        gpus.append({"name": found.name, "memory_bytes": found.total_memory, "capability": capability})
    return {"cuda": torch.version.cuda, "gpus": gpus}


def machine() -> dict[str, Any]:
    """This machine, its driver and its packages."""
    listed = _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "nvidia_smi": listed.splitlines() if listed else [],
        "torch": _torch(),
        "versions": versions(),
    }


def begin(path: Path) -> int:
    """Write a document without a check in it; returns the exit code that says whether there is a GPU."""
    found = machine()
    outcome, code = UNFINISHED, 0
    if not found["torch"]["gpus"]:
        outcome, code = NO_GPU, EXIT_NO_GPU
        if found["nvidia_smi"] and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            seen = found["torch"].get("error") or f"torch {found['versions']['torch']} sees none"
            outcome, code = f"not set up: nvidia-smi lists {found['nvidia_smi'][0]}, but {seen}", EXIT_UNSEEN
    document = {
        "outcome": outcome,
        "machine": found,
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "began": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "seconds": 0.0,
        "checks": [],
        "not_run": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, document)
    return code


def end(path: Path, reason: str) -> None:
    """Why a run that could not finish did not."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["outcome"] == UNFINISHED:
        write(path, document | {"outcome": reason})
    elif document["outcome"] == NO_GPU:  # a rehearsal that came to no check
        write(path, document | {"outcome": f"{NO_GPU}; {reason}"})


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file at once, so that a run that is ended in between leaves the one before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


class Recorder:
    """A pytest plugin that writes each check to the file as it ends; `record_property` adds to its numbers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._document = json.loads(path.read_text(encoding="utf-8"))
        self._began = time.monotonic()
        self._parts: dict[str, list[Any]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        self._document["machine"]["versions"] = versions()
        self._document["not_run"] = [_name(item.nodeid) for item in session.items]
        self._write(UNFINISHED)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:  # a file of checks that cannot even be imported
            self._add(report.nodeid, "failed", _reason(report), {}, 0.0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        parts = self._parts.setdefault(report.nodeid, [])
        parts.append(report)
        if report.when != "teardown":
            return
        bad = next((part for part in parts if part.failed), None)
        skipped = next((part for part in parts if part.skipped), None)
        outcome = "failed" if bad else "skipped" if skipped else "passed"
        reason = _reason(bad or skipped) if bad or skipped else None
        numbers = dict(report.user_properties)
        self._add(_name(report.nodeid), outcome, reason, numbers, sum(part.duration for part in parts))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        outcomes = {check["outcome"] for check in self._document["checks"]}
        if "failed" in outcomes:
            self._write("failed" if not self._document["not_run"] else UNFINISHED)
        elif exitstatus == 0:
            self._write("passed" if "passed" in outcomes else "nothing was run: every check was skipped")

    def _add(self, name: str, outcome: str, reason: str | None, numbers: dict[str, Any], seconds: float) -> None:
        check = {"name": name, "outcome": outcome, "numbers": numbers, "seconds": round(seconds, 2)}
        if reason is not None:
            check["reason"] = reason
        self._document["checks"].append(check)
        self._document["not_run"] = [one for one in self._document["not_run"] if one != name]
        self._write(UNFINISHED)

    def _write(self, outcome: str) -> None:
        self._document |= {"outcome": outcome, "seconds": round(time.monotonic() - self._began, 1)}
        write(self._path, self._document)


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


def _reason(report: Any) -> str:
    """Why a check was skipped or failed: of a long text its beginning and its end."""
    told = report.longrepr
    if report.skipped and isinstance(told, tuple):
        return str(told[2]).removeprefix("Skipped: ")
    crash = getattr(told, "reprcrash", None)
    text = crash.message if crash is not None else str(told)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 3]}\n...\n{text[-LONGEST // 3 * 2 :]}"


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "begin":
        return begin(Path(arguments[1]))
    if len(arguments) == 3 and arguments[0] == "end":
        end(Path(arguments[1]), arguments[2])
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
