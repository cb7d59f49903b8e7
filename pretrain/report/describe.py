"""The report's facts in words and units: summary, data, model, configuration, environment. Text only; no HTML here."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from perilune.pretrain import config as configs
from perilune.pretrain import presets
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan import vision_counts
from perilune.pretrain.plan.counts import flops_per_token, parameters
from perilune.pretrain.plan.frozen import training_flops
from perilune.pretrain.report.read import Run
from perilune.pretrain.schema import Config

MAX_SOURCES = 16  # rows of the data mixture; the rest are one row
MISSING = "–"


@dataclass(frozen=True)
class Bar:
    """A cell with a bar behind its text: `part` of the column's width, 0 to 1."""

    text: str
    part: float


@dataclass(frozen=True)
class Table:
    """`rows` of cells under `head`; the columns from `numbers` on are set flush right, None for none."""

    head: list[str]
    rows: list[list[str | Bar]]
    title: str = ""
    note: str = ""
    numbers: int | None = None
    marked: list[int] = field(default_factory=list)  # rows that stand out


# ---------------------------------------------------------------- numbers


def si(value: float) -> str:
    """Four significant digits with k (from 10,000), M, B, T, as papers count parameters and tokens: `15.29 B`."""
    for least, size, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.4g} {letter}"
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.4g}"


def flop(value: float) -> str:
    """Operations: with k, M, G, T up to 10^15, then as a power of ten, as budgets of training are given."""
    if value >= 1e15:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa}e{int(exponent)} FLOP"
    size, letter = next(((s, c) for s, c in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{value / size:.4g} {letter}FLOP"


def gib(value: float) -> str:
    """Bytes as GiB, or MiB below one of them."""
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def count(n: int, word: str) -> str:
    """`1 step`, `1,000 steps`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def shown(value: Any) -> str:
    """A configuration's value as YAML would have it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(of)}' for key, of in value.items())}}}"
    return str(value)


# ---------------------------------------------------------------- summary


def state(run: Run) -> str:
    """Whether the run is done, as far as its files say."""
    planned = run.config.train.steps
    if not run.steps:
        return "no step recorded yet"
    step = int(run.columns["step"][-1])
    done = step >= planned if planned else run.columns["tokens"][-1] >= run.config.train.tokens
    when = f", last written {_utc(run.written)}" if run.written is not None else ""
    return ("complete" if done else f"not complete: at step {step:,}") + when


@dataclass(frozen=True)
class Fact:
    """One figure of a run: `unit` is the same for all runs, `remark` is the run's own."""

    name: str
    value: str
    unit: str = ""
    remark: str = ""


def summary(run: Run) -> list[Fact]:
    """The figures that come first, the same ones for every run; MISSING where nothing was recorded."""
    t = run.config.train
    step, tokens = _last(run, "step")[0], _last(run, "tokens")[0]
    planned = f"of {si(t.tokens)} planned" if t.tokens else f"{tokens:,.0f}" if tokens is not None else ""
    facts = [
        Fact("Steps", _or_missing(step, "{:,.0f}"), remark=f"of {t.steps:,} planned" if t.steps else ""),
        Fact("Tokens", MISSING if tokens is None else si(tokens), remark=planned),
    ]
    for key, name, unit in (
        ("loss", "Training loss", "nats/token"),
        ("mtp_loss", "MTP loss", "nats/token"),
        ("valid_loss", "Validation loss", "nats/token"),
        ("valid_bpb", "Validation", "bits/byte"),
    ):
        value, at = _last(run, key)
        facts.append(Fact(name, _or_missing(value, "{:.4f}"), unit, "" if at is None else f"step {at:,.0f}"))
    speed, memory = _median(run, "tokens_per_s"), run.columns.get("memory")
    peak = None if memory is None or np.isnan(memory).all() else float(np.nanmax(memory))
    return [
        *facts,
        Fact("Throughput", MISSING if speed is None else si(speed), "tokens/s, median"),
        Fact("MFU", _or_missing(_median(run, "mfu"), "{:.1%}"), "median"),
        Fact("Memory", MISSING if peak is None else gib(peak), "peak of the largest rank"),
        Fact("Skipped", count(int(run.skipped.sum()), "step"), "loss or gradient not finite"),
    ]


def _or_missing(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)


def _last(run: Run, key: str) -> tuple[float | None, float | None]:
    """The last number recorded under `key`, and its step."""
    values = run.columns.get(key)
    if values is None or np.isnan(values).all():
        return None, None
    there = np.flatnonzero(~np.isnan(values))
    return float(values[there[-1]]), float(run.columns["step"][there[-1]])


