"""Models of other sizes, made from one by a rule, for ladders and for what a fit predicts.

The rule: depth and width grow together, each with the cube root of the size (a layer costs about the square of its
width), so that their ratio stays. Heads and every inner width go with the hidden size; the size of a head, the number
of experts, how many of them a token meets, the vocabulary and MTP stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import parameters, scaling_flops
from perilune.pretrain.schema import Model

_INNER = ("q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")
_LARGEST = 64  # times the base's width
_OFF = 0.25  # that a size may be off


def size_of(model: Model, seq_len: int, per: str) -> float:
    """What laws are laws of: M, or of a fit to `params` the parameters that a token meets besides the vocabulary's."""
    if per == "params":
        return float(parameters(model).active_without_embeddings)
    return scaling_flops(model, seq_len)


def scaled(base: Model, seq_len: int, size: float, per: str = "flops_per_token") -> Model:
    """`base` made as near to `size` as whole numbers of layers and steps of the width allow.

    Raises InputError where the rule has no model within a quarter of it.
    """
    ratio = (size / size_of(base, seq_len, per)) ** (1 / 3)
    layers = max(1, round(base.num_layers * ratio))
    step = _step(base.hidden_size)
    widths = range(step, _LARGEST * base.hidden_size + 1, step)
    # A layer more or less where there is no width for that many: heads go in steps too.
    for depth in (layers, layers + 1, max(1, layers - 1)):
        found = _of(base, depth, _nearest(base, depth, widths, seq_len, size, per))
        have = size_of(found, seq_len, per)
        if 1 - _OFF <= have / size <= 1 + _OFF:
            break
    else:
        raise InputError(
            f"no model near {per}={size:.4g} comes from scaling layers and width of one with {base.num_layers} layers "
            f"and hidden size {base.hidden_size}: of {depth} and {found.hidden_size} it is {have:.4g}; "
            "begin from a base nearer to it"
        )
    return found


def _nearest(base: Model, layers: int, widths: Sequence[int], seq_len: int, size: float, per: str) -> int:
    """The width whose size is nearest in its logarithm; sizes rise with widths."""
    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        if size_of(_of(base, layers, widths[middle]), seq_len, per) < size:
            low = middle + 1
        else:
            high = middle
    near = widths[max(0, low - 1) : low + 1]

    def off(width: int) -> float:
        have = size_of(_of(base, layers, width), seq_len, per)
        return max(have / size, size / have)

    return min(near, key=off)


def _step(base: int, least: int = 8) -> int:
    """Of which a width is a multiple: a power of two, a sixteenth of the base's at most, `least` at least."""
    return max(least, 1 << max(0, (base // 16).bit_length() - 1))


def _of(base: Model, layers: int, hidden: int) -> Model:
    ratio = hidden / base.hidden_size
    inner: dict[str, Any] = {name: value and _near(value * ratio, _step(value)) for name, value in _inner(base)}
    dense = layers
    if base.n_routed_experts:
        part = round(base.first_k_dense_replace * layers / base.num_layers)
        dense = min(max(part, min(1, base.first_k_dense_replace)), layers - 1)
    return replace(
        base,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=_near(base.num_attention_heads * ratio, _step(base.num_attention_heads, 1)),
        first_k_dense_replace=dense,
        **inner,
    )


def _near(value: float, step: int) -> int:
    """The multiple of `step` next to `value`, not 0."""
    return max(1, round(value / step)) * step


def _inner(base: Model) -> list[tuple[str, int | None]]:
    return [(name, getattr(base, name)) for name in _INNER]
