"""Where a run starts from: one module a preset, each a page of a lab notebook, loaded only when asked for.

A preset of several stages (Kimi-VL, arXiv 2504.07491, table 1) takes the stage's name; its module lists them as STAGES,
in their order. Without a name it is the one that it says by default.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config

_NAMES = (
    "tiny", "tiny_vl", "demo", "demo_vlm", "proxy_100m", "moonlight_16b_a3b", "kimi_vl_a3b", "deepseek_v3",
)  # fmt: skip
# smallest first


def names() -> tuple[str, ...]:
    """All presets, the smallest first."""
    return _NAMES


def stages(name: str) -> tuple[str, ...]:
    """The stages of a preset, in their order; none where it has one alone. Raises InputError as `get`."""
    _known(name)
    found: tuple[str, ...] = getattr(import_module(f"{__name__}.{name}"), "STAGES", ())
    return found


def get(name: str, stage: str = "") -> Config:
    """The preset's configuration, of `stage` if it has several (empty: the one that it says by default).

    Raises InputError, naming the nearest, if there is no preset of that name, and if it has no such stage.
    """
    known = stages(name)
    if stage and stage not in known:
        having = ", ".join(other for other in _NAMES if stages(other))
        hint = f"its stages are {', '.join(known)}" if known else f"it has one alone; several have: {having}"
        raise InputError(f"stage={stage}: preset {name} has no such stage; {hint}")
    build = getattr(import_module(f"{__name__}.{name}"), name)
    config: Config = build(stage) if stage else build()
    return config


def _known(name: str) -> None:
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "none is near it."
        raise InputError(f"no preset is named {name!r}: {hint} Presets: {', '.join(_NAMES)}")
