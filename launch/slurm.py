"""A run as a Slurm job: its script (`launch/slurm_script.py`) written and submitted, asked about and cancelled."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from perilune.launch import slurm_script
from perilune.launch.job import Job, JobError, NoAnswer, Papers
from perilune.launch.launchers import held, refuse_second
from perilune.launch.slurm_script import Placement

_WAIT_S = 60.0  # for an answer of Slurm's
_ON_ITS_WAY_S = 2.0  # a submission that reached the controller before a question may be taken after it
# What Slurm's commands say where the controller, or for sacct the accounting's database, is away or overloaded.
_AWAY = re.compile(
    r"(?i)unable to contact|timed out|zero bytes|standby|temporarily|connection refused|talking to the database"
)
# What squeue says of jobs that wait, and of those that are over; any other has its nodes, as one whose nodes start up.
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
         "PREEMPTED", "REVOKED")  # fmt: skip
_ENDED = {"COMPLETED": "done", "CANCELLED": "cancelled", "TIMEOUT": "failed", "FAILED": "failed", "NODE_FAIL": "failed"}


def runs_of(job: Job, placement: Placement) -> list[Job]:
    """The job of each run: one, or one a task of a sweep, each with its own run directory."""
    if not placement.sweep:
        return [job]
    found = []
    at = job.arguments.index("--run")
    rest = (*job.arguments[:at], *job.arguments[at + 2 :])
    for folder, words in slurm_script.tasks_of(placement.sweep):
        run = job.run_dir / folder
        found.append(dataclasses.replace(job, arguments=(*rest, *words, "--run", str(run)), run_dir=run))
    return found


def describe(job: Job, placement: Placement, file: Path) -> str:
    """Exactly what `submit` writes and runs."""
    lines = [f"# {file}", slurm_script.script(job, placement, file).rstrip("\n"), "", "# submitted by:"]
    lines += ["# " + subprocess.list2cmdline(words) for words in slurm_script.commands(placement, file)]
    return "\n".join(lines)


def check() -> None:
    """Raises JobError where Slurm's commands are missing, NoAnswer where its controller does not answer."""
    for name in ("sbatch", "squeue", "scontrol"):
        if shutil.which(name) is None:
            raise _missing(name)
    _slurm(["squeue", "--noheader", "--me", "--format=%i"])


def submit(job: Job, placement: Placement, file: Path) -> list[str]:
    """Write the script and submit it; returns the job numbers. Raises JobError with what Slurm said, NoAnswer where it
    said nothing: the jobs may be taken, and `state` finds them.

    Where Slurm takes no job, what is recorded of an earlier launch stays.
    """
    runs = runs_of(job, placement)
    text = slurm_script.script(job, placement, file)
    with held(Papers(job.run_dir)):  # of a sweep, the folder that has them all
        for one in runs:
            refuse_second(Papers(one.run_dir), look=True)
        return _submit(job, runs, placement, file, text)


def _submit(job: Job, runs: list[Job], placement: Placement, file: Path, text: str) -> list[str]:
    new = file.with_suffix(".new")
    try:
        (job.run_dir / "launch").mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        new.chmod(0o755)
        os.replace(new, file)
    except OSError as error:
        raise JobError(f"{file} cannot be written: {error}") from error
    kept = _kept([Papers(one.run_dir) for one in (*runs, job)])
    mark = f"perilune_{secrets.token_hex(8)}"
    numbers: list[str] = []

    def note(**more: Any) -> None:
        for index, one in enumerate(runs):
            names = [f"{number}_{index}" for number in numbers] if placement.sweep else numbers
            task = {"task": index} if more and placement.sweep else {}
            Papers(one.run_dir).write(one, {"launcher": "slurm", "jobs": names, **more, **task})

    note(mark=mark)  # before a job can start, or the answer be lost
    for one in runs:
        (Papers(one.run_dir).folder / "outcome").unlink(missing_ok=True)
    try:
        for words in slurm_script.commands(placement, file, mark):
            words = [word.replace("afterany:JOB", f"afterany:{numbers[-1]}") if numbers else word for word in words]
            numbers.append(_slurm(words).split(";")[0].strip())
    except NoAnswer:
        raise
    except JobError:
        if numbers:
            note()
        else:
            for path, content in kept.items():
                path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        raise
    note()
    if placement.sweep:  # so that `perilune jobs` can be asked about all of them together
        Papers(job.run_dir).write(job, {"launcher": "slurm", "jobs": numbers})
    return numbers


def _kept(papers: list[Papers]) -> dict[Path, bytes | None]:
    """What an earlier launch recorded; None for what is not there."""
    paths = [path for one in papers for path in (one.job, one.where, one.folder / "outcome")]
    return {path: path.read_bytes() if path.exists() else None for path in paths}


