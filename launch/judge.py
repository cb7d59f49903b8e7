"""Why an attempt ended, and whether another one could end better.

A rank that fails writes why (`Papers.failures`); one that is killed cannot. The cause is the earliest failure that is
not the loss of a peer: one rank's failure is followed by those of all others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perilune.launch.job import BAD_INPUT, PREEMPTED, Job, Papers
from perilune.launch.watch import Hang, read_beat

# Kinds of failure that a rank records, and what it means that one comes again at the same step.
TWICE = {
    "bad_data": "the data of that step is damaged: repair or copy the dataset again (`perilune data verify`)",
    "non_finite": "the run diverges there: a lower optim.lr, or an earlier checkpoint with other data, may help",
    "out_of_memory": "it does not fit: fewer rows a micro-batch, or more parallel.pp, tp or ep",
    "error": "the same error at the same step is no accident",
}
_WAIT_S, _LONGEST_S = 1.0, 300.0  # before the first restart, doubled with each; and the most


@dataclass(frozen=True)
class Failure:
    """A rank's record of why it ended."""

    kind: str  # bad_input, bad_checkpoint, bad_data, non_finite, out_of_memory, lost_peer, error
    rank: int
    step: int  # the one under way
    error: str
    time: float
    host: str
    folder: str  # of bad_checkpoint

    @property
    def told(self) -> str:
        """One line."""
        return f"rank {self.rank} on {self.host}, step {self.step}: {self.kind.replace('_', ' ')}: {self.error}"


@dataclass(frozen=True)
class Verdict:
    """What is to be done after an attempt."""

    again: bool
    why: str  # a sentence or two, for people
    kind: str  # done, preempted, stopped, hang, lost, or a kind of failure
    code: int  # exit code if it is the last attempt
    wait_s: float = 0.0  # before the next
    counts: bool = True  # among `Job.restarts`
    rank: int | None = None
    step: int | None = None


def begin(papers: Papers) -> None:
    """Forget the signs of an earlier launch, whose attempts have the same numbers; its events stay."""
    for folder in (papers.beats, papers.stacks, papers.failures):
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink(missing_ok=True)


def note(papers: Papers, event: str, **more: Any) -> None:
    """Add a line to the events of the run. What cannot be written, on a full disk, is said on stderr, and no error."""
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **more})
    try:
        papers.folder.mkdir(parents=True, exist_ok=True)
        with papers.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"perilune: {papers.events} cannot be written ({error.strerror}): {line}", file=sys.stderr, flush=True)


def events(papers: Papers) -> list[dict[str, Any]]:
    """Of every launch of the run, oldest first; a line half written is left out."""
    found = []
    try:
        lines = papers.events.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def failures(papers: Papers, attempt: int) -> list[Failure]:
    """What the ranks of an attempt recorded, earliest first."""
    found = []
    for file in papers.failures.glob(f"attempt_{attempt:03d}_rank_*.json"):
        try:
            body = json.loads(file.read_text())
            rank = int(file.stem.rpartition("_")[2])
            words = (str(body["error"]), float(body["time"]), str(body.get("host", "?")), str(body.get("folder", "")))
            found.append(Failure(str(body["kind"]), rank, int(body["step"]), *words))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda failure: failure.time)


def exits_file(papers: Papers, attempt: int) -> Path:
    """{"first": rank whose end ended the others, "exits": {rank: exit code, not 0}}, where a launcher knows them."""
    return papers.failures / f"attempt_{attempt:03d}_exits.json"


def record_hang(papers: Papers, attempt: int, hang: Hang) -> None:
    """For a `judge` of another process: why what it judges was ended."""
    papers.failures.mkdir(parents=True, exist_ok=True)
    _hang_file(papers, attempt).write_text(json.dumps(vars(hang)) + "\n")


