"""The launchers, by the name that a run's papers have of them; and that one run is started by one of them at a time."""

from __future__ import annotations

import importlib
import os
from typing import Any

from perilune.launch.job import JobError, NoAnswer, Papers

_MODULES = {"local": "local", "slurm": "slurm", "ray": "ray_jobs"}  # name in `Papers.where` -> module of launch/


def launcher(where: dict[str, Any]) -> Any:
    """The module of the launcher that started a run: its `state(where)` and `cancel(where, now)`. Raises JobError."""
    name = where.get("launcher", "")
    if name not in _MODULES:
        raise JobError(f"launched by {name!r}, which is none of {', '.join(_MODULES)}")
    return importlib.import_module(f"perilune.launch.{_MODULES[name]}")


def refuse_second(papers: Papers) -> None:
    """Raise JobError where the run is under way, whoever started it: two launches would write over each other's files.
    Raise NoAnswer where its cluster does not say. One on another machine, which cannot be asked, is taken for ended.
    """
    try:
        _, other = papers.read()
        there = launcher(other).state(other)
    except JobError:
        return
    if other.get("pid") == os.getpid():
        return
    if there.startswith("unknown"):
        raise NoAnswer(
            f"{papers.run_dir} may be under way: {there.removeprefix('unknown: ')}. Try again when it answers; if it "
            f"is gone for good, remove {papers.where}"
        )
    if not there.startswith(("running", "pending")):
        return
    who = f"process {other['pid']}" if "pid" in other else f"{other['launcher']}'s job {_jobs(other)}"
    raise JobError(
        f"{papers.run_dir} is being trained already, by {who} ({there}): wait, end it by `perilune jobs cancel "
        f"{papers.run_dir}`, or name another --run"
    )


def _jobs(where: dict[str, Any]) -> str:
    return ", ".join(map(str, where.get("jobs", []))) or str(where.get("job") or where.get("mark", ""))
