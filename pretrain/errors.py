"""The two ways a command ends early on purpose; `pretrain/cli.py` turns them into exit codes."""


class InputError(ValueError):
    """Bad input of the user: the message holds the values, the rule and the remedy. Exit code 2."""


class Preempted(Exception):
    """The run was asked to stop and has written its checkpoint. Exit code 75 (try again later)."""