def _median(run: Run, key: str) -> float | None:
    values = run.columns.get(key)
    return None if values is None or np.isnan(values).all() else float(np.nanmedian(values))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---------------------------------------------------------------- data


def data(runs: list[Run]) -> list[Table]:
    """Each packed dataset of runs that read the same ones: sources, sizes, documents' lengths, by its manifest.

    A dataset that is not where the configuration says, or is damaged, gives a table that says so.
    """
    config = runs[0].config.data
    weights = config.blend or ({config.path: 1.0} if config.path else {})
    # Of a schedule by tokens the weight that it ends with.
    blend = {path: (w[max(w)] if w else 0.0) if isinstance(w, dict) else w for path, w in weights.items()}
    total = math.fsum(blend.values())
    tables = []
    if len(blend) > 1:
        rows: list[list[str | Bar]] = [[f, Bar(f"{w / total:.1%}", w / total)] for f, w in blend.items()]
        tables.append(Table(["dataset", "share of samples"], rows, title="Blend", numbers=1))
    for folder in blend:
        try:
            manifest = read_manifest(Path(folder))
            tables += [_sources(folder, manifest), _lengths(manifest)]
        except (InputError, OSError, KeyError, TypeError, ValueError) as error:
            tables.append(Table([], [], title=folder, note=f"not shown: {error}"))
    if len(blend) == 1 and len(tables) > 1:
        read = [(run.name, _last(run, "tokens")[0] or 0, manifest["tokens"]) for run in runs]
        epochs = ", ".join(f"{name} {tokens:,.0f} tokens ({tokens / held:.3g} epochs)" for name, tokens, held in read)
        tables[0] = replace(tables[0], note=f"{tables[0].note} Read so far: {epochs}.")
    return tables


def _sources(folder: str, manifest: dict[str, Any]) -> Table:
    """Files by the first folder in which their names differ; `bytes` are those of the files."""
    files = manifest["recipe"]["files"]
    common = os.path.commonpath([os.path.dirname(file["name"]) for file in files]) if files else ""
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for file in files:
        below = os.path.relpath(file["name"], common) if common else file["name"]
        top, _, rest = below.partition("/")
        group = (
            below if len(files) <= MAX_SOURCES else os.path.join(common, top, "") if rest else os.path.join(common, "*")
        )
        sizes[group] += file["bytes"]
        numbers[group] += 1
    ranked = sizes.most_common()
    listed = ranked if len(ranked) <= MAX_SOURCES else ranked[: MAX_SOURCES - 1]
    total, largest = sum(sizes.values()) or 1, ranked[0][1] or 1 if ranked else 1
    rows: list[list[str | Bar]] = [
        [group, f"{numbers[group]:,}", f"{size:,}", Bar(f"{size / total:.1%}", size / largest)]
        for group, size in listed
    ]
    if rest_of := ranked[len(listed) :]:
        size = sum(size for _, size in rest_of)
        files_left = sum(numbers[group] for group, _ in rest_of)
        rows.append(
            [
                f"{len(rest_of)} others",
                f"{files_left:,}",
                f"{size:,}",
                Bar(f"{size / total:.1%}", min(1.0, size / largest)),
            ]
        )
    packing = manifest["packing"]
    note = (
        f"{count(packing['documents'], 'document')}, {packing['raw_bytes']:,} bytes of text, "
        f"{manifest['tokens']:,} tokens in {count(manifest['rows'], 'row')} of {manifest['seq_len']:,}: "
        f"{packing['raw_bytes'] / max(1, packing['document_tokens']):.2f} bytes a token; "
        f"vocabulary {manifest['tokenizer']['vocab_size']:,}; fingerprint {manifest['fingerprint'][:16]}."
    )
    return Table(["source", "files", "bytes of files", "share"], rows, title=folder, note=note, numbers=1)


def _lengths(manifest: dict[str, Any]) -> Table:
    lengths = manifest["packing"]["document_lengths"]
    largest = max(lengths.values(), default=1) or 1
    rows: list[list[str | Bar]] = [[f"{size} tokens", Bar(f"{n:,}", n / largest)] for size, n in lengths.items()]
    return Table(["length", "documents"], rows, title="Documents by length", numbers=1)


# ---------------------------------------------------------------- model, configuration, environment


