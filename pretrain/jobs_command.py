"""`perilune jobs`: what is known of a launched run from its papers, and from wherever it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from perilune.launch import judge as judging
from perilune.launch import launchers
from perilune.launch.job import Job, JobError, Papers
from perilune.launch.watch import Watch, read_beat
from perilune.pretrain.errors import InputError

_HUNG = 3  # exit code of `jobs watch`
_ASK_S = 5.0  # between two questions to a cluster whether a run whose logs are followed goes on
# Of a run that may write more: it waits for its next attempt; its cluster does not say; it is on another machine.
_GOES_ON = ("running", "pending", "stopping", "unknown", "on ")


def status(run_dir: Path, as_json: bool) -> int:
    """`perilune jobs status`; returns the exit code. Raises InputError where no run was launched."""
    papers, job, where = _papers(run_dir)
    found = collect(papers, job, where)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    last = found["last_event"]
    for name, value in (
        ("run", str(run_dir)),
        ("launcher", found["launcher"]),
        ("state", found["state"]),
        ("step", f"{found['step']} of {found['steps']}" if found["steps"] else "none yet"),
        ("processes", f"{found['processes']}, attempt {found['attempt']}"),
        ("restarts", f"{found['restarts']} of {job.restarts}"),
        ("behind", _behind(found)),
        ("last event", f"{last['time']} {last['event']}: {last.get('why', '')}".rstrip(": ") if last else "none"),
    ):
        table.add_row(Text(name, "bold"), Text(value))  # an error's text may have brackets, which are no markup
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    ranks = Table(
        "rank", "step", "phase", "last sign", "host", "process", box=None, pad_edge=False, title_justify="left"
    )
    for beat in sorted(found["ranks"], key=lambda beat: (beat["step"], -beat["age_s"]))[:16]:
        cells = (beat["rank"], beat["step"], beat["phase"], f"{beat['age_s']:.0f} s ago", beat["host"], beat["pid"])
        ranks.add_row(*(Text(str(cell)) for cell in cells))
    if found["ranks"]:
        console.print(ranks)
        if len(found["ranks"]) > 16:
            console.print(f"and {len(found['ranks']) - 16} more, further on")
    return 0


def collect(papers: Papers, job: Job, where: dict[str, Any]) -> dict[str, Any]:
    """What `jobs status --json` prints; `age_s` is seconds since a rank's last heartbeat, by this host's clock."""
    seen = judging.events(papers)
    launch = [index for index, event in enumerate(seen) if event["event"] == "attempt" and event["attempt"] == 0]
    seen = seen[launch[-1] :] if launch else seen
    starts = [event for event in seen if event["event"] == "attempt"]
    world = starts[-1]["processes"] if starts else job.world
    attempt = starts[-1]["attempt"] if starts else 0
    beats = [(rank, beat) for rank in range(world) if (beat := read_beat(papers, rank)) is not None]
    ranks = [
        {**{key: beat.get(key) for key in ("step", "phase", "host", "pid", "attempt")}, "rank": rank,
         "age_s": round(max(0.0, time.time() - float(beat.get("time", 0))), 1)}
        for rank, beat in beats
    ]  # fmt: skip
    return {
        "launcher": where["launcher"],
        "state": launcher(where).state(where),
        "step": min((beat["step"] for _, beat in beats), default=0),
        "steps": max((beat.get("of", 0) for _, beat in beats), default=0),
        "processes": world,
        "attempt": attempt,
        "restarts": sum(event["event"] == "restart" for event in seen),
        "last_event": seen[-1] if seen else None,
        "ranks": ranks,
        "where": where,
    }


def _behind(found: dict[str, Any]) -> str:
    if not found["ranks"]:
        return "no rank has given a sign yet"
    slow = min(found["ranks"], key=lambda beat: (beat["step"], -beat["age_s"]))
    return f"rank {slow['rank']} on {slow['host']}, step {slow['step']}, {slow['phase']}, {slow['age_s']:.0f} s ago"


def logs(run_dir: Path, rank: int | None, lines: int, follow: bool) -> int:
    """`perilune jobs logs`; returns the exit code."""
    papers, _, where = _papers(run_dir)
    files = _log_files(papers, rank)
    if not files:
        of = "" if rank is None else f" of rank {rank}"
        raise InputError(f"{papers.logs} holds no log{of}; `perilune jobs status {run_dir}` says how far it is")
    ends: dict[Path, int] = {}
    for file in files:
        ends[file] = _tail(file, lines, title=len(files) > 1)
    alive, asked = True, 0.0
    while follow:
        if (now := time.monotonic()) - asked >= (_ASK_S if where["launcher"] != "local" else 0.0):
            asked = now
            alive = launcher(where).state(where).startswith(_GOES_ON)
        for file in _log_files(papers, rank):
            ends[file] = _more(file, ends.get(file, 0), title=len(files) > 1)
        if not alive:
            break
        time.sleep(0.5)
    return 0


def _log_files(papers: Papers, rank: int | None) -> list[Path]:
    """The ranks' logs, those of ranks that failed last, in the order in which they failed, first."""
    numbers = {}
    for file in papers.logs.glob("rank_*.log"):
        word = file.stem.removeprefix("rank_")
        if word.isdigit() and rank in (None, int(word)):
            numbers[int(word)] = file
    attempts = [int(file.name.split("_")[1]) for file in papers.failures.glob("attempt_*_rank_*.json")]
    failed = [one.rank for one in judging.failures(papers, max(attempts))] if attempts else []
    if attempts and (cause := judging.cause(papers, max(attempts))):
        failed.insert(0, cause.rank)
    order = [number for number in dict.fromkeys(failed) if number in numbers]
    return [numbers[number] for number in [*order, *sorted(numbers.keys() - set(order))]]


