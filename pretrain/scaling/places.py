"""Where trials run: each is what `perilune launch local|slurm|ray` starts.

Locally, and on a cluster that Ray begins for one run, the launch is a process that ends with this one, and the run with
it. Slurm's and a Ray cluster's jobs are submitted and go on by themselves: they are asked about, also by a sweep that
did not submit them. A cluster that does not answer is waited for: what it was given may run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from perilune.launch import child, launchers, ray_jobs, slurm
from perilune.launch.job import JobError, Papers
from perilune.pretrain import launch_cli, launch_command, rules
from perilune.pretrain import train_command as here
from perilune.pretrain.errors import InputError, Unanswered
from perilune.pretrain.scaling.ladder import Planned
from perilune.pretrain.scaling.results import launch_log
from perilune.pretrain.schema import Config

_ACTIVE = ("running", "pending", "stopping")
_ASK_S = {"local": 1.0, "ray": 2.0, "slurm": 5.0}  # between two questions about a job
_NOT_HERE = ("dry_run", "as_json", "sweep", "chain", "restarts")  # options of `launch` that the sweep has itself


@dataclass(frozen=True)
class Silence:
    """A cluster that does not answer."""

    who: str
    said: str
    since: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Place:
    """How trials are launched."""

    on: str  # local, slurm or ray
    options: tuple[str, ...]  # of `perilune launch ON`
    world: int  # processes of a trial
    at_once: int
    retries: int
    stays: bool  # whether the launch lasts as long as the run
    address: str | None = None  # of a Ray cluster
    insecure: bool = False  # whether it may take jobs from anybody
    gpus: int = 0  # of this machine, where trials run here
    on_gpus: bool = False

    @property
    def who(self) -> str:
        """Who would not answer."""
        return self.address or self.on.capitalize()

    @property
    def ask_s(self) -> float:
        """Seconds between two questions."""
        return _ASK_S[self.on]

    def check(self, trial: Planned, run_dir: Path) -> None:
        """Refuse what no trial could be launched with. Raises InputError; Unanswered for a cluster that is away."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            self._run(trial, run_dir, dry_run=True)
        try:
            if self.on == "slurm":
                slurm.check()
            elif self.on == "ray":
                ray_jobs.check(self.address, self.insecure)
        except JobError as error:
            raise launch_command.told(error) from error

    def command(self, trial: Planned, run_dir: Path) -> list[str]:
        """Words for `perilune`."""
        words = ["launch", self.on, *self.options, "--restarts", str(self.retries)]
        if self.on == "local":
            words += [] if self._has("--nproc") else ["--nproc", str(self.world)]
            if not self._has("--threads") and not trial.config.train.threads:
                words += ["--threads", str(max(1, (os.cpu_count() or 1) // (self.at_once * self.world)))]
        if self.on == "ray":
            words += [] if self.stays else ["--no-wait"]
            # Ray keeps a CPU for each process, and puts as many trials on a node as it has CPUs.
            words += ["--threads", "1"] if self.at_once > 1 and not (self._has("--threads") or self.on_gpus) else []
        return [*words, "--", "train", trial.config.preset, *trial.words, "--run", str(run_dir)]

    def _has(self, option: str) -> bool:
        return any(word.partition("=")[0] == option for word in self.options)

    def start(self, trial: Planned, run_dir: Path, slot: int) -> Going:
        """Launch it; `slot` of `at_once` is free. Raises InputError where its folder cannot be written, and Unanswered
        for a cluster that is away: if the trial is `launched` all the same, it may have been taken."""
        log = launch_log(run_dir)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").close()
        except OSError as error:
            raise InputError(f"{log} cannot be written: {error}") from error
        if not self.stays:
            return Going(run_dir, self.ask_s, code=self._submit(trial, run_dir, log))
        environment = dict(os.environ)
        if self.gpus and self.on == "local":
            mine = range(slot * self.world, (slot + 1) * self.world)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible()[index] for index in mine)
        words = [sys.executable, "-P", "-m", "perilune.pretrain.cli", *self.command(trial, run_dir)]
        guard = [sys.executable, "-S", "-P", str(child.__file__), str(os.getpid()), str(log), str(log)]
        process = subprocess.Popen([*guard, *words], env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return Going(run_dir, self.ask_s, process)

    def _submit(self, trial: Planned, run_dir: Path, log: Path) -> int:
        """The exit code of a launch that does not wait."""
        with log.open("a") as said, redirect_stdout(said), redirect_stderr(said):
            try:
                return self._run(trial, run_dir)
            except InputError as error:
                print(f"perilune: error: {error}", file=sys.stderr)
                if isinstance(error, Unanswered):
                    raise
                return 2

    def _run(self, trial: Planned, run_dir: Path, **more: bool) -> int:
        """Its launch, in this process."""
        options = launch_cli.launch.commands[self.on].make_context("", self.command(trial, run_dir)[2:]).params
        run: Callable[..., int] = getattr(launch_command, f"launch_{self.on}")
        return run(**options | more)

    def launched(self, run_dir: Path) -> Going | None:
        """A run that was launched before, and may go on."""
        return Going(run_dir, self.ask_s) if Papers(run_dir).where.exists() else None


class Going:
    """A trial that was launched: by `process`, which lasts as long as it; or submitted, with exit code `code`."""

    def __init__(
        self, run_dir: Path, ask_s: float, process: subprocess.Popen[bytes] | None = None, code: int | None = None
    ) -> None:
        self.run_dir = run_dir
        self.began = time.monotonic()
        self.code = code  # of the launch, once it is over
        self.seen = False  # whether its cluster has said that it goes on
        self.silent: Silence | None = None
        self._process, self._ask_s = process, ask_s
        self._asked, self._ended = -ask_s, False
        self._question: threading.Thread | None = None

    def over(self) -> bool:
        """Whether the run is known to have ended, one way or another. Does not wait: a question can take a minute."""
        if self._process is not None:
            self.code = self._process.poll()
            return self.code is not None
        if self.code:
            return True
        now = time.monotonic()
        waits = self._question is not None and self._question.is_alive()
        if not self._ended and not waits and now - self._asked >= self._ask_s:
            self._asked = now
            self._question = threading.Thread(target=self._ask, daemon=True)
            self._question.start()
        return self._ended

    @property
    def ours(self) -> bool:
        """Whether it ends with this process."""
        return self._process is not None

    def stop(self) -> None:
        """Ask for an end with a checkpoint, where the run would end with this process anyhow."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _ask(self) -> None:
        try:
            _, where = Papers(self.run_dir).read()
            there = str(launchers.launcher(where).state(where))
        except JobError:
            where, there = {}, "not launched"
        if there.startswith("unknown"):
            who = where.get("address") or where["launcher"].capitalize()
            self.silent = self.silent or Silence(who, there.removeprefix("unknown: "))
            return
        self.silent = None
        if there.startswith(_ACTIVE):
            self.seen = True
        else:
            self._ended = True


def place(on: str, options: Sequence[str], base: Config, at_once: int, retries: int) -> Place:
    """Of the options of `perilune launch ON` that follow `--`. Raises InputError for ones that it has not, or that are
    the sweep's own."""
    command: Any = launch_cli.launch.commands[on]
    try:
        found = command.make_context(f"perilune launch {on}", [*options, "--", "train", base.preset]).params
    except click.UsageError as error:
        raise InputError(
            f"--on {on}: {error.format_message()} (after --: options of `perilune launch {on}`)"
        ) from error
    if len(found["arguments"]) != 2:
        raise InputError(f"--on {on}: {found['arguments'][0]!r} is no option of `perilune launch {on}`")
    plain = command.make_context("", ["--", "train", base.preset]).params
    for name in _NOT_HERE:
        if name in found and found[name] != plain[name]:
            word = {"as_json": "--json", "restarts": "--restarts (it is --retries here)"}.get(name, f"--{name}")
            raise InputError(f"{word.replace('_', '-')} belongs to `perilune sweep`, before the --")
    if on == "local":
        gpus = here.gpus_here()
        each = found["nproc"] or here.processes_here(base, 0)
        if gpus and at_once * each > gpus:
            raise InputError(f"--at-once {at_once} x {each} processes need as many GPUs; {gpus} are here")
        return Place(on, tuple(options), each, at_once, retries, True, gpus=gpus)
    nodes = found["nodes"][1]
    each = found["procs_per_node"] or found["gpus_per_node"] or 1
    stays = on == "ray" and found["address"] is None
    if stays and nodes > 1:
        raise InputError("--nodes needs --address: a cluster begun for one run has one node")
    rules.mesh_of(base, nodes * each)
    return Place(
        on, tuple(options), nodes * each, at_once, retries, stays, found.get("address"), found.get("insecure", False),
        on_gpus=bool(found["gpus_per_node"]),
    )  # fmt: skip


def _visible() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(here.gpus_here())]
