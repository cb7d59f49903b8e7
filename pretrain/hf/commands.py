"""`perilune export` and `perilune import`: words in, one line out, exit code.

Both are the work of one process, whatever the size: tensors stream through it. Under torchrun the first process does
it and the others leave at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from perilune.parallel import store
from perilune.parallel.quiet import quiet
from perilune.pretrain.hf.shards import parse_size

_FAILED = 1


def export_command(
    source: Path, out: Path, dtype: str | None, names: str | None, max_shard_size: str, verify: bool, ema: bool = False
) -> int:
    """Export, with `ema` the average of the weights, verified if asked for; returns the exit code.

    Raises InputError for what cannot be exported.
    """
    if not _first():
        return 0
    size = parse_size(max_shard_size)
    from perilune.pretrain.hf.export import VerifyError, export

    verified_by: Callable[..., str] | None = None
    if verify:
        from perilune.pretrain.hf import verify as checks  # with torch, which the export itself does not import

        checks.check_installed()
        verified_by = checks.verify
    try:
        export(source, out, dtype=dtype, names=names, max_shard_bytes=size, average=ema, verified_by=verified_by)
    except VerifyError as error:
        print(f"perilune: error: {error}. Nothing was left at {out}", file=sys.stderr)
        return _FAILED
    return 0


def import_command(folder: Path, out: Path, overrides: tuple[str, ...]) -> int:
    """Import; returns the exit code. Raises InputError for what cannot be imported."""
    if not _first():
        return 0
    from perilune.pretrain.hf.importing import import_hf

    import_hf(folder, out, overrides)
    print(f"next: perilune train PRESET --config {out / 'config.yaml'} --init-from {out} data.path=DIR")
    return 0


def _first() -> bool:
    """Whether this process does the work; it no longer belongs to the launched group then."""
    quiet()
    store.leave()
    return os.environ.get("RANK", "0") == "0"
