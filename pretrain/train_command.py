"""`perilune train`: the resolved run checked before any process starts, then started, or joined under RANK."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from perilune.launch import launchers, local
from perilune.launch.job import Job, JobError, NoAnswer, Papers
from perilune.parallel import late_compile
from perilune.pretrain import checkpoint_files, doctor, presets, rules, vital_signs
from perilune.pretrain import config as configs
from perilune.pretrain.data import storage
from perilune.pretrain.data.storage import is_url
from perilune.pretrain.errors import InputError, Unanswered
from perilune.pretrain.schema import Config
from perilune.pretrain.start import Start, run_dir_of


@vital_signs.watched()
def train_command(
    preset: str,
    overrides: tuple[str, ...],
    config_file: Path | None,
    run_dir: Path | None,
    nproc: int | None,
    dry_run: bool,
    profile: bool,
    start: Start,
    plot: Path | None = None,
) -> int:
    """Train `preset` with `overrides` in `run_dir` (default `run_dir_of`); returns the exit code.

    With `dry_run` nothing starts: the run is described, and its schedules are drawn to `plot`.
    Under RANK and WORLD_SIZE this process is one of a run that somebody else started, and starts none.
    Raises InputError for what cannot run.
    """
    if plot is not None and not dry_run:
        raise InputError(f"--plot {plot} draws what is planned: it goes with --dry-run")
    if plot is not None and not plot.parent.is_dir():
        raise InputError(f"--plot {plot}: there is no folder {plot.parent}; make it, or name a file in another")
    inside = _world_of_environment() is not None
    config = ready(configs.resolve(preset, overrides, config_file))
    run_dir = (run_dir or run_dir_of(config)).resolve()
    gpus = gpus_here()
    world = _world_of_environment() or nproc or processes_here(config, gpus)
    if dry_run:  # a plan with what is not built yet is shown before it is refused
        rules.check_fits(config, world)
        print(describe(config, world, run_dir))
        if plot is not None:
            from perilune.pretrain.schedule_picture import draw

            print(f"{plot}: {', '.join(draw(config, rules.mesh_of(config, world).dp, plot))}")
        rules.check(config, world)
        check_data_if_seen(config, remote=False)
        return 0  # the plan may be for another machine
    if not inside:
        refuse_second(run_dir)
    check_here(config, run_dir, world, gpus, start)
    if inside:
        if int(os.environ.get("RANK", "0")) == 0:
            prepare(config, run_dir)
        late_compile.import_megatron_core()
        from perilune.pretrain.run import run

        run(config, run_dir, world, start=start, profile=profile)
        return 0
    again = ["train", preset, *overrides, "--run", str(run_dir)]
    again += ["--config", str(config_file.resolve())] if config_file else []
    again += ["--profile"] if profile else []
    again += start.words()
    job = Job(tuple(again), run_dir, procs_per_node=world, threads=config.train.threads, restarts=0)
    return start_here(job, prepare_run=partial(prepare, config, run_dir))


def ready(config: Config, remedy: str = "set valid.path, or valid.every=0") -> Config:
    """`config` with paths that mean the same in every folder, and its validation set. Raises InputError, which says the
    `remedy` for one that is not there."""
    return _with_valid(_absolute(config), remedy)


def refuse_second(run_dir: Path) -> None:
    """Refuse a run that is under way, before its configuration is written over. Raises InputError, Unanswered."""
    try:
        launchers.refuse_second(Papers(run_dir))
    except NoAnswer as error:
        raise Unanswered(str(error)) from error
    except JobError as error:
        raise InputError(str(error)) from error


def check_here(config: Config, run_dir: Path, world: int, gpus: int, start: Start) -> None:
    """Refuse what cannot run before a process of it starts. Raises InputError."""
    rules.check(config, world)
    rules.check_machine(config, gpus)
    newest = checkpoint_files.latest(run_dir / "checkpoints")
    if newest is None:  # else they are not opened, and may be gone
        start.check()
    _check_data(config, newest)
    first = os.environ.get("RANK", "0") == "0"
    if first and not gpus and config.precision.compute == "bf16" and not doctor.multiplies_bf16():
        print("this CPU has no bf16 instructions: precision.compute=fp32 is at least as fast", file=sys.stderr)


def start_here(job: Job, to_stderr: bool = False, *, prepare_run: Callable[[], None]) -> int:
    """Run `job` on this machine after `prepare_run`, and say how it ended, on stdout or `to_stderr`; returns the exit
    code. Raises InputError."""
    said = sys.stderr if to_stderr else sys.stdout
    try:
        code = local.run(job, to_stderr, prepare_run)
    except JobError as error:
        raise InputError(str(error)) from error
    if code == 0 and job.arguments[0] == "train":
        print(f"done: {job.run_dir}\nnext: tensorboard --logdir {job.run_dir / 'tensorboard'}", file=said)
    elif code == 75:
        print(f"preempted; the same command continues from the last checkpoint: {job.run_dir}", file=said)
    return code


def describe(config: Config, world: int, run_dir: Path) -> str:
    """The resolved run as text: config, layout, counts."""
    from perilune.pretrain.plan import vision_counts
    from perilune.pretrain.plan.counts import table
    from perilune.pretrain.plan.frozen import training_flops
    from perilune.pretrain.plan.ranks import rank_table
    from perilune.pretrain.plan.stages import picture
    from perilune.pretrain.timetable import Timetable

    mesh = rules.mesh_of(config, world)
    plan = Timetable(config, mesh.dp)
    stages, cost = presets.stages(config.preset), training_flops(config)
    return "\n".join(
        [
            configs.to_yaml(config),
            f"run: {run_dir}",
            *([f"stage: {config.stage} of {', '.join(stages)}; stage=NAME plans another"] if stages else []),
            f"length: {plan.total_steps:,} steps, {plan.total_tokens:,} tokens",
            f"layout: {mesh.describe()}, data-parallel {mesh.dp}, copies of each expert {mesh.expert_dp}",
            "",
            table(config.model, config.data.seq_len),
            *([f"{'FLOPs a token, training, parts frozen':<44}{cost.token:>24,.0f}"] if config.train.freeze else []),
            *([vision_counts.table(config)] if config.vision.num_layers else []),
            "",
            rank_table(config, world),
            *(["", picture(config.model, config.parallel, config.vision)] if mesh.pp > 1 else []),
        ]
    )


def _with_valid(config: Config, remedy: str) -> Config:
    """`valid.path` beside `data.path`, where it is not named and is there."""
    if config.valid.path is None and config.data.path is not None:
        beside = Path(config.data.path).parent / "valid"  # of a remote dataset it is not there: valid.path names it
        if (beside / "manifest.json").is_file() and beside != Path(config.data.path):
            return dataclasses.replace(config, valid=dataclasses.replace(config.valid, path=str(beside)))
    if config.valid.path is None and config.valid.every and (config.data.path is not None or config.data.blend):
        where = Path(config.data.path).parent / "valid" if config.data.path else None  # a blend has none
        beside_it = f" and there is no packed dataset at {where}" if where else ""
        raise InputError(f"valid.every={config.valid.every}, but valid.path is not set{beside_it}; {remedy}")
    return config


def _absolute(config: Config) -> Config:
    """Paths that mean the same from whichever folder the run is resumed. Raises InputError where two of data.blend's
    are one folder: one of its weights would be lost."""
    data, valid = config.data, config.valid
    blend: dict[str, str] = {}
    for path in data.blend:
        if (before := blend.setdefault(_absolute_path(path), path)) != path:
            raise InputError(
                f"data.blend: {before} and {path} are both {_absolute_path(path)}; name it once, with the weight "
                "that it is to have in all"
            )
    data = dataclasses.replace(
        data,
        path=data.path and _absolute_path(data.path),
        blend={path: data.blend[named] for path, named in blend.items()},
        cache_dir=data.cache_dir and _absolute_path(data.cache_dir),
    )
    valid = dataclasses.replace(valid, path=valid.path and _absolute_path(valid.path))
    return dataclasses.replace(config, data=data, valid=valid)


def _absolute_path(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())


def check_data_named(config: Config) -> None:
    """Raise InputError where no data are named: such a run can start nowhere."""
    if config.data.path is None and not config.data.blend:
        raise InputError(
            "no data are named: set data.path=DIR, a dataset of `perilune pack`, or data.blend for several"
        )


def check_data_if_seen(config: Config, *, remote: bool = True) -> None:
    """As for a run that starts here, if its data are here too; else a word that the nodes must see them.

    Without `remote` no store is asked. Raises InputError for data that are here and cannot be used.
    """
    if config.data.path is None and not config.data.blend:
        print("perilune: no data are named; to train, set data.path=DIR or data.blend", file=sys.stderr)
        return
    paths = [config.data.path, *config.data.blend, config.valid.path if config.valid.every else None]
    away = [path for path in paths if path is not None and not is_url(path) and not Path(path).exists()]
    if away:
        print(f"perilune: {', '.join(away)}: not seen from here; every node must see it there", file=sys.stderr)
    elif remote or not any(path is not None and is_url(path) for path in paths):
        _check_data(config)


def _check_data(config: Config, newest: Path | None = None) -> None:
    """Open every dataset of the run once, so that one that cannot be used, or is not the one that the checkpoint
    `newest` was trained on, is refused before anything starts. Raises InputError."""
    from perilune.pretrain.data.stream import DataState, open_dataset, open_stream, remote_of

    depth, vocabulary, vision = config.model.num_nextn_predict_layers, config.model.vocab_size, config.vision
    data = dataclasses.replace(config.data, workers=0)
    if _world_of_environment() is None:  # a process of a run waits for a store that is away; a command tells soon
        data = dataclasses.replace(data, retry_s=min(data.retry_s, storage.FIRST_RETRY_S))
    with closing(open_stream(data, config.train.seed, depth=depth, vocab_size=vocabulary, vision=vision)) as stream:
        if newest is not None:
            with suppress(checkpoint_files.CheckpointError):  # the ranks go on from an older one
                saved = checkpoint_files.read_manifest(newest)["run_state"]
                if "data" in saved:
                    stream.found_again(DataState.from_dict(saved["data"]))
    if config.valid.every:
        open_dataset(
            str(config.valid.path),
            data.seq_len,
            vocabulary,
            remote_of(data),
            vision,
            tokenizer_fingerprint=stream.tokenizer_fingerprint,
        ).close()


def _world_of_environment() -> int | None:
    """WORLD_SIZE where another launcher started this process; None where this command is to start the processes."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return None
    missing = [name for name in names if name not in os.environ]
    numbers = [name for name in names if name != "MASTER_ADDR" and name in os.environ]
    wrong = [f"{name}={os.environ[name]!r}" for name in numbers if not os.environ[name].isdigit()]
    if missing or wrong:
        raise InputError(
            f"a process of a run that was started elsewhere needs {', '.join(names)}; missing: {missing}, no number: "
            f"{wrong}. Unset RANK and WORLD_SIZE to start the processes here"
        )
    return int(os.environ["WORLD_SIZE"])


def gpus_here() -> int:
    """GPUs that this process could use, without the seconds that importing torch takes where there are none."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def processes_here(config: Config, gpus: int) -> int:
    """Every GPU, or the fewest processes that the degrees need."""
    p = config.parallel
    return gpus or max(1, math.lcm(p.tp * p.cp, p.etp * p.ep) * p.pp)


def prepare(config: Config | None, run_dir: Path) -> None:
    """A new run's folder with its config, or a check that this is a run to continue; nothing for another command than
    `train`, which has none. Raises InputError."""
    if config is None:
        return
    file = run_dir / "config.yaml"
    newest = checkpoint_files.latest(run_dir / "checkpoints")
    if file.exists() and newest is not None:  # else nothing of it would be continued
        configs.check_resume(configs.load(file), config)
    if newest is not None and 0 < config.train.steps < (step := checkpoint_files.step_of(newest)):
        raise InputError(
            f"train.steps={config.train.steps}, but {run_dir} is at step {step} already: ask for more, or name another "
            "--run"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        configs.save(config, file)
    except OSError as error:
        raise InputError(f"the run directory {run_dir} cannot be written: {error}; name another with --run") from error
