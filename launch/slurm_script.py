"""The sbatch script of a job (`launch/job.sh.j2`), what a site adds to it, and the sbatch commands that submit it."""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perilune.launch.job import CREDENTIAL, SECRET, Job, JobError

_PLAIN = re.compile(r"[A-Za-z0-9_./,:@%+=\[\]-]*")
_NO_SWEEP_NAME = re.compile(r"[^A-Za-z0-9_.+=,-]")
_SITE_KEYS = ("env", "sbatch", "setup", "srun")


@dataclass(frozen=True)
class Site:
    """What is particular to a cluster, from a YAML file. Raises JobError for what it must not hold."""

    file: str = ""
    env: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str] = field(default_factory=dict)  # option without dashes -> value; empty: none
    setup: tuple[str, ...] = ()  # shell lines, run on the first node before any step
    srun: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Site:
        """The site of `file`."""
        import yaml

        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise JobError(f"{file} is no YAML that can be read: {error}") from error
        if not isinstance(found, dict):
            raise JobError(f"{file}: a site has the keys {', '.join(_SITE_KEYS)}, not a {type(found).__name__}")
        for key in found:
            if key not in _SITE_KEYS:
                near = difflib.get_close_matches(str(key), _SITE_KEYS, 1, 0.0)[0]
                raise JobError(f"{file}: unknown key {key!r}; did you mean {near!r}? ({', '.join(_SITE_KEYS)})")
        setup = found.get("setup") or ()
        lines = tuple(setup.splitlines() if isinstance(setup, str) else setup)
        if not all(isinstance(line, str) and "\n" not in line for line in lines):
            raise JobError(f"{file}: setup={setup!r}: a list of shell lines")
        for line in lines:
            for name in re.findall(r"([A-Za-z_][A-Za-z0-9_]*)=(?![\"']?\$)\S", line):
                if SECRET.search(name):
                    raise JobError(
                        f"{file}: setup sets {name}, named like a secret, which would be written into the script; "
                        "export it where you submit, and the job inherits it"
                    )
        tables = {key: _table(file, key, found.get(key) or {}) for key in ("env", "sbatch", "srun")}
        texts = [*lines, *(value for table in tables.values() for value in table.values())]
        if any(CREDENTIAL.search(text) for text in texts):
            raise JobError(f"{file}: a URL carries a credential, which would be written into the script; leave it out")
        return cls(str(file), setup=lines, **tables)