def counts(runs: list[Run]) -> Table:
    """Parameters and FLOPs of the runs' models, by formula (`pretrain/plan/`); of training with what is frozen."""
    columns = []
    for run in runs:
        model, vision, seq_len = run.config.model, run.config.vision, run.config.data.seq_len
        has, cost, training = parameters(model), flops_per_token(model, seq_len), training_flops(run.config).token
        seeing = vision_counts.parameters(vision, model.hidden_size)
        columns.append(
            {
                "parameters, without MTP": f"{has.total:,}",
                "active a token, with one of embedding and head": f"{has.active:,}",
                "active a token, without both": f"{has.active_without_embeddings:,}",
                "embedding and head": f"{has.embedding + has.head:,}",
                "one dense layer": f"{has.dense_layer:,}",
                "one expert layer": f"{has.moe_layer:,}",
                "MTP, besides the shared embedding and head": f"{has.mtp:,}",
                **(
                    {"vision tower, besides": f"{seeing.tower:,}", "projector, besides": f"{seeing.projector:,}"}
                    if vision.num_layers
                    else {}
                ),
                "row length": f"{seq_len:,} tokens",
                "forward": f"{flop(cost.forward)} a token",
                "of it attention scores and values": f"{cost.attention_scores / cost.forward:.1%}",
                "training, forward and backward": f"{flop(training)} a token",
                f"so far{', images apart' if vision.num_layers else ''}": flop(
                    training * (_last(run, "tokens")[0] or 0)
                ),
            }
        )
    return _side_by_side(runs, columns, "count")


def differences(runs: list[Run]) -> Table:
    """Keys on which the runs' configurations differ; of one run, on which it differs from its preset."""
    trees = [_leaves(run.config) for run in runs]
    heads = [run.name for run in runs]
    title = "Differences between the runs"
    if len(runs) == 1:
        config = runs[0].config
        try:
            trees.insert(0, _leaves(presets.get(config.preset, config.stage)))
        except InputError as error:
            return Table([], [], title="Differences", note=str(error))
        heads, title = [f"preset {config.preset} {config.stage}".rstrip(), "this run"], "Differences from the preset"
    changed = [key for key in trees[0] if any(tree[key] != trees[0][key] for tree in trees)]
    rows: list[list[str | Bar]] = [[key, *(shown(tree[key]) for tree in trees)] for key in changed]
    return Table(["key", *heads], rows, title=title, note="" if rows else "none: every key has the same value")


def _leaves(config: Config) -> dict[str, Any]:
    """`{dotted key: value}` in the schema's order."""
    leaves: dict[str, Any] = {}
    for key in list(configs.keys()):
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        leaves[key] = node
    return leaves


def environments(runs: list[Run]) -> Table:
    """With what each run's newest start ran; the rows where runs differ are marked."""
    if not any(run.starts for run in runs):
        return Table([], [], note="the runs recorded no environment.json" if len(runs) > 1 else "none recorded")
    return _side_by_side(runs, [_environment(run.starts[-1]) if run.starts else {} for run in runs], "")


def _environment(start: dict[str, Any]) -> dict[str, str]:
    """A record of `environment.environment`, which a damaged or later one may lack parts of."""
    gpus = Counter(f"{gpu['name']}, {gib(gpu['memory_bytes'])}" for gpu in start.get("gpus", []))
    facts = {
        "started": start.get("started"),
        "at step": start.get("step"),
        "processes": start.get("world_size"),
        "command": " ".join(start.get("command", [])),
        "source": start.get("source"),
        "system": start.get("system"),
        "processor": start.get("cpu"),
        "cores": start.get("cores"),
        "host memory": gib(start["memory_bytes"]) if "memory_bytes" in start else None,
        "threads a process": start.get("threads"),
        "GPUs of the first host": "; ".join(f"{n} x {gpu}" for gpu, n in gpus.items()) or "none",
        "CUDA": start.get("cuda"),
        "cuDNN": start.get("cudnn"),
        "NCCL": start.get("nccl"),
        "Python": start.get("python"),
        **start.get("versions", {}),
        **{f"${key}": value for key, value in start.get("variables", {}).items()},
    }
    return {key: shown(value) for key, value in facts.items() if value not in (None, "")}


def _side_by_side(runs: list[Run], columns: list[dict[str, str]], what: str) -> Table:
    """A row a name, a column a run; rows that differ are marked."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows: list[list[str | Bar]] = [[name, *(column.get(name, MISSING) for column in columns)] for name in names]
    known = [column for column in columns if column]  # a run without a record differs in nothing
    differ = [
        i for i, name in enumerate(names) if len({column.get(name) for column in known}) > 1 and name != "started"
    ]
    heads = [run.name for run in runs] if len(runs) > 1 else [""]
    return Table([what, *heads], rows, marked=differ, numbers=1 if what else None)
