"""`environment.json` of a run: with what, and on what, each start of it ran. Enough to tell two runs' machines apart.

Names of hosts and users are left out, as a report is for showing round; of the variables, those that change what or how
fast a run computes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field, TypeAdapter, ValidationError

from perilune.pretrain import doctor, secrets
from perilune.pretrain.errors import InputError

NAME = "environment.json"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
PREFIXES = ("NCCL_", "NVTE_", "CUDA_DEVICE_", "CUBLAS_", "PYTORCH_", "TORCH_NCCL_", "GLOO_")


class _Gpu(TypedDict):
    name: str
    memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]


class _Start(TypedDict, total=False):
    """What the report takes apart of a start; the rest is shown as it is."""

    command: list[str]
    versions: dict[str, Any]
    memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    gpus: list[_Gpu]
    variables: dict[str, Any]


_STARTS = TypeAdapter(list[_Start])


def environment(world: int, step: int = 0) -> dict[str, Any]:
    """This start of a run of `world` processes, at `step`: versions, machine, GPUs, variables, command. JSON-plain."""
    import psutil
    import torch

    names = dict.fromkeys(r.name for extra in (None, "gpu") for r in doctor.requirements(extra))
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "world_size": world,
        "command": ["perilune", *map(secrets.hidden, sys.argv[1:])],
        "source": _commit(),
        "versions": {name: found for name in ["perilune", *names] if (found := doctor.installed(name)) is not None},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": doctor.cpu_name(),
        "cores": doctor.usable_cores(),
        "memory_bytes": min(psutil.virtual_memory().total, doctor.container_memory() or sys.maxsize),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "variables": {
            key: secrets.hidden(value)
            for key, value in sorted(os.environ.items())
            if (key in VARIABLES or any(key.startswith(prefix) for prefix in PREFIXES)) and not secrets.NAME.search(key)
        },
    }


def record(run_dir: Path, world: int, step: int) -> None:
    """Append this start to `run_dir`/environment.json, whole or not at all; one process of a run calls it.

    Raises InputError where the file is there and cannot be read.
    """
    file = run_dir / NAME
    starts = [*read(run_dir), environment(world, step)]
    partial = file.with_name(f"{NAME}.partial")
    partial.write_text(json.dumps({"starts": starts}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The starts recorded in `run_dir`, oldest first; none without a record. Raises InputError if it is damaged."""
    file = run_dir / NAME
    try:
        starts = json.loads(file.read_bytes())["starts"]
        _STARTS.validate_python(starts, strict=True)
    except FileNotFoundError:
        return []
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, ("starts", *wrong["loc"])))
        raise InputError(f"{file}: not a record of environments ({place}: {wrong['msg']}); move it away") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not a record of environments ({error!r}); move it away") from error
    return starts


def _commit() -> str | None:
    """`git describe` of the checkout that this file lies in; None for an installed wheel or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a checkout on a disk that does not answer
        return None
    return done.stdout.strip() or None
