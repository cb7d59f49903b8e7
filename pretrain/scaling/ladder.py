"""LADDER.yaml: budgets of compute, sizes and settings, as the trials of a sweep. Nothing is started here.

At each budget C every size M is trained on D = C / M tokens, M the training FLOPs a token of DeepSeek LLM (arXiv
2401.02954, section 3.2). Learning rate and batch size are those of a law at C, times factors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from perilune.pretrain import config as configs
from perilune.pretrain import presets, rules
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token, parameters, scaling_flops
from perilune.pretrain.scaling.laws import DEEPSEEK, Law, exactly, read_fit
from perilune.pretrain.scaling.sizes import scaled
from perilune.pretrain.scaling.tokens import of_length, rows_of, short_of
from perilune.pretrain.scaling.words import short, some
from perilune.pretrain.schedule import total_tokens
from perilune.pretrain.schema import Config, Model
from perilune.pretrain.timetable import rows_multiple
from perilune.pretrain.train_command import ready

LEAST_STEPS = 20  # of a trial: whole steps are then within 2.5% of its budget, less than `perilune fit` tells apart
_SAVES = 4  # of a trial, so that one that is cut off goes on from there
_OWN = {  # keys of `train` that the ladder sets, and what sets them
    "optim.lr": "lr and law", "train.global_batch_size": "batch and law", "train.steps": "budgets and sizes",
    "train.tokens": "budgets and sizes", "train.seed": "seeds", "schedule.warmup_tokens": "warmup",
}  # fmt: skip
_IN_FIT = {"lr": "lr_opt", "batch": "batch_opt", "size": "m_opt"}


@dataclass(frozen=True)
class Ladder:
    """The file's keys, checked one by one."""

    file: str
    preset: str
    budgets: tuple[tuple[float, tuple[str, ...]], ...]  # (C in FLOPs, names of its sizes; none: all)
    sizes: Mapping[str, Any]  # name -> keys of the model; or {scale: [...]}; or {count: n, within: factor}
    set: tuple[str, ...] = ()  # KEY=VALUE of every trial
    law: Mapping[str, Law] = field(default_factory=lambda: dict(DEEPSEEK))  # lr, batch, and for `count` size
    lr: tuple[float, ...] = (1.0,)  # times the law's
    batch: tuple[float, ...] = (1.0,)
    grid: Any = "middle"  # sizes that get every lr and batch: middle, all, or names; the others get the law's alone
    seeds: tuple[int, ...] = ()
    warmup: float | None = None  # part of a trial's tokens; None: the preset's part of its own
    passes: float = 1.0  # most times that a trial may see its corpus


@dataclass(frozen=True)
class Planned:
    """A trial to run."""

    name: str
    budget: float
    size: str
    config: Config  # paths absolute
    words: tuple[str, ...]  # what `train PRESET` is given
    flops_per_token: float

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def batch_tokens(self) -> int:
        return self.config.train.global_batch_size * self.config.data.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def compute(self) -> float:
        """Training FLOPs M D: its budget, but for whole steps."""
        return self.flops_per_token * self.tokens

    @property
    def work(self) -> float:
        """All training FLOPs, with vocabulary and MTP and the causal half of attention: what its time goes by."""
        return self.tokens * flops_per_token(self.config.model, self.config.data.seq_len).training

    @property
    def facts(self) -> dict[str, Any]:
        """What is known before it runs; columns of trials.csv."""
        count = parameters(self.config.model)
        return {
            "trial": self.name, "budget": self.budget, "size": self.size, "flops_per_token": self.flops_per_token,
            "tokens": self.tokens, "lr": self.config.optim.lr, "batch_tokens": self.batch_tokens, "steps": self.steps,
            "compute": self.compute, "work": self.work, "params_total": count.total, "params_active": count.active,
            "seed": self.config.train.seed,
        }  # fmt: skip


