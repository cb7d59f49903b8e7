"""A run's tokens: its schedules stretched to another number of them, and how many of them its corpus holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from perilune.pretrain.data.blend import Blend
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.errors import InputError
from perilune.pretrain.schedule import total_tokens
from perilune.pretrain.schema import Config, Data


class OtherLength(InputError):
    """Rows are not as long as the run's."""


def of_length(config: Config, tokens: int) -> Config:
    """`config` of `tokens` tokens: warm-up, a ramp of the batch and weights of a blend keep their parts of the run.

    Those are all that a configuration says in tokens; what else changes in a run it says in parts of it.
    """
    part = tokens / total_tokens(config.train, config.data.seq_len)
    blend = dict(config.data.blend)
    for name, weight in blend.items():
        if isinstance(weight, dict):
            blend[name] = {round(start * part): from_there_on for start, from_there_on in sorted(weight.items())}
    ramp = round(config.train.batch_ramp_tokens * part)
    return replace(
        config,
        train=replace(config.train, steps=0, tokens=tokens, batch_ramp_tokens=ramp),
        schedule=replace(config.schedule, warmup_tokens=round(config.schedule.warmup_tokens * part)),
        data=replace(config.data, blend=blend),
    )


def rows_of(data: Data) -> dict[str, int]:
    """Rows that each dataset of `data` holds. Raises InputError for one that cannot be read, OtherLength for one
    whose rows are not of `data.seq_len` tokens."""
    found = {}
    for path in [data.path] if data.path else data.blend:
        manifest = read_manifest(path)
        if manifest["seq_len"] != data.seq_len:
            raise OtherLength(
                f"{path} has rows of {manifest['seq_len']} tokens, data.seq_len is {data.seq_len}: set data.seq_len="
                f"{manifest['seq_len']}, or pack it with --seq-len {data.seq_len}"
            )
        found[path] = int(manifest["rows"])
    return found


def short_of(data: Data, rows: Mapping[str, int], tokens: int, passes: float = 1.0) -> list[str]:
    """Of which datasets, with `rows`, a run of `tokens` tokens reads more than `passes` times what they hold."""
    length, wanted = data.seq_len, tokens // data.seq_len
    counts = [wanted] if data.path else Blend(data.blend, length).counts(wanted).tolist()
    return [
        f"{want * length:,} from {path}, which holds {have * length:,}"
        for (path, have), want in zip(rows.items(), counts, strict=True)
        if want > passes * have
    ]
