"""Preset < YAML file < command line, merged onto the frozen dataclasses of `pretrain/schema.py` and typed at the leaf.

A key is dotted (`model.num_layers`). Values are read as YAML 1.2, in files and on the command line alike: `off`, `no`
and `1:30` are text, `1e-4` is a number (PyYAML's YAML 1.1 has it the other way round). Then each leaf is checked
strictly against its annotation: no text for a number, no true for 1, no 4.0 for 4; a whole number does for a float.
Where text is what the key holds, the command line takes the value as it stands (`data.path=1e-4` is a path).

Every error is an InputError of one line with key, value, what was expected and, for an unknown key, the nearest ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from perilune.pretrain import presets, secrets
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config

ALLOWED_ON_RESUME = (
    "train.steps",
    "train.tokens",
    "train.save_every",
    "train.log_every",
    "train.keep",
    "train.async_save",
    "train.threads",
    "valid.*",
    "data.path",
    "optim.ema_decay",
    "parallel.*",
    "data.on_damage",
    "data.quarantine_limit",
    "data.workers",
    "data.timeout_s",
    "data.retry_s",
    "data.cache_*",
    "recompute.*",
    "kernels.*",
)
"""Keys and patterns that a resumed run may change: how long, how it is spread, what is logged; not what is computed.

`data.path` only says where the data lie: that their content is the same, the fingerprint in the checkpoint says. So do
the names in `data.blend`, whose weights stay as they are, in their order.
"""


def resolve(
    preset: str, overrides: Sequence[str] = (), yaml_file: Path | None = None, base: Config | None = None
) -> Config:
    """The configuration of a run: `preset` (or `base` in its place), then `yaml_file`, then `overrides` (`key=value`).

    The key `stage`, of either, chooses the preset's stage. Raises InputError for an unknown preset or stage, a file
    that cannot be read, an unknown or repeated key, a section where a key is meant, a value of the wrong type, and a
    URL that carries a credential.
    """
    filed: dict[str, Any] = {}
    if yaml_file is not None:
        filed = _checked(_flatten(read_yaml(yaml_file), f"in {yaml_file}"), f"in {yaml_file}")
        named = filed.pop("preset", preset)
        if named != preset:
            raise InputError(f"{yaml_file} is for preset {named!r}, the command names {preset!r}: name the same one")
    words = _parse_overrides(overrides)
    if base is None:
        base = presets.get(preset, words.get("stage", filed.get("stage", "")))
    config = _replace(_replace(dataclasses.replace(base, preset=preset), filed), words)
    for key, value in _leaf_values(config):
        texts = [value] if isinstance(value, str) else value if isinstance(value, dict) else []
        secrets.refuse(key, [text for text in texts if isinstance(text, str)])
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, lists, numbers, text and None, in the schema's order; `from_dict` inverts it."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(tree: Mapping[str, Any], source: str = "in the configuration") -> Config:
    """The configuration that `to_dict` made `tree` from.

    A key that is absent keeps the schema's default, so that a run saved before the key existed can be read. Raises
    InputError, naming `source`, for an unknown key and for a value of the wrong type.
    """
    return _replace(Config(), _checked(_flatten(tree, source), source))


def to_yaml(config: Config) -> str:
    """`config` as the YAML text that `save` writes."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save(config: Config, path: Path) -> None:
    """Write `config` to `path` as YAML, whole or not at all."""
    text = to_yaml(config)
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


def load(path: Path) -> Config:
    """What `save` wrote to `path`. Raises InputError for a file that is missing, damaged or of an unknown key."""
    return from_dict(read_yaml(path), f"in {path}")


def diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """`{dotted key: (old value, new value)}` of the keys that differ, in the schema's order."""
    before, after = dict(_leaf_values(old)), dict(_leaf_values(new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_resume(old: Config, new: Config) -> None:
    """Raises InputError, listing them, if `new` changes keys of the run's `old` beyond ALLOWED_ON_RESUME."""
    changed = {
        key: values
        for key, values in diff(old, new).items()
        if not any(fnmatchcase(key, pattern) for pattern in ALLOWED_ON_RESUME)
        and not (key == "data.blend" and list(values[0].values()) == list(values[1].values()))
    }
    if changed:
        listed = ", ".join(f"{key} ({was!r} -> {now!r})" for key, (was, now) in changed.items())
        raise InputError(
            f"this run was started with other values of {listed}. Resuming may change only "
            f"{', '.join(ALLOWED_ON_RESUME)}, and where the datasets of data.blend lie: give the old values, or "
            "another --run directory"
        )


@cache
def keys() -> dict[str, Any]:
    """`{dotted key: its annotation}` of every leaf of the schema."""
    return dict(_leaf_types(Config))


# ---------------------------------------------------------------- walking the schema


def _leaf_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaf_types(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hint


def _leaf_values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaf_values(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _replace(node: Any, values: Mapping[str, Any]) -> Any:
    """`node`, a dataclass, with the leaves at the dotted keys of `values` exchanged."""
    changes = {}
    for f in dataclasses.fields(node):
        below = {key.removeprefix(f"{f.name}."): v for key, v in values.items() if key.startswith(f"{f.name}.")}
        if f.name in values:
            changes[f.name] = values[f.name]
        elif below:
            changes[f.name] = _replace(getattr(node, f.name), below)
    return dataclasses.replace(node, **changes) if changes else node


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, dict) else value


def _flatten(tree: Any, source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings -> (dotted key, value) of the leaves. A section may be empty (all commented out)."""
    if tree is None:
        return
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix.rstrip('.') or 'what stands'} {source} is {tree!r}, not a section with keys")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in keys():
            yield key, value
        elif _section(key):
            yield from _flatten(value, source, f"{key}.")
        else:
            raise _unknown(key, source)


def _section(key: str) -> list[str]:
    """The keys below `key`, empty if it is no section."""
    return [k for k in keys() if k.startswith(f"{key}.")]


def _unknown(key: str, source: str) -> InputError:
    """An error that names the keys nearest to `key`, by the whole of it and by its last part."""

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return (whole + last) / 2, max(whole, last)

    scored = sorted(((*likeness(known), known) for known in keys()), key=lambda row: -row[0])
    near = [known for mean, best, known in scored[:3] if best >= 0.6 and mean >= scored[0][0] - 0.1]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(_sections())}"
    return InputError(f"unknown key {key!r} {source}: {hint}")


def _sections() -> list[str]:
    return list(dict.fromkeys(k.partition(".")[0] for k in keys() if "." in k))


# ---------------------------------------------------------------- typing a value


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words -> typed values by dotted key."""
    source = "on the command line"
    seen: dict[str, str] = {}
    parsed: list[tuple[str, Any]] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not key=value, as in train.steps=100")
        if key == "preset":
            raise InputError(f"{word!r}: the preset is the command's first argument, not a key to override")
        if below := _section(key):
            raise InputError(f"{word!r}: {key} is a section; set one of its keys: {', '.join(below)}")
        if key not in keys():
            raise _unknown(key, source)
        if key in seen:
            raise InputError(f"{key} is given twice, {seen[key]!r} and {word!r}: keep one")
        if not text:
            raise InputError(f"{word!r} has no value" + ("; null clears it" if _takes_none(keys()[key]) else ""))
        seen[key] = word
        parsed.append((key, _read_text(key, text, source)))
    return _checked(parsed, source, {key: word.partition("=")[2] for key, word in seen.items()})


def _takes_none(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself; None left out."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(m for m in members if m is not NoneType)


def _read_text(key: str, text: str, source: str) -> Any:
    """A value of the command line: as it stands where the key holds text, else as YAML."""
    hint = keys()[key]
    if _takes_none(hint) and text.lower() in ("none", "null"):
        return None
    if any(t is str or get_origin(t) is Literal for t in _alternatives(hint)):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):  # ValueError: a number of thousands of digits
        raise _wrong_type(key, text, text, source) from None


def _checked(
    pairs: typing.Iterable[tuple[str, Any]], source: str, written: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Each value checked and brought to its key's type (list to tuple, int to float).

    Raises InputError, which shows a value as it was `written` where that is known.
    """
    checked: dict[str, Any] = {}
    for key, value in pairs:
        if key in checked:
            raise InputError(f"{key} is given twice {source}: keep one")
        sequence = any(get_origin(t) is tuple for t in _alternatives(keys()[key]))
        try:
            checked[key] = _adapter(key).validate_python(
                tuple(value) if sequence and isinstance(value, list) else _whole_number_keys(value), strict=True
            )
        except ValidationError:
            raise _wrong_type(key, value, (written or {}).get(key, repr(value)), source) from None
    return checked


def _whole_number_keys(value: Any) -> Any:
    """JSON knows keys of text only: those of a mapping inside a mapping (a schedule's tokens) are numbers again."""
    if not isinstance(value, dict):
        return value
    inner = {name: below for name, below in value.items() if isinstance(below, dict)}
    return value | {
        name: {int(k) if isinstance(k, str) and re.fullmatch("[0-9]{1,18}", k) else k: v for k, v in below.items()}
        for name, below in inner.items()
    }


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(keys()[key], config=ConfigDict(allow_inf_nan=False))


def _wrong_type(key: str, value: Any, shown: str, source: str) -> InputError:
    hint, default = keys()[key], dict(_leaf_values(Config()))[key]
    usual = f", as in {key}={default}" if type(default) in (int, float) else ""
    message = f"{key}={shown} {source}: expected {_in_words(hint)}{usual}"
    if int in _alternatives(hint) and isinstance(value, float) and value.is_integer():
        message += f"; write {int(value)}"
    return InputError(message)


def _plural(hint: Any) -> str:
    words = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
    return " or ".join(
        words[t] if t in words else f"mappings of {_plural(get_args(t)[0])} to {_plural(get_args(t)[1])}"
        for t in _alternatives(hint)
    )


def _in_words(hint: Any) -> str:
    """An annotation as a user reads it: 'a whole number or null'."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = []
    for t in _alternatives(hint):
        args = get_args(t)
        if get_origin(t) is Literal:
            parts.append("one of " + ", ".join(map(str, args)))
        elif get_origin(t) is tuple:
            parts.append(f"a list of {_plural(args[0])}, as in [a, b]")
        elif get_origin(t) is dict:
            parts.append(f"a mapping of {_plural(args[0])} to {_plural(args[1])}, as in {{a: 1, b: 2}}")
        else:
            parts.append(words[t])
    return " or ".join([*parts, *(["null"] if _takes_none(hint) else [])])


# ---------------------------------------------------------------- YAML 1.2


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2's core schema and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader`, or another program's YAML 1.1 (`fp8: off`), would read as something other than text."""


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
)
_Loader.yaml_implicit_resolvers = {}
for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _first_characters = [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first_characters)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks that are Unicode's, not ASCII's, are only kept where they stand escaped, between double quotes."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_yaml(path: Path) -> Any:
    """What a file of YAML 1.2 holds. Raises InputError for one that cannot be read, or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from error
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