def _table(file: Path, key: str, found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        raise JobError(f"{file}: {key}={found!r}: a mapping, as in `{key}: {{NAME: value}}`")
    rule = r"[A-Za-z_][A-Za-z0-9_]*" if key == "env" else r"[a-z][a-z0-9-]*"
    table = {}
    for name, value in found.items():
        if not isinstance(name, str) or not re.fullmatch(rule, name):
            raise JobError(f"{file}: {key}: {name!r} is no name of {'a variable' if key == 'env' else 'an option'}")
        if SECRET.search(name.replace("-", "_")):
            raise JobError(
                f"{file}: {key}: {name} is named like a secret, which would be written into the script; export it "
                "where you submit, and the job inherits it"
            )
        if isinstance(value, bool) and key != "env":
            if not value:
                continue
            value = ""
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise JobError(f"{file}: {key}: {name}={value!r}: a string or a number, in quotes if it reads as another")
        if re.search(r"[\n\r\0]", str(value)):
            raise JobError(f"{file}: {key}: {name} has more than one line")
        table[name] = str(value)
    return table


@dataclass(frozen=True)
class Placement:
    """What Slurm is asked for, besides the job itself."""

    per: str = "process"
    signal_before: int = 120  # seconds
    partition: str = ""
    account: str = ""
    qos: str = ""
    exclude: str = ""
    chain: int = 1
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = ()  # key -> values
    site: Site = field(default_factory=Site)


def seconds(text: str | None) -> int:
    """Of a time limit [D-]HH:MM:SS; 0 for none. Raises JobError."""
    if not text:
        return 0
    found = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})", text)
    if not found or int(found[3]) > 59 or int(found[4]) > 59:
        raise JobError(f"--time {text!r}: write it as [D-]HH:MM:SS, as in 1-12:00:00")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def parse_sweep(pairs: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """KEY=V1,V2 of each --sweep; in [] and {}, which may be nested, a value may hold commas. Raises JobError."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for pair in pairs:
        key, is_pair, values = pair.partition("=")
        parts = _values(values)
        if not key or not is_pair or not parts or len(set(parts)) != len(parts):
            raise JobError(f"--sweep {pair!r}: write KEY=VALUE,VALUE with every value once and every bracket "
                           "closed, as in optim.lr=1e-3,2e-3")  # fmt: skip
        if key in dict(found):
            raise JobError(f"--sweep {key}: given twice; list all of its values after one")
        found.append((key, parts))
    return tuple(found)


def _values(text: str) -> tuple[str, ...]:
    """The parts between commas that stand in no bracket; none where a bracket has no partner or a part is empty."""
    parts, closing = [""], ""
    for letter in text:
        if letter == "," and not closing:
            parts.append("")
            continue
        parts[-1] += letter
        if letter in "[{":
            closing += "]" if letter == "[" else "}"
        elif letter in "]}":
            if not closing.endswith(letter):
                return ()
            closing = closing[:-1]
    return () if closing or not all(parts) else tuple(parts)


def tasks_of(sweep: tuple[tuple[str, tuple[str, ...]], ...]) -> list[tuple[str, tuple[str, ...]]]:
    """(folder under the run directory, what is added to the command) of every combination. Raises JobError."""
    found: dict[str, tuple[str, ...]] = {}
    if not sweep:
        return []
    for values in itertools.product(*(values for _, values in sweep)):
        words = tuple(f"{key}={value}" for (key, _), value in zip(sweep, values, strict=True))
        folder = ",".join(_NO_SWEEP_NAME.sub("_", word) for word in words)
        if folder in found:
            raise JobError(f"sweep: {shlex.join(words)} and {shlex.join(found[folder])} have one folder, {folder}")
        found[folder] = words
    return list(found.items())


def script(job: Job, placement: Placement, file: Path) -> str:
    """The sbatch script, as it is kept in `file`. Raises JobError for a value that sbatch cannot be told."""
    from jinja2 import Environment, StrictUndefined

    text = Path(__file__).with_name("job.sh.j2").read_text(encoding="utf-8")
    # ${#name} is shell, not the start of a comment.
    shell = Environment(
        comment_start_string="{##",
        comment_end_string="##}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    site = placement.site
    program = job.program
    arguments = job.arguments
    sweep = [(shlex.quote(folder), _words(words)) for folder, words in tasks_of(placement.sweep)]
    if placement.sweep:
        at = arguments.index("--run")
        arguments = arguments[:at] + arguments[at + 2 :]
    env = [(name, shlex.quote(value), f"from {_comment(site.file)}") for name, value in site.env.items()]
    given = {name: value for name, value in job.common_env().items() if name != "PERILUNE_LAUNCH_DIR"}
    env += [(name, shlex.quote(value), "from --env" if name in job.env else "") for name, value in given.items()]
    counts = [
        n for n in range(job.nodes, max(1, job.min_nodes or job.nodes) - 1, -1) if job.allowed(n * job.procs_per_node)
    ]
    gpus = f" --gpus-per-node={job.gpus_per_node}" if job.gpus_per_node else ""
    each = '--ntasks="$WORLD_SIZE" --ntasks-per-node="$procs"'
    if placement.per == "node":
        each = '--ntasks="$nodes" --ntasks-per-node=1'
    return shell.from_string(text).render(
        title=_comment(f"{job.name}: perilune {shlex.join(job.arguments)}"),
        again=_comment(f"sbatch {shlex.quote(str(file))}"),
        sbatch=_sbatch_lines(job, placement),
        sweep=sweep,
        run=shlex.quote(str(job.run_dir)),
        command=_words([*program, *arguments]),
        program=_words(program),
        procs=job.procs_per_node,
        node_counts=" ".join(map(str, counts)),
        restarts=job.restarts,
        env=env,
        threads=job.threads or "OMP_NUM_THREADS" in {**job.env, **site.env},
        setup=site.setup,
        site=_comment(site.file),
        kind=_kind(job.image),
        image=job.image,
        step=_words([*_options(site.srun), *(_pyxis(job) if _kind(job.image) == "pyxis" else [])]),
        inside=_words(_apptainer(job) if _kind(job.image) == "Apptainer" else []),
        per=placement.per,
        tasks=each,
        gpus=gpus,
        chain=placement.chain > 1,
        exclude=shlex.quote(placement.exclude),
        script=shlex.quote(str(file)),
    )


def commands(placement: Placement, file: Path, mark: str = "MARK") -> list[list[str]]:
    """The sbatch commands; `JOB` stands for the number that the one before it gave, `mark` for what no other submission
    has, so that its jobs are found where the number is not told."""
    found = [["sbatch", "--parsable", str(file), "first", mark]]
    for _ in range(1, placement.chain):
        found.append(["sbatch", "--parsable", "--dependency=afterany:JOB", str(file), "continue", mark])
    return found


def _words(words: Iterable[str]) -> str:
    """As `shlex.join`, with quotes also where a reader, or shellcheck, could take a comma for a separator."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def _comment(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)


def _options(table: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" if value else f"--{name}" for name, value in table.items()]


def _sbatch_lines(job: Job, placement: Placement) -> list[str]:
    array = len(tasks_of(placement.sweep))
    log = str(job.run_dir / "launch" / ("slurm-%A_%a.log" if array else "slurm-%j.log"))
    if "%" in str(job.run_dir) or "\\" in str(job.run_dir):
        raise JobError(f"run_dir={job.run_dir}: Slurm replaces % and \\ in the name of a log; name another --run")
    fewest = job.min_nodes or job.nodes
    table = {
        "job-name": job.name,
        "chdir": str(job.folder),
        "nodes": str(job.nodes) if fewest == job.nodes else f"{fewest}-{job.nodes}",
        "ntasks-per-node": str(job.procs_per_node if placement.per == "process" else 1),
    }
    cores = job.threads * (1 if placement.per == "process" else job.procs_per_node)
    table |= {"cpus-per-task": str(cores)} if job.threads else {}
    table |= {"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node else {}
    if job.time_s:
        if job.time_s <= placement.signal_before:
            raise JobError(
                f"--time of {job.time_s} s with --signal-before {placement.signal_before}: every job would be asked to "
                "end as soon as it begins; give it more time, or a shorter notice"
            )
        minutes = -(-job.time_s // 60)
        table["time"] = f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
    for name in ("partition", "account", "qos", "exclude"):
        table |= {name: getattr(placement, name)} if getattr(placement, name) else {}
    table |= {"array": f"0-{array - 1}"} if array else {}
    table |= {"signal": f"B:USR1@{placement.signal_before}", "requeue": "", "open-mode": "append", "output": log}
    table |= placement.site.sbatch
    lines = []
    for name, value in table.items():
        if re.search(r"[\n\r\0\"'\\]", value):
            raise JobError(f"--{name}={value!r}: sbatch cannot be told a quote, a backslash or a new line")
        origin = f"  # from {placement.site.file}" if name in placement.site.sbatch else ""
        quoted = value if _PLAIN.fullmatch(value) else f'"{value}"'
        lines.append((f"--{name}={quoted}" if value else f"--{name}") + _comment(origin))
    return lines


def _kind(image: str) -> str:
    return "" if not image else "Apptainer" if image.endswith(".sif") else "pyxis"


def _mounts(job: Job) -> list[str]:
    """Those asked for, and the folders that every process needs, under their own names."""
    own = [f"{folder}:{folder}" for folder in dict.fromkeys((str(job.run_dir), str(job.folder)))]
    return [*job.mounts, *(mount for mount in own if mount not in job.mounts)]


def _apptainer(job: Job) -> list[str]:
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if job.gpus_per_node else []), *binds, "--pwd", str(job.folder), job.image]


def _pyxis(job: Job) -> list[str]:
    mounts = ",".join(_mounts(job))
    return [f"--container-image={job.image}", f"--container-mounts={mounts}", f"--container-workdir={job.folder}"]
