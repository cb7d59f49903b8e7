"""Whether every rank of an attempt gets on, and if not: which one does not, and in which collective the others wait.

Every clock here is this process's own `time.monotonic()`: it notes when a heartbeat last *changed*, so that it does not
matter what the clocks of the hosts say, nor that a clock is set.
"""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.launch.job import Job, Papers

_FRAME = re.compile(r'^\s+File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)')
# Where a rank waits for others without a frame of torch.distributed's own.
_WAITS = ("start_grad_sync", "finish_grad_sync", "start_param_sync", "finish_param_sync", "wait_until", "recv_forward",
          "recv_backward", "_communicate")  # fmt: skip
# They say nothing of where it is: wrappers, and what sends off several collectives at once.
_OWN_WORK = ("wrapper", "_call", "__call__", "decorate_context", "_coalescing_manager")
_STACKS_S = 3.0  # ranks write their stacks about when the watch finds the hang: so long it waits for them


@dataclass(frozen=True)
class Stack:
    """Where the main thread of a rank was."""

    at: str  # FUNCTION (FILE:LINE)
    collective: str  # all_reduce, ...; empty: it does not wait for others


@dataclass(frozen=True)
class Hang:
    """Some rank gave no sign of life for too long."""

    ranks: tuple[int, ...]  # which are behind; others may wait for them
    silent_s: float  # since the last change of the slowest one's heartbeat
    step: int  # the last that all ranks have done
    phase: str
    collective: str  # in which others wait; empty if unknown
    why: str  # one sentence


class Watch:
    """The heartbeats of one attempt of `world` processes (default: all of the job's), from now on."""

    def __init__(self, job: Job, papers: Papers, attempt: int, world: int | None = None) -> None:
        self._job, self._papers, self._attempt = job, papers, attempt
        self._world = job.world if world is None else world
        self._began = time.monotonic()
        self._changed: dict[int, tuple[Any, float]] = {}  # rank -> (its beat, when it changed)
        self._found_at: float | None = None

    def check(self) -> Hang | None:
        """Read every heartbeat; call this some times within `hang_s`. A hang is told once stacks had time to come."""
        now = time.monotonic()
        for rank in range(self._world):
            beat = read_beat(self._papers, rank)
            if beat is not None and beat.get("attempt") != self._attempt:
                beat = None
            if rank not in self._changed or self._changed[rank][0] != beat:
                self._changed[rank] = (beat, self._began if beat is None else now)
        late = self._late(now)
        if not late:
            self._found_at = None
            return None
        if self._found_at is None:
            self._found_at = now
        stacks = {rank: read_stack(self._papers, rank) for rank in range(self._world)}
        to_come = [rank for rank, stack in stacks.items() if stack is None and not _stopped(self._changed[rank][0])]
        if to_come and now - self._found_at < _STACKS_S:
            return None
        return self._diagnosis(late, stacks, now)

    def _late(self, now: float) -> list[int]:
        """Ranks that have been silent for longer than they may."""
        working = [rank for rank, (beat, _) in self._changed.items() if beat is None or beat["phase"] != "done"]
        late = []
        for rank in working or self._changed:  # a process that is done waits for the others, as long as there are any
            beat, changed = self._changed[rank]
            if beat is not None and beat["begun"]:
                if now - changed > self._job.hang_s:
                    late.append(rank)
            elif now - self._began > self._job.start_s:
                late.append(rank)
        return late

    def _diagnosis(self, late: list[int], stacks: dict[int, Stack | None], now: float) -> Hang:
        beats = {rank: beat for rank, (beat, _) in self._changed.items()}
        silent = max(now - self._changed[rank][1] for rank in late)
        # A rank that may be silent for longer, as it is in its first step, may be what the late ones wait for.
        late = [rank for rank, (_, at) in self._changed.items() if now - at > self._job.hang_s or rank in late]
        culprits, how = self._culprits(late, stacks, beats)
        waiting = {rank: stack for rank, stack in stacks.items() if stack and stack.collective and rank not in culprits}
        steps = [beat["step"] for beat in beats.values() if beat]
        step = min(steps) if len(steps) == self._world else 0
        beat = beats[culprits[0]]
        phase = beat["phase"] if beat else "starting"
        who = ", ".join(f"{rank}{_place(beats[rank])}" for rank in culprits[:8])
        why = (
            f"no sign of life of rank {who} for {silent:.0f} s, in phase {phase!r} after step {step}: "
            f"{'they' if len(culprits) > 1 else 'it'} {how}"
        )
        collective = next((stack.collective for stack in waiting.values()), "")
        if waiting:
            ranks, stack = sorted(waiting), waiting[min(waiting)]
            named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
            why += f"; rank {named} wait{'s' if len(ranks) == 1 else ''} in {collective}, {stack.at}"
        return Hang(tuple(culprits), silent, step, phase, collective, why)

    def _culprits(
        self, late: list[int], stacks: dict[int, Stack | None], beats: dict[int, Any]
    ) -> tuple[list[int], str]:
        """(ranks to blame, how it is known), the surest sign first."""
        # One that was stopped just after its last sign may be silent for less long than those that wait for it.
        stopped = [rank for rank in range(self._world) if _stopped(beats[rank])]
        if stopped:
            return stopped, "is stopped (SIGSTOP)" if len(stopped) == 1 else "are stopped (SIGSTOP)"
        missing = [rank for rank in late if beats[rank] is None]
        if missing:
            return missing, "never began"
        mute = [rank for rank in late if stacks[rank] is None]
        if mute and len(mute) < self._world:
            return mute, "wrote no stacks either: stopped, or its host is gone"
        own = [rank for rank in late if (stack := stacks[rank]) and not stack.collective]
        if own and len(own) < self._world:
            stack = stacks[own[0]]
            return own, f"stood in {stack.at if stack else ''}, in no collective"
        lowest = min(beats[rank]["step"] for rank in late)
        behind = [rank for rank in late if beats[rank]["step"] == lowest]
        if len(behind) < self._world:
            return behind, "is the furthest behind"
        stack = stacks[behind[0]]
        return behind, f"stood in {stack.at}" if stack else "wrote no stacks"


