"""A Python script about Triton kernels in a process of its own: Triton reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def run(script: str, cache: Path, **variables: str) -> dict[str, list[float]]:
    """What `script` prints as JSON; tests/shared is its first argument, and `cache` takes what is compiled."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), **variables},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found
