"""What a process on a CPU frees, it keeps."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys, torch
from perilune.parallel import memory
if sys.argv[1] == "keep" and not memory.keep_freed():
    sys.exit(3)
for _ in range(10):  # an aligned block is not found again in a hole of just its size (glibc 2.36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str) -> int:
    """Page faults of 64 MB that were written and freed some times before."""
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_found_again_without_page_faults() -> None:
    pages = (64 << 20) // 4096
    assert faults("keep") < pages / 10
    assert faults("as it is") > pages / 10  # huge pages would need fewer; else this file is needed no longer
