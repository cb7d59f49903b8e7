"""A wish to stop that comes too late."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from perilune.pretrain.signals import Stop

stop = Stop()
os.kill(os.getpid(), {number})
assert stop.asked

class Last:
    def __init__(self):
        self.kill, self.pid = os.kill, os.getpid()
    def __del__(self):  # Python has put the system's handlers back
        self.kill(self.pid, {number})

last = Last()
{over}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_changes_nothing(number: int) -> None:
    codes = []
    for over in ("", "stop.over()"):
        program = PROGRAM.format(number=int(number), over=over)
        codes.append(subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode)
    assert codes == [-number, 0]  # the first: what happens without
