"""PARENT STDOUT STDERR COMMAND...: becomes COMMAND, which the kernel ends when the process PARENT ends.

A file of its own, run with nothing but the standard library, because between fork and exec a process with threads may
do almost nothing. STDOUT and STDERR are files to append to; `-`: as inherited; STDOUT `@`: as inherited with
LOCAL_RANK 0, and else where STDERR goes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; it survives the exec


def main(arguments: list[str]) -> None:
    """Returns only if the parent is gone already."""
    parent, out, err, *command = arguments
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the kernel was told
            return
    if out == "@":
        out = "-" if os.environ.get("LOCAL_RANK") == "0" else err
    for name, number in ((out, 1), (err, 2)):
        if name != "-":
            file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(file, number)
            os.close(file)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"perilune: {command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(1)