def read_ladder(file: Path) -> Ladder:
    """The keys of `file`. Raises InputError for one that is unknown, missing or cannot be."""
    tree = configs.read_yaml(file)
    known = [f.name for f in fields(Ladder) if f.name != "file"]
    if not isinstance(tree, dict):
        raise InputError(f"{file}: a ladder has the keys {', '.join(known)}, not {tree!r}")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"a ladder has {', '.join(known)}"
            raise InputError(f"{file}: unknown key {key!r}: {hint} (keys of `train` stand under `set`)")
    if missing := [key for key in ("preset", "budgets", "sizes") if key not in tree]:
        raise InputError(f"{file}: {', '.join(missing)} must be there; docs/scaling.md has an example")
    found: dict[str, Any] = {"preset": str(tree["preset"]), "sizes": _sizes(file, tree["sizes"])}
    found["budgets"] = tuple(_budgets(file, tree["budgets"], found["sizes"]))
    found["set"] = tuple(_words(file, "set", tree.get("set") or {}))
    for word in found["set"]:
        if (key := word.partition("=")[0]) in _OWN:
            raise InputError(f"{file}: set: {key} is the ladder's own, by {_OWN[key]}; leave it out")
    for key in ("lr", "batch"):
        if key in tree:
            found[key] = _numbers(file, key, tree[key])
    found["law"] = _laws(file, tree.get("law", "deepseek"))
    found["grid"] = _grid(file, tree.get("grid", "middle"), found["sizes"])
    if "seeds" in tree:
        found["seeds"] = tuple(int(seed) for seed in _numbers(file, "seeds", tree["seeds"], whole=True))
    if "warmup" in tree:
        found["warmup"] = _numbers(file, "warmup", [tree["warmup"]], zero=True)[0]
        if found["warmup"] >= 1:
            raise InputError(f"{file}: warmup={tree['warmup']}: a part of a trial's tokens, below 1")
    if "passes" in tree:
        found["passes"] = _numbers(file, "passes", [tree["passes"]])[0]
    return Ladder(str(file), **found)


def plan(ladder: Ladder, world: int, *, data_there: bool = True) -> list[Planned]:
    """Every trial for `world` processes, the smallest budget first; none twice.

    Raises InputError for one that cannot run, has fewer than LEAST_STEPS steps, or needs more tokens than `passes` of
    its corpus; without `data_there` a corpus that is not seen here is not asked.
    """
    base = _with_data(ladder)
    found: dict[str, Planned] = {}
    for compute, names in ladder.budgets:
        length = base.data.seq_len
        models = sorted(_models(ladder, base, compute, names), key=lambda one: scaling_flops(one[1], length))
        grid = _with_grid(ladder, models)
        for name, model in models:
            lrs, batches = (ladder.lr, ladder.batch) if name in grid else ((1.0,), (1.0,))
            for times_lr in lrs:
                for times_batch in batches:
                    for seed in ladder.seeds or (base.train.seed,):
                        trial = _trial(ladder, replace(base, model=model), world, compute, name, times_lr, times_batch,
                                       seed)  # fmt: skip
                        if found.setdefault(trial.name, trial).words != trial.words:
                            raise InputError(
                                f"{ladder.file}: two trials are named {trial.name}: budgets or sizes differ in the "
                                "fourth digit alone; set them further apart"
                            )
    trials = sorted(found.values(), key=lambda trial: (trial.budget, trial.flops_per_token))
    _check(ladder, trials, world)
    _check_unique(ladder, trials, data_there)
    return trials


def fingerprints(config: Config) -> dict[str, str]:
    """`tokenizer` and `data` of the corpus, with its validation set; empty where it is not seen here."""
    paths = [*([config.data.path] if config.data.path else config.data.blend), config.valid.path]
    try:
        manifests = [read_manifest(str(path)) for path in paths]
    except InputError:
        return {"tokenizer": "", "data": ""}
    weights = "" if config.data.path else " " + json.dumps(_in_parts(config))
    return {
        "tokenizer": manifests[0]["tokenizer"]["fingerprint"][:16],
        "data": "+".join(manifest["fingerprint"][:12] for manifest in manifests) + weights,
    }


def _in_parts(config: Config) -> list[float | dict[float, float]]:
    """The weights of a blend, whose schedules are of parts of the run: the same at every length."""
    whole = total_tokens(config.train, config.data.seq_len)
    return [
        {round(start / whole, 3): now for start, now in weight.items()} if isinstance(weight, dict) else weight
        for weight in config.data.blend.values()
    ]


# ---------------------------------------------------------------- trials


