"""A run that comes back: attempt after attempt, each watched, until one ends well or another would end as the last.

The launcher says how an attempt is started, asked to stop and ended (`Attempt`); what is common to all is here.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Protocol

from perilune.launch.job import PREEMPTED, Job, Papers
from perilune.launch.judge import Verdict, begin, judge, note
from perilune.launch.watch import Hang, Watch

__all__ = ["Attempt", "Hang", "Verdict", "Watch", "judge", "note", "supervise"]

_POLL_S = 0.1
_MORE_NODES_S = 30.0  # between two looks whether nodes have come back


class Attempt(Protocol):
    """The processes of one attempt, all together."""

    def poll(self) -> int | None:
        """None while it runs; else 0, 75, 2, another exit code, or -N where a rank was killed by signal N."""

    def stop(self) -> None:
        """Ask every rank to end with a checkpoint (SIGTERM). Returns at once."""

    def kill(self) -> None:
        """End it now; nothing of it is left when this returns."""


def supervise(
    job: Job,
    papers: Papers,
    start: Callable[[int, int], Attempt],
    *,
    available: Callable[[], int],
    asked: Callable[[], int],
    say: Callable[[str], None],
) -> int:
    """Run `job` to its end; returns its exit code: 0, 75 (stopped, with a checkpoint), 2, or that of what failed.

    `start(attempt, nodes)` begins attempt number `attempt` on `nodes` nodes; `available()` is how many nodes there are;
    `asked()` how often somebody has asked to stop: once, it ends with a checkpoint, twice, at once. `say` is told in
    sentences what happens; `papers.events` gets the same as JSON.
    """
    begin(papers)
    attempt = restarts = 0
    while True:
        nodes = _nodes(job, available, asked, say)
        if asked():
            note(papers, "stopped", attempt=attempt, code=PREEMPTED)
            return PREEMPTED
        if nodes == 0:
            why = f"{available()} nodes are there, and it needs {job.min_nodes or job.nodes}"
            note(papers, "gave_up", attempt=attempt, why=why)
            say(f"giving up: {why}")
            return 1
        note(papers, "attempt", attempt=attempt, nodes=nodes, processes=nodes * job.procs_per_node)
        running = start(attempt, nodes)
        try:
            code, hang, growing = _attend(job, papers, attempt, running, nodes, available, asked)
        except BaseException:
            running.kill()
            raise
        if asked():
            code = _when_asked(code, asked())
            note(papers, "stopped", attempt=attempt, code=code)
            return code
        verdict = judge(job, papers, attempt, code, hang=hang, restarts=restarts)
        if growing and verdict.kind == "preempted":
            note(papers, "more_nodes", attempt=attempt)
            attempt += 1
            continue
        if not verdict.again:
            _conclude(papers, attempt, code, verdict, say)
            return verdict.code
        restarts += verdict.counts
        about = {"kind": verdict.kind, "rank": verdict.rank, "step": verdict.step, "code": code}
        note(papers, "restart", attempt=attempt, restarts=restarts, why=verdict.why, wait_s=verdict.wait_s, **about)
        of = f"restart {restarts} of {job.restarts}" if verdict.counts else "restart"
        say(f"{verdict.why}. {of.capitalize()} in {verdict.wait_s:.0f} s")
        pause(verdict.wait_s, asked)
        attempt += 1


def _attend(
    job: Job,
    papers: Papers,
    attempt: int,
    running: Attempt,
    nodes: int,
    available: Callable[[], int],
    asked: Callable[[], int],
) -> tuple[int, Hang | None, bool]:
    """Until the attempt has ended: (exit code, the hang for which it was ended, whether it was, for more nodes)."""
    watch = Watch(job, papers, attempt, nodes * job.procs_per_node)
    every = min(5.0, max(0.2, min(job.hang_s, job.start_s) / 20))
    looked = grown = time.monotonic()
    told, growing = 0, False
    while (code := running.poll()) is None:
        if (times := asked()) > told:
            told = times
            if times == 1:
                running.stop()
            else:
                running.kill()
                return -signal.SIGKILL, None, False
        now = time.monotonic()
        if now - looked > every:
            looked = now
            if (hang := watch.check()) is not None:
                running.kill()
                return -signal.SIGKILL, hang, False
        if nodes < job.nodes and not told and not growing and now - grown > _MORE_NODES_S:
            grown = now
            if job.nodes_with(available()) > nodes:
                growing = True
                running.stop()
        time.sleep(_POLL_S)
    return code, None, growing


def _nodes(job: Job, available: Callable[[], int], asked: Callable[[], int], say: Callable[[str], None]) -> int:
    """Nodes for the next attempt, waited for as long as a start may take; 0: too few."""
    until, told = time.monotonic() + job.start_s, False
    while (nodes := job.nodes_with(available())) == 0 and time.monotonic() < until:
        if not told:
            say(f"waiting for nodes: {available()} of {job.min_nodes or job.nodes} are there")
            told = True
        if pause(1.0, asked):
            break
    return nodes


def _when_asked(code: int, times: int) -> int:
    """The exit code of a run that somebody ended."""
    if code in (0, PREEMPTED):
        return code
    if times == 1 and code in (-signal.SIGTERM, -signal.SIGINT):  # before it listened: nothing was begun
        return PREEMPTED
    return code if code > 0 else 1


def _conclude(papers: Papers, attempt: int, code: int, verdict: Verdict, say: Callable[[str], None]) -> None:
    """Record the end, and say it if it is a bad one."""
    about = {"attempt": attempt, "code": code, "kind": verdict.kind, "rank": verdict.rank, "step": verdict.step}
    if verdict.kind in ("done", "preempted"):
        note(papers, verdict.kind, **about)
        return
    note(papers, "gave_up", why=verdict.why, **about)
    say(f"giving up: {verdict.why}")


def pause(seconds: float, asked: Callable[[], int]) -> bool:
    """Sleep, unless somebody asks to stop; whether somebody did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not asked():
        time.sleep(min(0.1, max(0.0, until - time.monotonic())))
    return bool(asked())