def state(where: dict[str, Any]) -> str:
    """`running`, `running (suspended)`, `pending (REASON)`, `done`, ... of its newest job that is not waiting,
    as Slurm says it; `unknown: WHY` where it does not."""
    try:
        jobs = _jobs(where)
        live = _queue(jobs)
    except JobError as error:
        return f"unknown: {error}"
    if not jobs:
        return "not submitted"
    kinds = [kind for _, kind, _ in live if kind not in _WAITS]
    if kinds:
        return "running" if {"RUNNING", "COMPLETING"} & set(kinds) else f"running ({kinds[0].lower()})"
    if live:
        return f"pending ({live[0][2]})"
    for number in reversed(jobs):
        ended = _ended(number)
        if ended:
            return ended
    return "ended"


def cancel(where: dict[str, Any], now: bool) -> None:
    """Take back what waits, and end what runs: with a checkpoint, or `now`. Raises JobError where nothing is there."""
    jobs = _jobs(where)
    live = _queue(jobs)
    if not live:
        raise JobError(f"Slurm has no job {', '.join(jobs) or 'of this run'} that waits or runs; nothing to cancel")
    waiting = [number for number, kind, _ in live if kind in _WAITS]
    running = [number for number, kind, _ in live if number not in waiting]
    if waiting:
        _slurm(["scancel", *waiting])
    if running:
        _slurm(["scancel", *([] if now else ["--signal=TERM", "--batch"]), *running])


def _jobs(where: dict[str, Any]) -> list[str]:
    """Numbers of a run's jobs, the oldest first: those recorded, and those whose submission was not answered, or whose
    submitter was killed before it wrote them down; Slurm knows these by their mark. Raises JobError."""
    found = {str(number) for number in where.get("jobs", [])}
    if mark := where.get("mark"):
        task = where.get("task")
        marked = _marked(mark)
        if not marked and not found:
            time.sleep(_ON_ITS_WAY_S)
            marked = _marked(mark)
        found |= {number for number in marked if task is None or number.endswith(f"_{task}")}
    return sorted(found, key=lambda number: [int(part) for part in re.findall(r"\d+", number)])


def _marked(mark: str) -> list[str]:
    """Numbers of the jobs that were submitted with `mark`: of the queue and what has just left it, or accounted for.
    Raises NoAnswer where either does not say."""
    text = _slurm(["squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%o"])
    if mark not in text:
        words = ["sacct", "--noheader", "--parsable2", "--allocations", "--starttime=now-30days"]
        try:
            text = _slurm([*words, "--format=JobID,SubmitLine"])
        except NoAnswer:  # the job may be accounted for
            raise
        except JobError:  # there is no accounting
            return []
    return [line.partition("|")[0] for line in text.splitlines() if mark in line.partition("|")[2]]


def _queue(jobs: list[str]) -> list[tuple[str, str, str]]:
    """(number, state, reason) of those that Slurm still has to do with."""
    text = ""
    for number in jobs:  # together, one that Slurm has forgotten would hide the others
        try:
            text += _slurm(["squeue", "--noheader", "--array", f"--jobs={number}", "--format=%i|%T|%r"])
        except JobError as error:
            if "Invalid job id" not in str(error):
                raise
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    return [(row[0], row[1], row[2]) for row in rows if row[1] not in _OVER]


def _ended(number: str) -> str:
    """How a job ended: from the accounting, or for some minutes from the controller; empty if neither knows."""
    for words, mark in (
        (["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}", "--format=State,ExitCode"], ""),
        (["scontrol", "--oneliner", "show", "job", number], "JobState="),
    ):
        try:
            text = _slurm(words)
        except JobError:
            continue
        if "ExitCode=75:0" in text or "|75:0" in text:
            return "ended with a checkpoint"
        found = text.partition(mark)[2] if mark else text.replace("|", " ")
        if found.split():
            return _ENDED.get(found.split()[0], found.split()[0].lower())
    return ""


def _slurm(words: list[str]) -> str:
    """The stdout of one of Slurm's commands. Raises JobError with its stderr."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    except FileNotFoundError as error:
        raise _missing(words[0]) from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{words[0]} gave no answer within {_WAIT_S:g} s: ask `sinfo` whether Slurm is up") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        kind = NoAnswer if done.returncode < 0 or _AWAY.search(said) else JobError
        raise kind(f"{words[0]}: {said}")
    return done.stdout


def _missing(command: str) -> JobError:
    return JobError(f"{command} is not here: submit from a host of the cluster, or look at --dry-run anywhere")


def record(job: Job, placement: Placement, file: Path, numbers: list[str]) -> str:
    """The JSON of --json."""
    runs = [{"run": str(one.run_dir), "job": json.loads(one.to_json())} for one in runs_of(job, placement)]
    found = {"job": json.loads(job.to_json()), "runs": runs, "script": str(file), "jobs": numbers}
    if not numbers:
        found |= {"text": slurm_script.script(job, placement, file), "commands": slurm_script.commands(placement, file)}
    return json.dumps(found, indent=2)
