"""`perilune launch`: a command that is checked here, then given to a launcher as a job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from perilune.launch.job import Job, JobError, NoAnswer, Papers
from perilune.pretrain import config as configs
from perilune.pretrain import rules
from perilune.pretrain.errors import InputError, Unanswered
from perilune.pretrain.schema import Config
from perilune.pretrain.start import Start, run_dir_of


@dataclass(frozen=True)
class Asked:
    """What follows `--`: a `train` with every path absolute, or another command that runs in many processes."""

    arguments: tuple[str, ...]
    run_dir: Path
    config: Config | None  # of `train`
    start: Start


def asked(arguments: tuple[str, ...]) -> Asked:
    """Check the command that is to be launched as `perilune` itself would. Raises InputError, click's errors."""
    from perilune.pretrain.cli import main, train

    name, rest = arguments[0], list(arguments[1:])
    if name != "train":
        if name not in main.commands:
            raise InputError(f"what follows -- is a command of perilune's, as `train demo`; {name!r} is none")
        stamp = Path("runs") / name
        return Asked(arguments, stamp.resolve(), None, Start())
    params = train.make_context("perilune train", rest).params
    for option, given in (("--nproc", params["nproc"]), ("--dry-run", params["dry_run"])):
        if given:
            raise InputError(f"{option} belongs to `perilune launch`, before the --")
    if params["plot"]:
        raise InputError(f"--plot {params['plot']} draws what is planned: it goes with `perilune train --dry-run`")
    config = configs.resolve(params["preset"], params["overrides"], params["config_file"])
    run_dir = (params["run_dir"] or run_dir_of(config)).resolve()
    start = Start(params["init_from"], params["after"])
    words = ["train", params["preset"], *params["overrides"], "--run", str(run_dir)]
    words += ["--config", str(params["config_file"].resolve())] if params["config_file"] else []
    words += [*start.words(), *(["--profile"] if params["profile"] else [])]
    return Asked(tuple(words), run_dir, config, start)


def told(error: JobError) -> InputError:
    """The same, of this package."""
    return Unanswered(str(error)) if isinstance(error, NoAnswer) else InputError(str(error))


def job_of(
    given: Asked,
    *,
    nodes: tuple[int, int],
    procs_per_node: int,
    options: dict[str, Any],
    swept: Sequence[Config] = (),
    **more: Any,
) -> Job:
    """The job of options that every launcher has, its layout checked: that of every run where a sweep has several, so
    that with fewer nodes all of them fit. Raises InputError."""
    from perilune.pretrain import train_command as here

    fewest, most = nodes
    world = most * procs_per_node
    worlds: tuple[int, ...] = ()
    if given.config is not None:
        runs = swept or [given.config]
        for config in runs:
            here.check_data_named(config)
            rules.check(config, world)
        counts = [n * procs_per_node for n in range(fewest, most + 1)]
        worlds = tuple(count for count in counts if all(_fits(config, count) for config in runs))
    for pair in options["env"]:
        if "=" not in pair:
            raise InputError(f"--env {pair!r}: write NAME=VALUE")
    env = dict(pair.partition("=")[::2] for pair in options["env"])
    try:
        return Job(
            given.arguments,
            given.run_dir,
            nodes=most,
            min_nodes=fewest,
            procs_per_node=procs_per_node,
            threads=options["threads"] or (given.config.train.threads if given.config else 0),
            env=env,
            restarts=options["restarts"] if given.config else 0,  # another command leaves nothing to go on from
            hang_s=options["hang_after"],
            start_s=options["start_within"],
            worlds=worlds,
            **more,
        )
    except JobError as error:
        raise InputError(str(error)) from error


def _fits(config: Config, world: int) -> bool:
    try:
        rules.check(config, world)
    except InputError:
        return False
    return True


def launch_local(**options: Any) -> int:
    """`perilune launch local`; returns the exit code. Raises InputError."""
    from perilune.launch import local
    from perilune.pretrain import train_command as here

    as_json = options["as_json"]
    given = asked(options["arguments"])
    config = given.config and here.ready(given.config)
    gpus = here.gpus_here()
    nproc = options["nproc"] or (here.processes_here(config, gpus) if config else max(1, gpus))
    job = job_of(given, nodes=(1, 1), procs_per_node=nproc, options=options)
    if options["dry_run"]:
        if config is not None:
            here.check_data_if_seen(config, remote=False)
        print(job.to_json() if as_json else local.describe(job))
        return 0
    here.refuse_second(given.run_dir)
    if config is not None:
        here.check_here(config, given.run_dir, nproc, gpus, given.start)
    code = here.start_here(job, as_json, prepare_run=partial(here.prepare, config, given.run_dir))
    if as_json:
        _, where = Papers(job.run_dir).read()
        print(json.dumps({"job": json.loads(job.to_json()), "where": where, "code": code}))
    return code


