"""`perilune sweep`: a ladder planned, shown, and run."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perilune.pretrain.errors import Unanswered
from perilune.pretrain.scaling import ladder as ladders
from perilune.pretrain.scaling import results
from perilune.pretrain.scaling.ladder import Planned
from perilune.pretrain.scaling.places import Silence, place
from perilune.pretrain.scaling.results import Book, Outcome, Pace
from perilune.pretrain.scaling.sweep import Sweep
from perilune.pretrain.scaling.words import short

FAILED, PREEMPTED = 1, 75
_AGO_SHOWN = 8  # trials that have ended, the newest, in the live table


def sweep_command(
    file: Path,
    options: Sequence[str],
    out: Path,
    on: str,
    at_once: int,
    retries: int,
    retry_failed: bool,
    rate: float | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Run the ladder `file` in `out`, or show it; returns the exit code. Raises InputError, Unanswered."""
    ladder = ladders.read_ladder(file)
    where = place(on, options, ladders.base_of(ladder), at_once, retries)
    trials = ladders.plan(ladder, where.world, data_there=on == "local" and not dry_run)
    book = Book(out, trials, ladders.fingerprints(trials[0].config))
    if dry_run:
        pace = book.pace(rate)
        print(_as_json(trials, book, pace) if as_json else _table(trials, book, pace, at_once))
        return 0
    away = None
    with _asked() as asked:
        if retry_failed or not all(map(book.state, trials)):
            try:
                where.check(trials[0], book.run_dir(trials[0]))
            except Unanswered as error:
                if not book.begun:
                    raise
                away = Silence(where.who, str(error))  # it may have been given trials, and is waited for
        book.begin()
        with book.alone():
            if retry_failed:
                book.forget_failed()
            show = _Lines(trials, book) if as_json or not sys.stdout.isatty() else _Live(trials, book, rate, at_once)
            with show:
                sweep = Sweep(trials, book, where, show, asked, away)
                sweep.run()
    return _conclude(trials, book, as_json, sweep.left, asked())


def _conclude(trials: Sequence[Planned], book: Book, as_json: bool, going: Sequence[str], stopped: bool) -> int:
    states = {trial.name: book.state(trial) for trial in trials}
    done = sum(state == "done" for state in states.values())
    bad = [name for name, state in states.items() if state == "failed"]
    code = PREEMPTED if stopped and done + len(bad) < len(trials) else FAILED if bad else 0
    if as_json:
        print(json.dumps({"trials": [book.row(trial) for trial in trials], "code": code}, allow_nan=False))
        return code
    for name in bad:
        print(f"failed: {name}: {book.rows[name]['why']}; its run: {book.folder / 'runs' / name}", file=sys.stderr)
    print(f"{done} of {len(trials)} trials done: {book.folder / 'trials.csv'}")
    if code == PREEMPTED:
        left = f"; {len(going)} go on where they are, and it waits for them" if going else ""
        print(f"stopped; the same command goes on from here{left}")
    elif bad:
        print(f"{len(bad)} failed; --retry-failed tries them again, and `perilune fit` leaves them out")
    else:
        print(f"next: perilune fit {book.folder} --out {book.folder / 'fit'}")
    return code


# ---------------------------------------------------------------- before anything runs


def _as_json(trials: Sequence[Planned], book: Book, pace: Pace | None) -> str:
    rows = [
        {**trial.facts, "state": book.state(trial), "seconds": pace and pace.seconds(trial), "words": list(trial.words)}
        for trial in trials
    ]
    return json.dumps(
        {"trials": rows, "compute": sum(trial.compute for trial in trials), "pace": pace and vars(pace)}, indent=1
    )


