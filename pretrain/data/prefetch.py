"""Reading: which rows are wanted comes in, their micro-batches go out, here or in a process of its own.

A reading process is a fresh interpreter that imports no torch. It gets work over a pipe and ends when the pipe does,
however its parent ended. It decides nothing: which rows, and what replaces a damaged one, is told by the stream.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from perilune.pretrain.data.assemble import Arrays, assemble
from perilune.pretrain.data.caption_noise import misread
from perilune.pretrain.data.images import read_decoded
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row
from perilune.pretrain.data.storage import Remote
from perilune.pretrain.errors import InputError

Ids = list[tuple[int, int]]  # (dataset, row) of a micro-batch's rows


@dataclass(frozen=True)
class Recipe:
    """How rows are read and laid out."""

    paths: tuple[str, ...]  # of the datasets
    fingerprints: tuple[str, ...]  # of their content, as the run opened them
    depth: int  # D of multi-token prediction
    document_mask: bool
    remote: Remote
    quarantine: bool  # damaged rows are reported, not raised
    caption_noise: float = 0.0  # `caption_noise.misread`
    decode: bool = False  # images become patches: the run has a vision tower


@dataclass(frozen=True)
class Finding:
    """A damaged row."""

    dataset: int
    row: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The micro-batches asked for; none of them where some row was damaged."""

    batches: tuple[Arrays, ...]
    findings: tuple[Finding, ...] = ()


def load(datasets: Sequence[PackedDataset], recipe: Recipe, micro_batches: Sequence[Ids]) -> Loaded:
    """Read the rows of `micro_batches`. Raises DamageError where one is damaged, unless the recipe quarantines it.

    Images are part of a row: where they are decoded, one that cannot be is the row's damage.
    """
    batches, findings = [], []
    for ids in micro_batches:
        rows: list[Row] = []
        patches: list[np.ndarray] = []  # of each image of the rows
        for d, i in ids:
            try:
                row, seen = read_decoded(datasets[d], i) if recipe.decode else (datasets[d][i], [])
                rows.append(row)
                patches += seen
            except DamageError as error:
                if not recipe.quarantine:
                    raise
                findings.append(Finding(d, i, str(error)))
        if not findings:
            names = [f"{recipe.paths[d]}/{datasets[d].sample_id(i)}" for d, i in ids]
            read = [misread(row, recipe.caption_noise) for row in rows] if recipe.caption_noise else []
            batches.append(assemble(rows, recipe.depth, recipe.document_mask, names, patches, read))
    return Loaded(() if findings else tuple(batches), tuple(findings))


class ReadingProcess:
    """One process that loads; used by one thread at a time."""

    def __init__(self, recipe: Recipe) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import main; main()", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._pipe.send(recipe)

    def load(self, micro_batches: Sequence[Ids]) -> Loaded:
        """As `load`; RuntimeError where the process is gone."""
        try:
            self._pipe.send(micro_batches)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.kill()
            raise RuntimeError(
                f"the reading process {self._process.pid} is gone (exit code {self._process.wait()}; a negative one is "
                "a signal, -9 most often a lack of memory); the same command continues from the last checkpoint"
            ) from error
        if isinstance(answer, InputError):
            raise answer
        return answer

    def end(self) -> None:
        """End the process; a thread inside `load` gets its RuntimeError."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and let go of the pipe, once no thread uses it."""
        self.end()
        self._pipe.close()


def serve(pipe: Connection) -> None:
    """Load what the pipe asks for until it ends."""
    recipe: Recipe = pipe.recv()
    datasets: list[PackedDataset] = []
    while True:
        micro_batches = pipe.recv()
        answer: Loaded | InputError
        try:
            if not datasets:  # inside, so that a dataset that cannot be opened is told like one that cannot be read
                opened = [PackedDataset(path, recipe.remote, whole=False) for path in recipe.paths]
                for dataset, fingerprint in zip(opened, recipe.fingerprints, strict=True):
                    dataset.refuse_other(fingerprint)
                datasets = opened
            answer = load(datasets, recipe, micro_batches)
        except InputError as error:
            answer = error
        pipe.send(answer)


def main() -> None:
    """In the process: the pipe's descriptor is the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a run that is told to stop goes on to its checkpoint
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):  # the parent is gone
        return
