"""What a run takes over from the runs before it, as the stages of a vision-language model do, one after the other.

Weights go part by part (`rules.PARTS`): a part is taken whole, from the last of the runs named that holds each of its
tensors in this model's shape, or it is drawn anew. So the vision stage's small decoder never gets into the place of the
language model, and a tower finds its way into any decoder. What else a run holds (its text encoder, MTP layers) is
left. Moments and masters go with their part, again from the last run that has them: those of a language model that the
alignment froze come from the text run, and a master that does not round to the weight gives way to it. An average of
the weights (`optim.ema_decay`) goes with the moments where these are of the run whose weights are taken, or where that
run had the part frozen; else it begins as the weights. Adam counts one step for all: where some moments go on and
others begin at zero, the count goes on, so that the n-th update of the new ones is (1 - beta1^n) / sqrt(1 - beta2^n) of
what it would be: 0.45 at first with 0.9 and 0.95, at most 1.1 later.

Rows of data that were read already are not read again before the others: a dataset goes on from where the furthest of
those runs was in it, of those with this run's `train.seed`. In the order of another seed a place says nothing of what
was read: behind as many rows of it lie some that were, and before them some that were not and would be left out. So
such an order begins at its beginning, and the log says so. The schedules, steps and tokens are the run's own, and begin
at zero.

Every function with a model in it is collective, as in `pretrain/checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from perilune.pretrain import checkpoint
from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import checkpoint_optimizer as moments
from perilune.pretrain import checkpoint_shards as shards
from perilune.pretrain import config as configs
from perilune.pretrain.agreement import Ranks
from perilune.pretrain.checkpoint_files import CheckpointError
from perilune.pretrain.checkpoint_metadata import Shape, stored_shapes
from perilune.pretrain.data.stream import DataState, Stream
from perilune.pretrain.model import Model
from perilune.pretrain.rules import PARTS, part_of
from perilune.pretrain.schema import Config
from perilune.pretrain.start import checkpoint_at

_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Source:
    path: Path
    manifest: dict[str, Any]
    metadata: Any
    shapes: _Shapes  # of all that it holds
    config: Config

    def fits(self, asked: _Shapes) -> bool:
        """Whether it holds each of these tensors in this shape."""
        return bool(asked) and all(self.shapes.get(key) == shape for key, shape in asked.items())

    def misfit(self, asked: _Shapes) -> str:
        """Why it does not: one tensor."""
        key = next(key for key, shape in asked.items() if self.shapes.get(key) != shape)
        return f"{key} is {list(asked[key])} here, there " + (
            str(list(self.shapes[key])) if key in self.shapes else "is none"
        )


@dataclass(frozen=True)
class Taken:
    """What was taken over; `history` (plain JSON) tells of the runs before, for this run's checkpoints."""

    state: DataState
    history: list[dict[str, Any]]
    told: list[str]  # lines for the log: what goes on and what begins anew


def take_over(paths: Sequence[Path], model: Model, optimizer: Any, stream: Stream) -> Taken:
    """Fill `model` and `optimizer` from the runs or checkpoints `paths`, of which later ones win, part by part.

    `model` must hold the weights that it starts with. Raises CheckpointError for a checkpoint that is damaged, and for
    one of which nothing fits this model.
    """
    sources = [_open(checkpoint_at(path)) for path in paths]
    asked = _by_part(_asked(checkpoint.model_state(model)))
    weights = {part: _last(sources, keys) for part, keys in asked.items()}
    for source in sources:
        if not any(source.fits(keys) for keys in asked.values()):
            raise CheckpointError(
                f"--after {source.path}: no part of this model is whole in it ("
                + "; ".join(f"{part}: {source.misfit(keys)}" for part, keys in asked.items())
                + ")"
            )
    for source in sources:
        _fill_weights(source, model, {part for part, found in weights.items() if found is source})
    state = moments.sharded_state(optimizer, checkpoint.model_state(model), loading=True)
    of_state = _by_part(_asked({"optimizer": state}))  # of the parts that train, a frozen one has no moments
    kept = {
        part: _last(sources, {key: shape for key, shape in keys.items() if moments.is_moment(key)})
        if weights[part] is not None
        else None
        for part, keys in of_state.items()
    }
    averaged = {
        part: _averaged(part, weights[part], kept[part], averages)
        for part, keys in of_state.items()
        if (averages := {key: shape for key, shape in keys.items() if moments.is_average(key)})
    }
    adam_step = _fill_moments(state, kept, averaged, model, optimizer)
    before = [(s, DataState.from_dict(s.manifest["run_state"]["data"])) for s in sources if _ran(s)]
    data = stream.begin_after([state for source, state in before if source.config.train.seed == stream.seed])
    history = _history(sources)
    return Taken(
        data, history, [*_told(sources, weights, kept, averaged, adam_step), *_told_of_data(data, before, stream.seed)]
    )


def _open(path: Path) -> _Source:
    manifest, metadata = checkpoint.opened(path)
    shapes = {key: shape for key, (shape, _) in stored_shapes(metadata).items()}
    return _Source(path, manifest, metadata, shapes, configs.load(path / files.CONFIG))


def _ran(source: _Source) -> bool:
    """An imported checkpoint has read no data."""
    return "data" in source.manifest["run_state"]


def _asked(state: dict[str, Any]) -> _Shapes:
    """Global shapes of what all ranks together ask for."""
    tensors, _ = extract_sharded_base(load_preprocess(state)[0])
    found: dict[str, Shape] = {}
    for part in Ranks().gathered(shards.shapes(tensors)):
        found.update(part)
    return {key: shape for key, (shape, _) in sorted(found.items())}