def launch_slurm(**options: Any) -> int:
    """`perilune launch slurm`; returns the exit code. Raises InputError, Unanswered."""
    from perilune.launch import slurm, slurm_script
    from perilune.pretrain import train_command as here

    given = asked(options["arguments"])
    gpus = options["gpus_per_node"]
    more: dict[str, Any] = {"gpus_per_node": gpus, "image": options["image"], "mounts": tuple(options["mounts"])}
    more |= {"program": ("perilune",)} if options["image"] else {}
    try:
        sweep = slurm_script.parse_sweep(options["sweep"])
        swept = _swept(given, sweep)
        runs = swept or ([here.ready(given.config)] if given.config else [])
        job = job_of(
            given,
            nodes=options["nodes"],
            procs_per_node=options["procs_per_node"] or gpus or 1,
            options=options,
            swept=swept,
            time_s=slurm_script.seconds(options["time_limit"]),
            **more,
        )
        placement = slurm_script.Placement(
            per=options["per"],
            signal_before=options["signal_before"],
            partition=options["partition"] or "",
            account=options["account"] or "",
            qos=options["qos"] or "",
            exclude=options["exclude"] or "",
            chain=options["chain"],
            sweep=sweep,
            site=slurm_script.Site.read(options["site"]) if options["site"] else slurm_script.Site(),
        )
        file = (options["script"] or Papers(job.run_dir).folder / "job.sh").resolve()
        if not options["image"]:
            _check_data_if_seen(runs, remote=not options["dry_run"])
        if options["dry_run"]:
            print(
                slurm.record(job, placement, file, []) if options["as_json"] else slurm.describe(job, placement, file)
            )
            return 0
        numbers = slurm.submit(job, placement, file)
    except JobError as error:
        raise told(error) from error
    if options["as_json"]:
        print(slurm.record(job, placement, file, numbers))
    else:
        print(f"submitted: job {', '.join(numbers)}, by {file}\nnext: perilune jobs status {job.run_dir}")
    return 0


def _swept(given: Asked, sweep: tuple[tuple[str, tuple[str, ...]], ...]) -> list[Config]:
    """The configuration of each run. Raises InputError, JobError."""
    from perilune.launch import slurm_script
    from perilune.pretrain import train_command as here

    if sweep and given.config is None:
        raise InputError("--sweep adds key=value to `train`; another command takes none")
    found = [asked((*given.arguments, *words)).config for _, words in slurm_script.tasks_of(sweep)]
    return [here.ready(config) for config in found if config is not None]


def _check_data_if_seen(runs: Sequence[Config], *, remote: bool) -> None:
    """Of each run; once where several read the same in the same way. Raises InputError."""
    from perilune.pretrain import train_command as here

    def read(config: Config) -> str:
        model = config.model
        return repr((config.data, config.valid, config.vision, model.vocab_size, model.num_nextn_predict_layers))

    for config in {read(config): config for config in runs}.values():
        here.check_data_if_seen(config, remote=remote)


def launch_ray(**options: Any) -> int:
    """`perilune launch ray`; returns the exit code. Raises InputError, Unanswered."""
    from perilune.launch import ray_jobs
    from perilune.pretrain import train_command as here

    given = asked(options["arguments"])
    config = given.config and here.ready(given.config)
    gpus, address = options["gpus_per_node"], options["address"]
    if address is None and options["nodes"][1] > 1:
        raise InputError(f"--nodes {options['nodes'][1]} needs --address: a cluster begun for one run has one node")
    procs = options["procs_per_node"] or gpus or 1
    job = job_of(given, nodes=options["nodes"], procs_per_node=procs, options=options, gpus_per_node=gpus)
    if options["dry_run"]:
        if config is not None:
            here.check_data_if_seen(config, remote=False)
        print(job.to_json() if options["as_json"] else ray_jobs.describe(job, address))
        return 0
    try:
        if config is not None and address is None:
            here.refuse_second(given.run_dir)
            here.check_here(config, given.run_dir, job.world, gpus, given.start)
        elif config is not None:
            here.check_data_if_seen(config)
        prepare_run = partial(here.prepare, None if address else config, given.run_dir)  # else the job's rank 0 does
        code = ray_jobs.run(job, address, insecure=options["insecure"], wait=options["wait"], prepare_run=prepare_run)
    except JobError as error:
        raise told(error) from error
    if options["as_json"]:
        _, where = Papers(job.run_dir).read()
        print(json.dumps({"job": json.loads(job.to_json()), "where": where, "code": code}))
    elif code == 0:
        print(f"done: {job.run_dir}" if options["wait"] else f"next: perilune jobs status {job.run_dir}")
    elif code == 75:
        print(f"preempted; the same command continues from the last checkpoint: {job.run_dir}")
    return code
