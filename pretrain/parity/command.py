"""`perilune parity`: the matrix on this machine, with its pages."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perilune.parallel.quiet import quiet
from perilune.parallel.workers import Workers
from perilune.pretrain.errors import InputError
from perilune.pretrain.parity import fixture, layouts

if TYPE_CHECKING:
    from perilune.pretrain.parity.matrix import Result


def parity_command(max_procs: int, out: Path, model: str | None, only: str | None, dry_run: bool) -> int:
    """Run the matrix; 0 if every layout is within tolerance, else 1."""
    cases = layouts.matrix(max_procs)
    if model is not None:
        if model not in fixture.NAMES:
            raise InputError(f"--model {model}: the models that are compared are {', '.join(fixture.NAMES)}")
        cases = [case for case in cases if case.fixture == model]
    if only is not None:
        words = set(only.split())
        cases = [case for case in cases if words <= set(case.name.split())]
    if not cases:
        asked = [f"--model {model}"] if model is not None else []
        asked += [f"--only {only!r}"] if only is not None else []
        raise InputError(
            f"{' '.join(asked)}: no layout of at most {max_procs} processes is so; raise --max-procs, or see what "
            "there is with `perilune parity --dry-run`"
        )
    if dry_run:
        for case in cases:
            print(f"{case.world}  {case.name}")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)  # else half an hour would be lost
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error}") from error
    quiet()
    from perilune.pretrain.parity import pages  # only now: Megatron-core warns as it is imported
    from perilune.pretrain.parity.matrix import Matrix

    console = Console(stderr=True)
    results: list[Result] = []
    command = "perilune parity" + (f" --max-procs {max_procs}" if max_procs != 8 else "")
    command += f" --model {model}" if model else ""
    command += f" --only '{only}'" if only else ""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    size = max(case.world for case in cases)
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(size) as workers,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("starting", total=len(cases))
        matrix = Matrix(workers, Path(folder))
        try:
            for case in cases:
                progress.update(bar, description=case.name)
                result = matrix.compare(case)
                results.append(result)
                progress.advance(bar)
                if not console.is_terminal:  # a log shows no bar
                    done = f"{len(results)}/{len(cases)}  {case.name}  {result.seconds:.1f} s"
                    print(done, file=sys.stderr, flush=True)
                if result.failures:
                    said = result.error.strip().splitlines()[-1] if result.error else _said(result)
                    progress.console.print(f"out of tolerance: {case.name}: {said}", markup=False)
        finally:  # what was compared is not lost when it is interrupted
            pages.write(results, out, command)
    failed = sum(bool(result.failures) for result in results)
    print(f"{len(results) - failed} of {len(results)} layouts equal one rank: {out / 'parity.html'}")
    return 1 if failed else 0


def _said(result: Result) -> str:
    return ", ".join(f"{key} {result.deviations[key]:.1e}" for key in result.failures)
