"""Trials started, looked after and written down until all have ended, or somebody asks to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from perilune.pretrain.errors import InputError, Unanswered
from perilune.pretrain.scaling import results
from perilune.pretrain.scaling.ladder import Planned
from perilune.pretrain.scaling.places import Going, Place, Silence
from perilune.pretrain.scaling.results import Book, Outcome

_LOOK_S = 0.2


class Show(Protocol):
    """Whoever watches."""

    def started(self, trial: Planned, adopted: bool) -> None:
        """It runs; `adopted`: since before this sweep was started."""

    def ended(self, trial: Planned, found: Outcome, seconds: float, again: bool) -> None:
        """It does not run any more; `again`: it will be launched again."""

    def silent(self, silence: Silence) -> None:
        """A cluster does not answer, and is waited for."""

    def back(self, silence: Silence) -> None:
        """It answers again."""

    def look(self, sweep: Sweep) -> None:
        """Called some times a second."""


@dataclass
class Sweep:
    """Runs `trials` of `book` at `place`. No trial runs twice: one that has ended is in the book, one that goes on, or
    may do on a cluster that does not answer, is waited for, and one that was cut off goes on from its checkpoint."""

    trials: Sequence[Planned]
    book: Book
    place: Place
    show: Show
    asked: Callable[[], bool]  # whether somebody wants it to stop
    away: Silence | None = None  # no answer to the newest launch, or before the first
    going: dict[int, tuple[Planned, Going, int]] = field(default_factory=dict)  # slot -> trial, launch, events before
    left: list[str] = field(default_factory=list)  # trials that go on without this process
    refused: str = ""  # why a trial could not run at all: others would be refused too
    _unsure: set[str] = field(default_factory=set)  # of those that go on: launched, and perhaps not there
    _lost: dict[str, int] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)  # that a trial had done when it was launched last
    _told: dict[str, Silence] = field(default_factory=dict)
    _not_before: float = 0.0  # the next launch, after one that had no answer

    def run(self) -> None:
        """To the end. Raises InputError where a trial was refused: what is wrong is wrong with the ladder."""
        waiting = deque(self._left())
        told = False
        while waiting or self.going:
            stopping = self.asked() or bool(self.refused)
            if stopping:
                waiting.clear()
            while waiting and self._can_launch() and (slot := self._free()) is not None:
                if not self._start(waiting[0], slot):
                    break
                waiting.popleft()
            if stopping and not told:
                told = True
                for _, going, _ in self.going.values():
                    going.stop()
            self._tell_silences()
            for slot, (trial, going, _) in list(self.going.items()):
                if self._over(slot):
                    if self._conclude(slot):
                        waiting.appendleft(trial)
                elif self.asked() and not going.ours:
                    del self.going[slot]  # a cluster's, which goes on without this process
                    self.left += [] if trial.name in self._unsure else [trial.name]
            self.show.look(self)
            time.sleep(_LOOK_S)
        if self.refused:
            raise InputError(self.refused)

    def _left(self) -> list[Planned]:
        """Trials still to run. One that was launched before, by a sweep that ended, may run or have ended since."""
        left = []
        for trial in self.trials:
            if self.book.state(trial):
                continue
            if (going := self.place.launched(self.book.run_dir(trial))) is not None:
                slot = self._free()
                self._adopt(trial, going, slot if slot is not None else self.place.at_once + len(self.going))
            elif not self._finished(trial):
                left.append(trial)
        return left

    def _adopt(self, trial: Planned, going: Going, slot: int) -> None:
        self.going[slot] = (trial, going, 0)
        self._unsure.add(trial.name)

    def _finished(self, trial: Planned) -> bool:
        """Whether it is, without anybody having looked: it is written down then."""
        if (found := results.finished(self.book.run_dir(trial), trial.steps)) is None:
            return False
        self.book.ended(trial, found, 0.0)
        self.show.ended(trial, found, 0.0, False)
        return True

    def _free(self) -> int | None:
        return next((slot for slot in range(self.place.at_once) if slot not in self.going), None)

    def _can_launch(self) -> bool:
        away = any(going.silent and going.silent.who == self.place.who for _, going, _ in self.going.values())
        return not away and time.monotonic() >= self._not_before

    def _start(self, trial: Planned, slot: int) -> bool:
        """Whether it was launched, or may have been: an answer can be lost of a job that was taken."""
        run_dir = self.book.run_dir(trial)
        before = results.events_so_far(run_dir)
        self._steps[trial.name] = results.progress(run_dir).get("step", 0)
        try:
            self.going[slot] = (trial, self.place.start(trial, run_dir, slot), before)
        except Unanswered as error:
            self._not_before = time.monotonic() + self.place.ask_s
            self.away = self.away or Silence(self.place.who, str(error))
            if (going := self.place.launched(run_dir)) is None:
                return False
            self._adopt(trial, going, slot)
            return True
        self.away = None
        self.show.started(trial, False)
        return True

    def _over(self, slot: int) -> bool:
        trial, going, _ = self.going[slot]
        over = going.over()
        if not over and going.seen and trial.name in self._unsure:
            self._unsure.discard(trial.name)
            self.away = None
            self.show.started(trial, True)
        return over

    def _tell_silences(self) -> None:
        found = {self.away.who: self.away} if self.away else {}
        for _, going, _ in self.going.values():
            if going.silent:
                found.setdefault(going.silent.who, going.silent)
        for who in found.keys() - self._told.keys():
            self.show.silent(found[who])
            self._told[who] = found[who]
        for who in self._told.keys() - found.keys():
            if not self.asked():
                self.show.back(self._told[who])
            del self._told[who]

    def _conclude(self, slot: int) -> bool:
        """A launch is over: write down how; whether it is to be launched again."""
        trial, going, before = self.going.pop(slot)
        if trial.name in self._unsure:  # it was not there any more
            self._unsure.discard(trial.name)
            return not self._finished(trial)
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
