"""Where a run starts from: one module a preset, each a page of a lab notebook, loaded only when asked for."""

from __future__ import annotations

import difflib
from importlib import import_module

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config

_NAMES = ("tiny", "tiny_vl", "demo", "proxy_100m", "moonlight_16b_a3b", "kimi_vl_a3b", "deepseek_v3")  # smallest first


def names() -> tuple[str, ...]:
    """All presets, the smallest first."""
    return _NAMES


def get(name: str) -> Config:
    """The preset's configuration. Raises InputError, naming the nearest, if there is none of that name."""
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "none is near it."
        raise InputError(f"no preset is named {name!r}: {hint} Presets: {', '.join(_NAMES)}")
    config: Config = getattr(import_module(f"{__name__}.{name}"), name)()
    return config