def read_beat(papers: Papers, rank: int) -> dict[str, Any] | None:
    """The newest heartbeat of `rank`, of whichever attempt; None before its first."""
    try:
        beat: dict[str, Any] = json.loads((papers.beats / f"rank_{rank:05d}.json").read_text())
        return beat if {"step", "phase", "begun"} <= beat.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def read_stack(papers: Papers, rank: int) -> Stack | None:
    """Where the main thread was when `rank` had not got on for `hang_s`; None if it wrote nothing."""
    try:
        text = (papers.stacks / f"rank_{rank:05d}.txt").read_text(errors="replace")
    except OSError:
        return None
    # faulthandler writes the newest thread first: the main one is the last.
    part = re.split(r"^(?:Current t|T)hread .*$", text, flags=re.MULTILINE)[-1]
    frames = [match for line in part.splitlines() if (match := _FRAME.match(line))]
    if not frames:
        return None
    waits = [frame["name"] for frame in frames if _of_torch(frame) or frame["name"] in _WAITS]
    collective = next((name for name in waits if name not in _OWN_WORK), "")
    at = frames[0]
    if collective:  # the caller is what tells
        at = next((frame for frame in frames if "/torch/" not in frame["file"] and not _of_python(frame)), at)
    return Stack(f"{at['name']} ({Path(at['file']).name}:{at['line']})", collective)


def _of_torch(frame: re.Match[str]) -> bool:
    return "torch/distributed/" in frame["file"] and "elastic" not in frame["file"]


def _of_python(frame: re.Match[str]) -> bool:
    """Of the standard library, whose context managers and threads stand between a caller and its wait."""
    return Path(frame["file"]).parent.name.startswith("python3.")


def _place(beat: dict[str, Any] | None) -> str:
    return f" ({beat['host']}, pid {beat['pid']})" if beat else ""


def _stopped(beat: dict[str, Any] | None) -> bool:
    """Whether it is known, from this host, that the process is stopped."""
    if beat is None or beat["host"] != socket.gethostname():
        return False
    try:
        return Path(f"/proc/{beat['pid']}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