def _recorded_hang(papers: Papers, attempt: int) -> Hang | None:
    try:
        found = json.loads(_hang_file(papers, attempt).read_text())
        return Hang(**found | {"ranks": tuple(found["ranks"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hang_file(papers: Papers, attempt: int) -> Path:
    return papers.failures / f"attempt_{attempt:03d}_hang.json"


def killed_ranks(papers: Papers, attempt: int) -> list[int]:
    """Ranks that a launcher saw end by SIGKILL, or another signal that is none of ours."""
    try:
        exits = json.loads(exits_file(papers, attempt).read_text())["exits"]
        return sorted(int(rank) for rank, code in exits.items() if code < 0 and code != -signal.SIGTERM)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def cause(papers: Papers, attempt: int) -> Failure | None:
    """The failure that the others followed; None where no rank recorded one."""
    found = failures(papers, attempt)
    return next((one for one in found if one.kind != "lost_peer"), None)


def judge(
    job: Job, papers: Papers, attempt: int, code: int, *, hang: Hang | None = None, restarts: int | None = None
) -> Verdict:
    """What follows from an attempt that ended with `code` (-N: killed by signal N), or was ended for `hang`, given here
    or recorded (`record_hang`).

    `restarts` is how many were counted so far (default: `attempt`). Sets a damaged checkpoint aside, by a rename.
    Does nothing else: it can be asked again.
    """
    left = job.restarts - (attempt if restarts is None else restarts)
    if hang is None and code == 0:
        return Verdict(False, "done", "done", 0)
    if hang is None and code == PREEMPTED:
        return Verdict(False, "preempted, with a checkpoint", "preempted", PREEMPTED)
    hang = hang or _recorded_hang(papers, attempt)
    final = code if code > 0 else 1
    found = None if hang else cause(papers, attempt)
    wait = min(_LONGEST_S, _WAIT_S * 2 ** max(0, job.restarts - left))
    if hang is not None:
        return _within(left, Verdict(True, hang.why, "hang", 1, wait, rank=hang.ranks[0], step=hang.step))
    if found is None:
        return _lost(papers, attempt, code, left, wait, final)
    verdict = Verdict(False, found.told, found.kind, final, wait, rank=found.rank, step=found.step)
    if found.kind == "bad_input":
        return Verdict(**vars(verdict) | {"code": BAD_INPUT})
    if found.kind == "bad_checkpoint":
        return _aside(job, found, verdict)
    before = _same_before(papers, attempt, found)
    if before is not None:
        why = f"{found.told}. Attempt {before} failed so too: {TWICE.get(found.kind, TWICE['error'])}"
        return Verdict(**vars(verdict) | {"why": why})
    return _within(left, Verdict(**vars(verdict) | {"again": True}))


def _within(left: int, verdict: Verdict) -> Verdict:
    """`verdict`, if there is a restart left for it."""
    if left > 0:
        return verdict
    return Verdict(**vars(verdict) | {"again": False, "why": f"{verdict.why}. No restart is left"})


def _lost(papers: Papers, attempt: int, code: int, left: int, wait: float, final: int) -> Verdict:
    """No rank said why: the loss of a process or a node."""
    if code == BAD_INPUT:  # refused before any rank could record it
        return Verdict(False, "refused as bad input; the first rank's log says why", "bad_input", BAD_INPUT)
    lost = [one.rank for one in failures(papers, attempt)]
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    killed = killed_ranks(papers, attempt)
    who = f"rank {', '.join(map(str, killed[:8]))}" if killed else "a process"
    if number == signal.SIGKILL:
        how = (
            f"{who} was killed by SIGKILL: by somebody, by the kernel because memory was short (`dmesg` says so), "
            "or with its node"
        )
    elif number:
        how = f"{who} was killed by {_signal(number)}"
    else:
        how = f"a process ended with exit code {code} and left no record"
    if lost:
        how += f"; rank {', '.join(map(str, lost[:8]))} lost {'its' if len(lost) == 1 else 'their'} peer"
    steps = [beat["step"] for rank in lost if (beat := read_beat(papers, rank))]
    return _within(left, Verdict(True, how, "lost", final, wait, step=max(steps, default=None)))


def _aside(job: Job, found: Failure, verdict: Verdict) -> Verdict:
    """Rename a damaged checkpoint of the run, so that it goes on from the one before it."""
    folder = Path(found.folder)
    if folder.parent != job.run_dir / "checkpoints" or job.restarts == 0:
        return Verdict(**vars(verdict) | {"code": BAD_INPUT})  # of another run, or nobody asked for a restart
    aside = folder.with_name(f"damaged_{folder.name}")
    for number in range(1, 1000):
        if not aside.exists():
            break
        aside = folder.with_name(f"damaged_{folder.name}_{number}")
    try:
        if folder.exists():  # else it was set aside when this was asked before
            os.rename(folder, aside)
    except OSError as error:
        return Verdict(**vars(verdict) | {"why": f"{found.told}. It cannot be set aside: {error}"})
    why = f"{found.told}. It is kept as {aside.name}; the run goes on from the checkpoint before it, or from its start"
    return Verdict(**vars(verdict) | {"again": True, "why": why, "counts": False, "wait_s": 0.0})


def _same_before(papers: Papers, attempt: int, found: Failure) -> int | None:
    """The number of an earlier attempt with the same cause at the same step; None if there is none."""
    for earlier in range(attempt):
        other = cause(papers, earlier)
        if other is None or (other.kind, other.step) != (found.kind, found.step):
            continue
        if found.kind != "error" or _shape(other.error) == _shape(found.error):
            return earlier
    return None


def _shape(error: str) -> str:
    """An error's text without what differs between two that are the same: numbers, addresses."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", error.partition("\n")[0])


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