def _by_part(shapes: _Shapes) -> dict[str, _Shapes]:
    parts: dict[str, _Shapes] = {part: {} for part in PARTS}
    for key, shape in shapes.items():
        parts[part_of(moments.weight_of(key))][key] = shape
    return {part: keys for part, keys in parts.items() if keys}


def _last(sources: Sequence[_Source], asked: _Shapes) -> _Source | None:
    return next((source for source in reversed(sources) if source.fits(asked)), None)


def _averaged(part: str, weights: _Source | None, kept: _Source | None, asked: _Shapes) -> _Source | None:
    """The run whose average of a part goes on, from those of its weights and its moments; `asked` are the averages."""
    if weights is None or kept is None or not kept.fits(asked):
        return None
    return kept if weights is kept or part in weights.config.train.freeze else None


def _fill_weights(source: _Source, model: Model, parts: set[str]) -> None:
    state = {
        chunk: {name: entry for name, entry in entries.items() if part_of(entry.key) in parts}
        for chunk, entries in checkpoint.model_state(model).items()
    }
    loaded = _read(state, lambda key: source)
    for index, chunk in enumerate(model.bare()):
        chunk.load_state_dict(loaded.get(f"model{index}", {}), strict=False)


def _fill_moments(
    state: dict[int, Any],
    kept: dict[str, _Source | None],
    averaged: dict[str, _Source | None],
    model: Model,
    optimizer: Any,
) -> int:
    """Moments and masters of the parts in `kept`, averages of those in `averaged`, from their source, the others new.

    Returns Adam's count of steps.
    """

    def source_of(key: str) -> _Source | None:
        source = (averaged if moments.is_average(key) else kept).get(part_of(moments.weight_of(key)))
        return source if source is not None and key in source.shapes else None

    moments.begin_where(state, checkpoint.model_state(model), lambda key: source_of(key) is None)
    step = max((source.manifest["optimizer_step"] for source in kept.values() if source is not None), default=0)
    loaded = _read({"optimizer": state}, source_of)
    moments.load_state(optimizer, loaded.get("optimizer", {}), step)
    moments.masters_of_weights(optimizer)  # the moments' run may not be that of the weights
    return step


def _read(state: dict[str, Any], source_of: Callable[[str], _Source | None]) -> dict[str, Any]:
    """Megatron-core's sharded `state` with its tensors read, each from the source of its key if it has one."""
    state, local, factories = load_preprocess(state)
    tensors, plain = extract_sharded_base(state)
    merge(plain, local)
    wanted: dict[Path, tuple[_Source, list[Any]]] = {}
    for tensor in nested_values(tensors):
        source = source_of(tensor.key)
        if source is None:  # it holds what it begins with
            continue
        wanted.setdefault(source.path, (source, []))[1].append(tensor)

    def read() -> None:
        for source, mine in wanted.values():
            shards.read({"": mine}, source.path, source.metadata)  # into the tensors themselves

    Ranks().everywhere(read, CheckpointError, "taking over")
    return apply_factory_merges(merge(plain, dict_list_map_inplace(lambda tensor: tensor.data, tensors)), factories)


def _history(sources: Sequence[_Source]) -> list[dict[str, Any]]:
    """The runs before, each once, the earliest first."""
    found: list[dict[str, Any]] = []
    for source in sources:
        run_state, config = source.manifest["run_state"], source.config
        mine = {
            "checkpoint": str(source.path),
            "preset": config.preset,
            "stage": config.stage,
            "step": source.manifest["step"],
            "tokens": run_state["data"]["tokens"] if _ran(source) else 0,
        }
        found += [one for one in [*run_state.get("before", []), mine] if one not in found]
    return found


def _told(
    sources: Sequence[_Source],
    weights: dict[str, _Source | None],
    kept: dict[str, _Source | None],
    averaged: dict[str, _Source | None],
    adam_step: int,
) -> list[str]:
    lines = []
    for source in sources:
        with_weights = [part for part, found in weights.items() if found is source]
        with_moments = [part for part, found in kept.items() if found is source]
        said = [f"weights of {', '.join(with_weights)}"] if with_weights else []
        said += [f"moments of {', '.join(with_moments)}"] if with_moments else []
        with_average = [part for part, found in averaged.items() if found is source]
        said += [f"averages of {', '.join(with_average)}"] if with_average else []
        lines.append(f"after {source.path}: " + ("; ".join(said) or "nothing that a later one does not hold"))
    drawn = [part for part, found in weights.items() if found is None]
    zero = [part for part, found in kept.items() if found is None]
    lines += [f"  drawn anew: {', '.join(drawn)}"] if drawn else []
    lines += [f"  moments from zero: {', '.join(zero)}"] if zero else []
    begun = [part for part, found in averaged.items() if found is None]
    lines += [f"  averages begin as the weights: {', '.join(begun)}"] if begun else []
    lines.append(f"  from the beginning: steps, tokens, schedules, quarantine; Adam counts on from {adam_step}")
    return lines


def _told_of_data(data: DataState, before: Sequence[tuple[_Source, DataState]], seed: int) -> list[str]:
    lines = [f"  {path} goes on after {rows:,} rows that were read" for path, rows in data.earlier.items() if rows]
    for source, state in before:
        if source.config.train.seed != seed:
            lines += [
                f"  {path}: the {rows:,} rows that {source.path} read in the order of "
                f"train.seed={source.config.train.seed} may come again: this run's train.seed={seed} is another order"
                for path, fingerprint in data.fingerprints.items()
                for theirs, of_theirs in state.fingerprints.items()
                if of_theirs == fingerprint and (rows := state.counters[theirs] + state.earlier.get(theirs, 0))
            ]
    return lines