def _table(trials: Sequence[Planned], book: Book, pace: Pace | None, at_once: int) -> str:
    """Every trial with its cost."""
    head = ("trial", "params", "active", "M", "tokens", "steps", "batch", "lr", "FLOPs", "time", "state")
    rows = [head]
    for trial in trials:
        facts = trial.facts
        rows.append(
            (
                trial.name, short(facts["params_total"]), short(facts["params_active"]), short(trial.flops_per_token),
                short(trial.tokens), f"{trial.steps:,}", f"{trial.batch_tokens:,}", f"{trial.config.optim.lr:g}",
                f"{trial.compute:.3g}", _time(pace.seconds(trial)) if pace else "?", book.state(trial) or "-",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    total, left = sum(t.compute for t in trials), sum(t.compute for t in trials if not book.state(t))
    lines += ["", f"{len(trials)} trials, {total:.3g} FLOPs (M x tokens), {left:.3g} of them still to run"]
    if pace:
        seconds = sum(pace.seconds(trial) for trial in trials if not book.state(trial)) / at_once
        lines.append(
            f"{_time(seconds)} still to run: a trial trains at {pace.rate:.3g} FLOP/s, vocabulary and MTP counted, and "
            f"takes {pace.besides:.0f} s besides; {at_once} at once"
        )
    else:
        lines.append("no time is known before a trial has ended here: --rate FLOP/s says how fast one trains")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- while it runs


@contextmanager
def _asked() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came, in the body."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(silence: Silence) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(silence.since))
    return (
        f"{silence.who} does not answer since {since} ({silence.said}): it is waited for, as its trials may run; if it "
        "is gone for good, stop this sweep and remove launch/where.json of its runs"
    )


def _back(silence: Silence) -> str:
    return f"{silence.who} answers again, after {_time(time.time() - silence.since)}"


class _Lines:
    """A line for each start and end, where there is no terminal."""

    def __init__(self, trials: Sequence[Planned], book: Book) -> None:
        self._count, self._trials, self._book = len(trials), trials, book

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None: ...

    def started(self, trial: Planned, adopted: bool) -> None:
        self._say(f"{trial.name}: {'was running already' if adopted else 'started'}")

    def ended(self, trial: Planned, found: Outcome, seconds: float, again: bool) -> None:
        ended = sum(bool(self._book.state(one)) for one in self._trials)
        told = f"loss {found.loss:.4f}" if found.state == "done" else found.why
        more = "; it is launched again" if again else ""
        self._say(f"{trial.name}: {found.state}, {told}, {_time(seconds)}{more} ({ended} of {self._count})")

    def silent(self, silence: Silence) -> None:
        self._say(_silent(silence))

    def back(self, silence: Silence) -> None:
        self._say(_back(silence))

    def look(self, sweep: Sweep) -> None:
        del sweep

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Live:
    """A table that is redrawn: what runs, what has failed, what ended last, how much is left."""

    def __init__(self, trials: Sequence[Planned], book: Book, rate: float | None, at_once: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._trials, self._book, self._rate, self._at_once = trials, book, rate, at_once
        self._began, self._drawn = time.monotonic(), 0.0
        self._finished: list[str] = []
        self._live = Live(console=Console(highlight=False), auto_refresh=False)

    def __enter__(self) -> _Live:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def started(self, trial: Planned, adopted: bool) -> None:
        del trial, adopted

    def ended(self, trial: Planned, found: Outcome, seconds: float, again: bool) -> None:
        del seconds
        if found.state in ("done", "failed"):
            self._finished.append(trial.name)
        elif again:
            self._live.console.print(f"{trial.name}: {found.why}; it is launched again", markup=False)

    def silent(self, silence: Silence) -> None:
        self._live.console.print(_silent(silence), soft_wrap=True, markup=False)

    def back(self, silence: Silence) -> None:
        self._live.console.print(_back(silence), soft_wrap=True, markup=False)

    def look(self, sweep: Sweep) -> None:
        now = time.monotonic()
        if now - self._drawn > 0.5:
            self._drawn = now
            self._live.update(self._draw(sweep), refresh=True)

    def _draw(self, sweep: Sweep) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("trial", "state", "step", "loss", "time"):
            table.add_column(name, justify="left" if name in ("trial", "state") else "right")
        for trial, going, _ in sweep.going.values():
            entry = results.progress(going.run_dir)
            loss = f"{entry['loss']:.4f}" if entry.get("loss") else ""
            step = f"{entry.get('step', 0)}/{trial.steps}"
            state = "[red]no answer[/red]" if going.silent else "[bold]running[/bold]" if entry else "starting"
            table.add_row(trial.name, state, step, loss, _time(time.monotonic() - going.began))
        rows = self._book.rows
        bad = [name for name, row in rows.items() if row["state"] == "failed"]
        for name in [*bad, *[name for name in reversed(self._finished) if name not in bad][:_AGO_SHOWN]]:
            row = rows[name]
            state = "done" if row["state"] == "done" else f"[red]failed[/red]: {row['why'][:60]}"
            loss = f"{float(row['loss']):.4f}" if row["state"] == "done" else ""
            table.add_row(name, state, row["steps"], loss, _time(float(row["seconds"])))
        return Group(table, self._left())

    def _left(self) -> str:
        left = [trial for trial in self._trials if not self._book.state(trial)]
        done = sum(self._book.state(trial) == "done" for trial in self._trials)
        text = f"\n{done} of {len(self._trials)} done, {_time(time.monotonic() - self._began)}"
        pace = self._book.pace() or self._book.pace(self._rate)
        if pace and left:
            text += f"; {_time(sum(map(pace.seconds, left)) / self._at_once)} left"
        return text
