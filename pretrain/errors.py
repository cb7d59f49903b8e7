"""The two ways a command ends early on purpose; `pretrain/cli.py` turns them into exit codes."""

import os
from pathlib import Path


class InputError(ValueError):
    """Bad input of the user: the message holds the values, the rule and the remedy. Exit code 2."""


class Unanswered(InputError):
    """A cluster does not answer: nothing is wrong with what was asked, and later it may do."""


def make_folder(path: Path) -> None:
    """Make the folder `path`, and those above it. Raises InputError where it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {path} cannot be made: {error.strerror}; name another --out") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"the folder {path} cannot be written; name another --out")


class Preempted(Exception):
    """The run was asked to stop and has written its checkpoint. Exit code 75 (try again later)."""