def _tail(file: Path, lines: int, title: bool) -> int:
    """Print its last lines; returns its length in bytes."""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 65536 - 512 * lines))
        text = stream.read().decode("utf-8", "replace")
    if title:
        print(f"==> {file} <==")
    print("\n".join(text.splitlines()[-lines:]), flush=True)
    return size


def _more(file: Path, seen: int, title: bool) -> int:
    """Print what is behind the first `seen` bytes; returns the length."""
    size = file.stat().st_size
    if size > seen:
        with file.open("rb") as stream:
            stream.seek(seen)
            text = stream.read(size - seen).decode("utf-8", "replace")
        print((f"==> {file} <==\n" if title else "") + text, end="", flush=True)
    return size


def cancel(run_dir: Path, now: bool) -> int:
    """`perilune jobs cancel`; returns the exit code. Raises InputError where nothing runs."""
    papers, _, where = _papers(run_dir)
    mark = papers.folder / "cancelled"  # for a Slurm script that is being ended for another reason too
    try:
        mark.touch()
        launcher(where).cancel(where, now)
    except JobError as error:
        mark.unlink(missing_ok=True)  # the run goes on, and its time limit is no wish to end it
        raise InputError(str(error)) from error
    judging.note(papers, "cancelled", now=now)
    print("asked to end at once" if now else "asked to end with a checkpoint; the same launch continues it")
    return 0


def watch(run_dir: Path, attempt: int, world: int | None) -> int:
    """`perilune jobs watch`: until every rank is done (0), or some rank hangs (3, after a line that names it)."""
    papers, job, _ = _papers(run_dir)
    world = world or job.world
    watching = Watch(job, papers, attempt, world)
    every = min(5.0, max(0.2, min(job.hang_s, job.start_s) / 20))
    while True:
        hang = watching.check()
        if hang is not None:
            judging.record_hang(papers, attempt, hang)
            judging.note(papers, "hang", attempt=attempt, why=hang.why, ranks=list(hang.ranks), step=hang.step)
            print(hang.why, flush=True)
            return _HUNG
        beats = [read_beat(papers, rank) for rank in range(world)]
        if all(beat and beat["phase"] == "done" and beat.get("attempt") == attempt for beat in beats):
            return 0
        time.sleep(every)


def judge(run_dir: Path, attempt: int, code: int, restarts: int | None, as_json: bool) -> int:
    """`perilune jobs judge`: 0 if another attempt could end better, else 1; the reason on stdout."""
    papers, job, _ = _papers(run_dir)
    verdict = judging.judge(job, papers, attempt, code, restarts=restarts)
    event = "restart" if verdict.again else verdict.kind if verdict.kind in ("done", "preempted") else "gave_up"
    about = {"kind": verdict.kind, "rank": verdict.rank, "step": verdict.step, "code": code}
    judging.note(papers, event, attempt=attempt, why=verdict.why, **about)
    print(json.dumps(vars(verdict)) if as_json else verdict.why, flush=True)
    return 0 if verdict.again else 1


def launcher(where: dict[str, Any]) -> Any:
    """As `launchers.launcher`. Raises InputError."""
    try:
        return launchers.launcher(where)
    except JobError as error:
        raise InputError(str(error)) from error


def _papers(run_dir: Path) -> tuple[Papers, Job, dict[str, Any]]:
    papers = Papers(run_dir.resolve())
    try:
        return papers, *papers.read()
    except JobError as error:
        raise InputError(str(error)) from error
