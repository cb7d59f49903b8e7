"""One description of a run to start: what, on how many processes, with what around them. Every launcher is given one.

    job = Job(arguments=("train", "tiny", "train.steps=20"), run_dir=Path("/shared/runs/a"), nodes=2, procs_per_node=8)

What a launcher leaves in the run directory, under `launch/`, is the same everywhere (`Papers`): the description, where
it went, what happened, the ranks' heartbeats, stacks and failures. `perilune jobs` and the supervision read it there.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

PREEMPTED, BAD_INPUT = 75, 2  # exit codes of `perilune train`: a checkpoint is written; nothing would change by trying
# Their values come from the environment of whoever submits, and are written nowhere.
SECRET = re.compile(
    r"(?i)(^|_)(token|secret|password|passwd|passphrase|credentials?|(api|access|private|secret)?_?key)($|_)"
)
CREDENTIAL = re.compile(r"://[^/@\s]*:[^/@\s]+@|://[^/@\s]{20,}@")  # in a URL: user:password@, or a token alone
# What launchers tell each process, and nobody else can.
_OURS = re.compile(r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PERILUNE_.*")


class JobError(ValueError):
    """A job that cannot be started: the message holds the values, the rule and the remedy."""


class NoAnswer(JobError):
    """A cluster does not answer: nothing is known of its jobs, and the same question may be answered later."""


@dataclass(frozen=True)
class Job:
    """What to start. Paths are absolute, and the same on every node."""

    arguments: tuple[str, ...]  # after `perilune`
    run_dir: Path
    folder: Path = field(default_factory=Path.cwd)  # where the processes start
    nodes: int = 1
    min_nodes: int = 0  # fewest nodes with which it may go on; 0: `nodes`
    procs_per_node: int = 1
    gpus_per_node: int = 0  # 0: CPU
    threads: int = 0  # a process; 0: cores // processes, on the node
    env: dict[str, str] = field(default_factory=dict)  # set for every process; never a secret
    mounts: tuple[str, ...] = ()  # SOURCE:TARGET[:ro], seen in the container
    image: str = ""  # container; empty: none
    time_s: int = 0  # limit of one allocation; 0: the cluster's
    restarts: int = 3  # after a failure; a preemption counts for none
    hang_s: float = 600.0  # without a sign of life of some rank, after its first step
    start_s: float = 1800.0  # until every rank's first step
    worlds: tuple[int, ...] = ()  # numbers of processes that the layout allows; empty: only nodes * procs_per_node
    program: tuple[str, ...] = (sys.executable, "-P", "-m", "perilune.pretrain.cli")

    def __post_init__(self) -> None:
        """Raise JobError for the first value that cannot be."""
        for name in ("nodes", "procs_per_node"):
            if getattr(self, name) < 1:
                raise JobError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("min_nodes", "gpus_per_node", "threads", "time_s", "restarts"):
            if getattr(self, name) < 0:
                raise JobError(f"{name}={getattr(self, name)}: not below 0")
        if self.min_nodes > self.nodes:
            raise JobError(f"min_nodes={self.min_nodes} is more than nodes={self.nodes}")
        if self.gpus_per_node and self.procs_per_node != self.gpus_per_node:
            raise JobError(
                f"procs_per_node={self.procs_per_node}, gpus_per_node={self.gpus_per_node}: one process drives one GPU"
            )
        if not self.run_dir.is_absolute() or not self.folder.is_absolute():
            raise JobError(f"run_dir={self.run_dir}, folder={self.folder}: a node needs absolute paths")
        for name in ("hang_s", "start_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise JobError(f"{name}={getattr(self, name)}: a number of seconds")
        for mount in self.mounts:
            if ":" not in mount:
                raise JobError(f"mount {mount!r}: SOURCE:TARGET, as in /data:/data:ro")
        if any(CREDENTIAL.search(text) for text in (self.image, *self.mounts)):
            raise JobError(
                "the image's URL carries a credential, which would be written into scripts and records; log in where "
                "the image is fetched (enroot and Apptainer have files of their own for that)"
            )
        for name, value in self.env.items():
            if _OURS.fullmatch(name):
                raise JobError(f"env {name}: the launcher tells it each process itself; leave it out")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\n" in value or "\0" in value:
                raise JobError(f"env {name!r}: a name has letters, digits and _, a value is one line")
            if SECRET.search(name) or CREDENTIAL.search(value):
                what = "its name is that of" if SECRET.search(name) else "its URL carries"
                raise JobError(
                    f"env {name}: {what} a secret, which would be written into scripts and records; export it in the "
                    "environment of the command that submits, and every process inherits it"
                )

    @property
    def world(self) -> int:
        """Processes when every node is there."""
        return self.nodes * self.procs_per_node

    @property
    def name(self) -> str:
        """Of the run, as a scheduler shows it."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.run_dir.name) or "perilune"

    @property
    def command(self) -> list[str]:
        """What one process runs, with RANK and its like set."""
        return [*self.program, *self.arguments]

    def allowed(self, world: int) -> bool:
        """Whether the layout can run on `world` processes."""
        return world in (self.worlds or (self.world,))

    def nodes_with(self, available: int) -> int:
        """The most nodes, of `available`, on which it can go on; 0 if there are too few."""
        for nodes in range(min(available, self.nodes), max(1, self.min_nodes or self.nodes) - 1, -1):
            if self.allowed(nodes * self.procs_per_node):
                return nodes
        return 0

    def common_env(self) -> dict[str, str]:
        """What every process has besides its rank: safe path, stacks on a crash, where signs of life go."""
        fixed = {"PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        watched = {"PERILUNE_LAUNCH_DIR": str(self.run_dir / "launch"), "PERILUNE_HANG_S": f"{self.hang_s:g}"}
        return {**fixed, **threads, **watched, **self.env}

    def to_json(self) -> str:
        """As it is kept in the run directory."""
        return json.dumps(asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`. Raises JobError for what is none."""
        try:
            found = json.loads(text)
            known = {f.name for f in fields(cls)}
            if unknown := set(found) - known:
                raise JobError(f"a job has no {', '.join(sorted(unknown))}")
            for name in ("arguments", "mounts", "worlds", "program"):
                found[name] = tuple(found.get(name, getattr(cls, name, ())))
            return cls(**found | {"run_dir": Path(found["run_dir"]), "folder": Path(found["folder"])})
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(f"no job description: {error}") from error


@dataclass(frozen=True)
class Papers:
    """The files under RUN/launch of a run that was launched."""

    run_dir: Path

    @property
    def folder(self) -> Path:
        """All of them."""
        return self.run_dir / "launch"

    @property
    def job(self) -> Path:
        """`Job.to_json` of the newest launch."""
        return self.folder / "job.json"

    @property
    def where(self) -> Path:
        """{"launcher": "local" | "slurm" | "ray", ...}: what is needed to ask about it, read its logs and cancel it."""
        return self.folder / "where.json"

    @property
    def events(self) -> Path:
        """One JSON a line, each with `time` (UTC) and `event`: attempts, failures, restarts, giving up."""
        return self.folder / "events.jsonl"

    @property
    def beats(self) -> Path:
        """Folder; rank_00000.json is rewritten by that rank as it gets on: `step`, `phase`, `host`, `pid`."""
        return self.folder / "beats"

    @property
    def stacks(self) -> Path:
        """Folder; rank_00000.txt holds the stacks of a rank that did not get on for `hang_s`."""
        return self.folder / "stacks"

    @property
    def failures(self) -> Path:
        """Folder; attempt_000_rank_00000.json is why a rank ended: `kind`, `step`, `error`, `monotonic`."""
        return self.folder / "failures"

    @property
    def logs(self) -> Path:
        """Folder; rank_0.log and so on: stderr of each rank, and stdout of all but the first."""
        return self.run_dir / "logs"

    def write(self, job: Job, where: dict[str, Any]) -> None:
        """Record a launch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, text in ((self.job, job.to_json()), (self.where, json.dumps(where, indent=2))):
            new = file.with_suffix(".new")
            new.write_text(text + "\n")
            os.replace(new, file)

    def read(self) -> tuple[Job, dict[str, Any]]:
        """The newest launch. Raises JobError without one."""
        try:
            return Job.from_json(self.job.read_text()), json.loads(self.where.read_text())
        except (OSError, ValueError) as error:
            raise JobError(f"{self.run_dir} holds no launched run ({error}); `perilune launch` makes one") from error
