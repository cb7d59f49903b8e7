"""What one process of `perilune doctor --cluster` can say and measure by itself.

A node is what PERILUNE_NODE_NAME says, else SLURMD_NODENAME, else the host's name: the first two tell apart the nodes
that share one host.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perilune.pretrain import doctor

if TYPE_CHECKING:
    import torch

SECONDS = 1.0  # a matrix product, a disk: measured for this long
DISK_BLOCK, DISK_BYTES = 4 << 20, 256 << 20
VERSIONS = ("perilune", "torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn-4")


def node_name() -> str:
    """What tells this node from others."""
    return os.environ.get("PERILUNE_NODE_NAME") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts() -> dict[str, Any]:
    """This process, its node, and what must be equal everywhere."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: doctor.installed(name) for name in VERSIONS}
    versions["perilune's source"] = _source()
    versions["CUDA of torch"] = torch.version.cuda
    if torch.version.cuda:
        with contextlib.suppress(Exception):  # a torch without NCCL
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    versions["driver"] = _driver()
    versions["GPU"] = torch.cuda.get_device_name(local) if local < gpus else None
    return {
        "node": node_name(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "has_gpu": local < gpus,
        "folder": str(run_folder()),
        "versions": versions,
    }


def _source() -> str:
    """A digest of Perilune's own code: a checkout that was not updated on one node has the version of the others."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for top in ("pretrain", "parallel", "moe", "vision", "kernels", "launch"):
        for file in sorted((root / top).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def device_of(nccl: bool) -> torch.device:
    """This process's own."""
    import torch

    if not nccl:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def settle(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of square matrix products, all processes at the same time: bf16 on a GPU, fp32 on a CPU."""
    import torch

    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    out = a @ a
    settle(device)
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < SECONDS:
        for _ in range(10):
            torch.mm(a, a, out=out)
        settle(device)
        done += 10
    return 2 * n**3 * done / taken


def run_folder() -> Path:
    """The run directory under a launcher, else the working directory."""
    launched = os.environ.get("PERILUNE_LAUNCH_DIR")
    return Path(launched).parent if launched else Path.cwd()


def marker(token: str) -> Path:
    """A file by which nodes find out whether they share the run directory."""
    return run_folder() / f".doctor_{token}"


def disk_rate(rank: int, token: str) -> dict[str, Any]:
    """Of the run directory: bytes a second of writing with the sync at the end, seconds of syncing 4 KiB, is it shared.

    All nodes write at the same time, as they do in a checkpoint.
    """
    folder = run_folder()
    shared = marker(token).exists()  # before anything else looks: a network disk remembers what was not there
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".doctor_{token}_{rank}"
    block = os.urandom(DISK_BLOCK)  # of a disk that compresses, zeros would be a flattering measure
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        start, written = time.perf_counter(), 0
        while written < DISK_BYTES and time.perf_counter() - start < SECONDS:
            written += os.write(handle, block)
        os.fsync(handle)
        rate = written / (time.perf_counter() - start)
        syncs: list[float] = []
        while len(syncs) < 20 and sum(syncs) < SECONDS:
            start = time.perf_counter()
            os.write(handle, block[:4096])
            os.fsync(handle)
            syncs.append(time.perf_counter() - start)
        return {"write": rate, "sync_s": statistics.median(syncs), "shared": shared}
    finally:
        os.close(handle)
        file.unlink()
