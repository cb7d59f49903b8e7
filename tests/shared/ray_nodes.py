"""A Ray cluster of `tests/shared/ray_cluster.py` in a process of its own, with tokens on."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

PERILUNE = str(Path(sys.executable).with_name("perilune"))
TOKEN = secrets.token_hex(32)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


class Nodes:
    """Two nodes, or as many as `count` says, each of so many CPUs, be there as many or not."""

    def __init__(self, count: int = 2, cpus: int = 2) -> None:
        program = str(Path(__file__).with_name("ray_cluster.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", program, str(count), str(cpus)], env=ENV, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.address = self._read()["address"]

    def tell(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError("the cluster ended")

    def end(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        _, left = psutil.wait_procs(processes, timeout=10)
        for process in left:
            process.kill()
        assert not [process for process in left if process.name() in ("raylet", "gcs_server")]