def _trial(
    ladder: Ladder,
    config: Config,
    world: int,
    compute: float,
    size: str,
    times_lr: float,
    times_batch: float,
    seed: int,
) -> Planned:
    flops = scaling_flops(config.model, config.data.seq_len)
    lr = float(f"{times_lr * ladder.law['lr'](compute):.3g}")
    multiple = rows_multiple(config, rules.mesh_of(config, world).dp)
    batch = times_batch * ladder.law["batch"](compute) / config.data.seq_len
    rows = max(1, round(batch / multiple)) * multiple
    steps = max(1, round(compute / flops / (rows * config.data.seq_len)))
    tokens = steps * rows * config.data.seq_len
    if config.train.batch_ramp_tokens:
        raise InputError(f"{ladder.file}: a trial has one batch size; set train.batch_ramp_tokens to 0 under `set`")
    given = {word.partition("=")[0] for word in ladder.set}
    config = of_length(config, tokens)
    warmup = config.schedule.warmup_tokens if ladder.warmup is None else round(ladder.warmup * tokens)
    train = replace(
        config.train, steps=steps, tokens=0, global_batch_size=rows, seed=seed,
        save_every=config.train.save_every if "train.save_every" in given else -(-steps // _SAVES),
        keep=config.train.keep if "train.keep" in given else 1,
    )  # fmt: skip
    config = replace(
        config,
        train=train,
        optim=replace(config.optim, lr=lr),
        schedule=replace(config.schedule, warmup_tokens=warmup),
        valid=replace(config.valid, every=config.valid.every if "valid.every" in given else steps),
    )
    name = f"{compute:.3g}_{size}_lr{lr:g}_b{rows}".replace("+", "")
    name += f"_s{seed}" if len(ladder.seeds) > 1 else ""
    return Planned(name, compute, size, config, _as_words(ladder.preset, config), flops)


def base_of(ladder: Ladder, words: Sequence[str] = ()) -> Config:
    """The preset with `set` and `words`. Raises InputError, naming the file."""
    try:
        return configs.resolve(ladder.preset, [*ladder.set, *words])
    except InputError as error:
        raise InputError(f"{ladder.file}: {error}") from error


def _with_data(ladder: Ladder) -> Config:
    """The base with paths that are absolute, and its validation set, which is what a trial's loss is of."""
    config = base_of(ladder)
    if config.data.path is None and not config.data.blend:
        raise InputError(f"{ladder.file}: data.path or data.blend must stand under `set`, as data.path: packed/train")
    if "valid.every=0" in ladder.set:
        raise InputError(
            f"{ladder.file}: set: valid.every=0: a trial's loss is that of its validation set; leave it out, and it is "
            "read after the last step"
        )
    config = replace(config, valid=replace(config.valid, every=max(1, config.valid.every)))
    try:
        return ready(config, remedy="a trial's loss is that of its validation set: say valid.path under `set`")
    except InputError as error:
        raise InputError(f"{ladder.file}: {error}") from error


def _as_words(preset: str, config: Config) -> tuple[str, ...]:
    """KEY=VALUE that make `config` of `preset`."""
    changed = configs.diff(replace(presets.get(preset, config.stage), preset=preset), config)
    words = [f"{key}={_text(new)}" for key, (_, new) in changed.items()]
    return (*([f"stage={config.stage}"] if config.stage else []), *words)


def _text(value: Any) -> str:
    """As the command line reads it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)


def _models(ladder: Ladder, base: Config, compute: float, names: tuple[str, ...]) -> Iterator[tuple[str, Model]]:
    """(name, model) of each size of a budget."""
    sizes, length = ladder.sizes, base.data.seq_len
    if "scale" in sizes or "count" in sizes:
        whole = scaling_flops(base.model, length)
        if "scale" in sizes:
            targets = [factor * whole for factor in sizes["scale"]]
        else:
            if "size" not in ladder.law:
                raise InputError(f"{ladder.file}: sizes: count needs a law of the size; say law.size, as deepseek")
            best, count, within = ladder.law["size"](compute), sizes["count"], sizes["within"]
            targets = [best * within ** (2 * i / (count - 1) - 1) for i in range(count)]
        seen = set[Model]()
        for target in targets:
            try:
                model = scaled(base.model, length, target)
            except InputError as error:
                law = (
                    ""
                    if "scale" in sizes
                    else f" (law.size says {best:.4g} of {compute:g} FLOPs; is it of such models?)"
                )
                raise InputError(f"{ladder.file}: sizes: {error}{law}") from error
            if model not in seen:  # small ones, whose sizes whole numbers set far apart
                seen.add(model)
                yield short(scaling_flops(model, length)), model
        return
    for name in names or sizes:
        config = base_of(ladder, sizes[name])
        try:
            rules.check_model(config)  # before anything is counted
        except InputError as error:
            raise InputError(f"{ladder.file}: size {name}: {error}") from error
        yield name, config.model


def _with_grid(ladder: Ladder, models: Sequence[tuple[str, Model]]) -> set[str]:
    if ladder.grid == "all":
        return {name for name, _ in models}
    if ladder.grid == "middle":
        by_size = [name for name, _ in models]
        return {by_size[len(by_size) // 2]}
    return set(ladder.grid)


def _check(ladder: Ladder, trials: Sequence[Planned], world: int) -> None:
    short_ones = [
        f"{trial.name} ({trial.steps} steps of {trial.batch_tokens:,} tokens)"
        for trial in trials
        if trial.steps < LEAST_STEPS
    ]
    if short_ones:
        raise InputError(
            f"{ladder.file}: {some(short_ones)}: a trial needs {LEAST_STEPS} steps or more, C / (M x tokens a batch); "
            "take a larger budget, smaller sizes or smaller batches"
        )
    batches = {trial.config.train.global_batch_size for trial in trials}
    if (steps := trials[0].config.valid.steps) and len(batches) > 1:
        raise InputError(
            f"{ladder.file}: valid.steps={steps} batches of {sorted(batches)} rows are different parts of the "
            "validation set, whose losses cannot be compared; leave valid.steps out, or pack a smaller set"
        )
    for trial in trials:
        try:
            rules.check(trial.config, world)
        except InputError as error:
            raise InputError(f"{ladder.file}: {trial.name}: {error}") from error


def _check_unique(ladder: Ladder, trials: Sequence[Planned], data_there: bool) -> None:
    """No trial may see more of a corpus than it holds, `passes` times."""
    try:
        rows = rows_of(trials[0].config.data)
    except InputError as error:
        if data_there:
            raise InputError(f"{ladder.file}: {error}") from error
        return
    over = [
        f"{trial.name} ({told})"
        for trial in trials
        for told in short_of(trial.config.data, rows, trial.tokens, ladder.passes)
    ]
    if over:
        raise InputError(
            f"{ladder.file}: {some(over)}: more tokens than the corpus holds; seen twice they teach less, and laws "
            "would be of something else. Pack more data, leave out the smallest sizes of that budget, or say how often "
            "it may be seen, as passes: 2"
        )


# ---------------------------------------------------------------- the file's values


def _words(file: Path, where: str, found: Any) -> Iterator[str]:
    """KEY=VALUE of a mapping with dotted keys."""
    if not isinstance(found, dict):
        raise InputError(
            f"{file}: {where}: keys of `train` with their values, as {{model.num_layers: 4}}, not {found!r}"
        )
    for key, value in found.items():
        yield f"{key}={_text(value)}"


def _numbers(file: Path, key: str, found: Any, *, whole: bool = False, zero: bool = False) -> tuple[Any, ...]:
    """A list of numbers above 0, each once."""
    values = found if isinstance(found, list) else [found]
    for value in values:
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not (value > 0 or (zero and value == 0)):
            raise InputError(f"{file}: {key}: {value!r} is no {'whole ' if whole else ''}number above 0")
        if not value < float("inf"):
            raise InputError(f"{file}: {key}: {value!r} is not finite")
    if not values or len(set(values)) < len(values):
        raise InputError(f"{file}: {key}={found!r}: one value or more, each once")
    return tuple(values if whole else map(float, values))


_WAYS = ("scale", "count", "within")  # sizes that have no names


def _sizes(file: Path, found: Any) -> dict[str, Any]:
    ways = "names with keys of the model, {scale: [0.5, 1, 2]}, or {count: 5, within: 3}"
    if not isinstance(found, dict) or not found:
        raise InputError(f"{file}: sizes={found!r}: {ways}")
    if set(found) == {"scale"}:
        return {"scale": sorted(_numbers(file, "sizes.scale", found["scale"]))}
    if set(found) == {"count", "within"}:
        (count,) = _numbers(file, "sizes.count", [found["count"]], whole=True)
        (within,) = _numbers(file, "sizes.within", [found["within"]])
        if count < 2 or within <= 1:
            raise InputError(f"{file}: sizes: count={count} of 2 at least, within={within:g} above 1")
        return {"count": count, "within": within}
    named = {}
    for name, keys in found.items():
        if name in _WAYS:
            raise InputError(f"{file}: sizes: {name} stands beside {', '.join(map(str, found))}: {ways}")
        if not isinstance(name, str) or not name.replace("-", "").replace(".", "").isalnum():
            raise InputError(f"{file}: sizes: {name!r}: {ways}; a name has letters, digits, - and .")
        named[name] = tuple(_words(file, f"sizes.{name}", keys))
        if wrong := [word for word in named[name] if not word.startswith("model.")]:
            raise InputError(f"{file}: sizes.{name}: {wrong[0]}: keys of the model alone; others stand under `set`")
    return named


def _budgets(file: Path, found: Any, sizes: Mapping[str, Any]) -> Iterator[tuple[float, tuple[str, ...]]]:
    entries = found if isinstance(found, list) else [found]
    named = not {"scale", "count"} & sizes.keys()
    computes: list[float] = []
    for entry in entries:
        names: tuple[str, ...] = ()
        if isinstance(entry, dict):
            if set(entry) != {"compute", "sizes"} or not isinstance(entry["sizes"], list) or not named:
                raise InputError(
                    f"{file}: budgets: {entry}: write C, or {{compute: C, sizes: [names]}} of sizes by name"
                )
            names = tuple(map(str, entry["sizes"]))
            if unknown := [name for name in names if name not in sizes]:
                raise InputError(f"{file}: budgets: no size is named {unknown[0]!r}; there are {', '.join(sizes)}")
            entry = entry["compute"]
        computes += _numbers(file, "budgets", [entry])
        yield computes[-1], names
    _numbers(file, "budgets", computes)


def _grid(file: Path, found: Any, sizes: Mapping[str, Any]) -> Any:
    if found in ("middle", "all"):
        return found
    if isinstance(found, list) and found and all(name in sizes and name not in _WAYS for name in found):
        return tuple(found)
    raise InputError(f"{file}: grid={found!r}: middle, all, or a list of names of sizes ({', '.join(sizes)})")


def _laws(file: Path, found: Any) -> dict[str, Law]:
    """Of deepseek; of a fit.json; or for each of lr, batch, size one of these or {k, exponent}."""
    if not isinstance(found, dict):
        needed = (
            "lr",
            "batch",
            *(["size"] if found == "deepseek" or "m_opt" in read_fit(Path(str(found))).laws else []),
        )
        found = dict.fromkeys(needed, found)
        return {name: _law(file, name, value) for name, value in found.items()}
    for name in found:
        if name not in DEEPSEEK:
            raise InputError(f"{file}: law: {name!r} is none of {', '.join(DEEPSEEK)}")
    return DEEPSEEK | {name: _law(file, name, value) for name, value in found.items()}


def _law(file: Path, name: str, value: Any) -> Law:
    if value == "deepseek":
        return DEEPSEEK[name]
    if isinstance(value, dict) and set(value) == {"k", "exponent"}:
        (k,) = _numbers(file, f"law.{name}.k", [value["k"]])
        if isinstance(value["exponent"], bool) or not isinstance(value["exponent"], int | float):
            raise InputError(f"{file}: law.{name}.exponent={value['exponent']!r} is no number")
        return exactly(k, float(value["exponent"]))
    if not isinstance(value, str):
        raise InputError(f"{file}: law.{name}={value!r}: deepseek, a fit.json, or {{k: ..., exponent: ...}}")
    there = read_fit(Path(value))
    if _IN_FIT[name] not in there.laws:
        raise InputError(
            f"{file}: law: {value} has no {_IN_FIT[name]}, which its trials did not support; say law.{name}, as "
            "deepseek or {k: ..., exponent: ...}"
        )
    if name == "size" and there.per != "flops_per_token":
        raise InputError(f"{file}: law: {value} is of {there.per}, and a ladder's sizes are FLOPs a token")
    return there.laws[_IN_FIT[name]]
