"""Trials started, looked after and written down until all have ended, or somebody asks to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from perilune.pretrain.errors import InputError
from perilune.pretrain.scaling import results
from perilune.pretrain.scaling.ladder import Planned
from perilune.pretrain.scaling.places import Going, Place
from perilune.pretrain.scaling.results import Book, Outcome

_LOOK_S = 0.2


class Show(Protocol):
    """Whoever watches."""

    def started(self, trial: Planned, adopted: bool) -> None:
        """It runs; `adopted`: since before this sweep was started."""

    def ended(self, trial: Planned, found: Outcome, seconds: float, again: bool) -> None:
        """It does not run any more; `again`: it will be launched again."""

    def look(self, sweep: Sweep) -> None:
        """Called some times a second."""


@dataclass
class Sweep:
    """Runs `trials` of `book` at `place`. No trial runs twice: one that has ended is in the book, one that goes on is
    waited for, and one that was cut off goes on from its checkpoint."""

    trials: Sequence[Planned]
    book: Book
    place: Place
    show: Show
    asked: Callable[[], bool]  # whether somebody wants it to stop
    going: dict[int, tuple[Planned, Going, int]] = field(default_factory=dict)  # slot -> trial, launch, events before
    refused: str = ""  # why a trial could not run at all: others would be refused too
    _lost: dict[str, int] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)  # that a trial had done when it was launched last

    def run(self) -> None:
        """To the end. Raises InputError where a trial was refused: what is wrong is wrong with the ladder."""
        waiting = deque(self._left())
        told = False
        while waiting or self.going:
            stopping = self.asked() or bool(self.refused)
            if stopping:
                waiting.clear()
            while waiting and (slot := self._free()) is not None:
                self._start(waiting.popleft(), slot)
            if stopping and not told:
                told = True
                for _, going, _ in self.going.values():
                    going.stop()
            for slot, (trial, going, _) in list(self.going.items()):
                if going.over():
                    if self._conclude(slot):
                        waiting.appendleft(trial)
                elif self.asked() and not going.ours:
                    del self.going[slot]  # a cluster's, which goes on without this process
            self.show.look(self)
            time.sleep(_LOOK_S)
        if self.refused:
            raise InputError(self.refused)

    def _left(self) -> list[Planned]:
        """Trials still to run. What ended, or runs, without anybody having looked is taken in."""
        left = []
        for trial in self.trials:
            if self.book.state(trial):
                continue
            run_dir = self.book.run_dir(trial)
            going = self.place.under_way(run_dir) if run_dir.exists() else None
            if going is not None:
                slot = self._free()
                slot = slot if slot is not None else self.place.at_once + len(self.going)
                self.going[slot] = (trial, going, 0)
                self.show.started(trial, True)
            elif (found := results.finished(run_dir, trial.steps)) is not None:
                self.book.ended(trial, found, 0.0)
                self.show.ended(trial, found, 0.0, False)
            else:
                left.append(trial)
        return left

    def _free(self) -> int | None:
        return next((slot for slot in range(self.place.at_once) if slot not in self.going), None)

    def _start(self, trial: Planned, slot: int) -> None:
        run_dir = self.book.run_dir(trial)
        before = results.events_so_far(run_dir)
        self._steps[trial.name] = results.progress(run_dir).get("step", 0)
        self.going[slot] = (trial, self.place.start(trial, run_dir, slot), before)
        self.show.started(trial, False)

    def _conclude(self, slot: int) -> bool:
        """A launch is over: write down how; whether it is to be launched again."""
        trial, going, before = self.going.pop(slot)
        found = results.outcome(self.book.run_dir(trial), trial.steps, before, going.code)
        seconds = time.monotonic() - going.began
        again = False
        if found.state == "preempted" and results.progress(going.run_dir).get("step", 0) == self._steps.get(trial.name):
            found = replace(found, state="lost", why=f"{found.why}, before it had done a step")
        if found.state == "lost" and not self.asked():
            self._lost[trial.name] = self._lost.get(trial.name, 0) + 1
            again = self._lost[trial.name] <= self.place.retries
            if not again:
                found = results.failed(found, f"{found.why}; launched {self._lost[trial.name]} times")
        elif found.state == "preempted":  # by a cluster, or somebody else: it goes on from its checkpoint
            again = not self.asked() and not self.refused
        elif found.state == "refused":
            self.refused = f"trial {trial.name} was refused: {found.why}"
        if found.state in ("done", "failed"):
            self.book.ended(trial, found, seconds)
        self.show.ended(trial, found, seconds, again)
        return again
