"""Where a training step goes on this CPU, and how far each part is from what the machine could do.

    .venv/bin/python tests/bench/floors.py [--steps 3] [--json FILE]

One process takes the step of tests/bench/step.py in fp32, with the router's own choices, with clocks around forward and
backward of each of our operations; one that begins inside of another stops the other's. A floor is the least time that
the work can take: its FLOPs over the rate of a large matmul, or, where nothing is multiplied, the bytes that it cannot
but read and write, over the rate of a large copy (`matmul.py`; bytes read and written, both counted); both rates are
those of the same process, measured before every step. What is counted is said at each of `WORK`: each input is read
once and each result written once, with nothing computed twice and nothing kept in a cache from one operation to the
next. So an operation whose input lies in the cache may be faster than its floor. All else (embeddings, residual sums,
gradients of weights that several use, the schedule, Python) has no floor, and counts as nothing in the sum.

Seconds are medians over the steps, each row's own. `step_fp32_floor_fraction` is the sum of all floors over the seconds
of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent))

import step as bench
import torch
from matmul import copy_rate, matmul_rate
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import optimizer as megatron_optimizer
from torch.optim import AdamW

from perilune.kernels import attention_blocks, cross_entropy, experts_loop, linear, norm, rope, swiglu
from perilune.kernels.permute import Order
from perilune.moe.router import Router
from perilune.pretrain import step as steps

REST = "all else"


@dataclass
class Cost:
    """Of one kind of operation, in one step."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def floor(self, matmul: float, copy: float) -> float:
        """Seconds at `matmul` FLOP/s and `copy` bytes/s."""
        return self.flops / matmul + self.bytes / copy


@dataclass
class Clock:
    """What each kind of operation cost since the last `take`; one thread's."""

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def begin(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def end(self) -> None:
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.costs[self._open[-1]].seconds += now - self._since
        self._since = now

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def did(self, name: str, flops: float = 0.0, bytes: float = 0.0) -> None:
        self.costs[name].flops += flops
        self.costs[name].bytes += bytes

    def take(self) -> dict[str, Cost]:
        found, self.costs = dict(self.costs), defaultdict(Cost)
        return found


# FLOPs and bytes of forward and backward together, of the arguments of forward. T tokens; e bytes of a number.
Work = Callable[..., dict[str, float]]


def of_attention(q: Any, k: Any, v: Any, queries: Any, keys: Any, *_: Any) -> dict[str, float]:
    """6 (D + E) FLOPs a head for each pair of a query and a key that it sees: scores and sums, two of each back."""
    pairs = 0
    for (start, end), (first, last) in zip(queries, keys, strict=True):
        pairs += (end - start) * (last - first) - (end - start) * (end - start - 1) // 2
    return {"flops": 6.0 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])}


def of_experts(x: Any, w1: Any, w2: Any, probs: Any, *_: Any) -> dict[str, float]:
    """18 H F FLOPs for each copy of a token that was routed: three matrices, once forward and twice back."""
    return {"flops": 18.0 * probs.numel() * w2.shape[1] * w2.shape[2]}


def of_linear(x: Any, weight: Any) -> dict[str, float]:
    """6 K N FLOPs a token: its output, the gradients of its input and of its weight."""
    return {"flops": 6.0 * x.numel() * weight.shape[0]}


def of_head(hidden: Any, weight: Any, *_: Any) -> dict[str, float]:
    """6 H V FLOPs a token, as a linear layer."""
    return {"flops": 6.0 * hidden.numel() * weight.shape[0]}


def of_norm(x: Any, *_: Any) -> dict[str, float]:
    """5 H e bytes a token: x read, the output written; x and its gradient read, the input's written."""
    return {"bytes": 5.0 * x.numel() * x.element_size()}


def of_turn(x: Any, turns: Any) -> dict[str, float]:
    """4 R e bytes a token and head: the R numbers that are turned read and written, forward and back."""
    turned = x.numel() // x.shape[-1] * 2 * turns.shape[-1]
    return {"bytes": 4.0 * turned * x.element_size()}


def of_keys(kv: Any, shared: Any, P: int) -> dict[str, float]:
    """Both projections read, keys and values written, and the same of their gradients: no number is computed."""
    heads = kv.numel() // kv.shape[-1]
    numbers = kv.numel() + shared.numel() + kv.numel() + heads * shared.shape[-1]
    return {"bytes": 2.0 * numbers * kv.element_size()}


def of_swiglu(h: Any) -> dict[str, float]:
    """8 F e bytes a token: 2F read, F written; 2F and a gradient of F read, 2F written."""
    return {"bytes": 4.0 * h.numel() * h.element_size()}


def of_router(router: Any, hidden: Any) -> dict[str, float]:
    """6 H E FLOPs a token, as a linear layer; choosing and sorting have no floor."""
    return {"flops": 6.0 * hidden.numel() * router.num_experts}


def of_norm_of_gradients(gradients: Any, *_: Any, **__: Any) -> dict[str, float]:
    """4 bytes a parameter: each gradient read."""
    return {"bytes": 4.0 * sum(one.numel() for one in gradients)}


def of_clip(parameters: Any, max_norm: float, total_norm: float) -> dict[str, float]:
    """8 bytes a parameter, read and written; nothing where the norm is not above its limit."""
    return {"bytes": 8.0 * sum(one.numel() for one in parameters) if total_norm > max_norm else 0.0}


def of_zero(chunk: Any) -> dict[str, float]:
    """4 bytes a parameter, written."""
    return {"bytes": 4.0 * sum(one.numel() for one in chunk.parameters() if one.requires_grad)}


def of_adamw(adamw: Any, *_: Any) -> dict[str, float]:
    """28 bytes a parameter: weight, gradient and two moments read, all but the gradient written."""
    return {"bytes": 28.0 * sum(one.numel() for group in adamw.param_groups for one in group["params"])}


WORK: tuple[tuple[str, Any, Work], ...] = (
    ("experts", experts_loop._Routed, of_experts),
    ("linear layers", linear._Linear, of_linear),
    ("attention", attention_blocks._Blocked, of_attention),
    ("head, cross-entropy", cross_entropy._LinearCrossEntropy, of_head),
    ("RMSNorm", norm._RmsNorm, of_norm),
    ("RoPE, keys and values", rope._RotateTails, of_turn),
    ("RoPE, keys and values", rope._KeysAndValues, of_keys),
    ("SwiGLU", swiglu._SwiGlu, of_swiglu),
)
CALLS: tuple[tuple[str, Any, str, Work], ...] = (
    ("AdamW", AdamW, "step", of_adamw),
    ("norm of gradients, clipping", megatron_optimizer, "get_grad_norm_fp32", of_norm_of_gradients),
    ("norm of gradients, clipping", steps, "clip_grad_by_total_norm_fp32", of_clip),
    ("gradients set to zero", DistributedDataParallel, "zero_grad_buffer", of_zero),
)
ROUTER = "router, permutation"
NAMES = tuple(dict.fromkeys([*(name for name, *_ in WORK), ROUTER, *(name for name, *_ in CALLS)]))


@contextlib.contextmanager
def watched_by(clock: Clock) -> Iterator[None]:
    """Every step of this process tells `clock` what it does, as long as this lasts; models are built before."""
    with contextlib.ExitStack() as patches:

        def put(owner: Any, attribute: str, value: Any) -> None:
            patches.enter_context(patch.object(owner, attribute, value))

        for name, function, work in WORK:
            put(function, "forward", staticmethod(_watched(clock, name, function.forward, _without_context(work))))
            put(function, "backward", staticmethod(_watched(clock, name, function.backward)))
        for name, owner, attribute, work in CALLS:
            put(owner, attribute, _watched(clock, name, getattr(owner, attribute), work))
        put(Order, "of", _watched(clock, ROUTER, Order.of))
        put(Router, "forward", _watched_router(clock, Router.forward))
        yield


def _without_context(work: Work) -> Work:
    return lambda ctx, *arguments: work(*arguments)


def _watched(
    clock: Clock, name: str, function: Callable[..., Any], work: Work = lambda *_, **__: {}
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with clock.on(name):
            clock.did(name, **work(*arguments, **named))
            return function(*arguments, **named)

    return call


def _watched_router(clock: Clock, own: Callable[..., Any]) -> Callable[..., Any]:
    """Its backward is autograd's: it begins with the gradient of the weights and ends with that of the tokens."""

    def forward(router: Any, hidden: torch.Tensor, *rest: Any, **more: Any) -> Any:
        with clock.on(ROUTER):
            clock.did(ROUTER, **of_router(router, hidden))
            probs, chosen = own(router, _Edge.apply(hidden, clock.end), *rest, **more)
            return _Edge.apply(probs, lambda: clock.begin(ROUTER)), chosen

    return forward


class _Edge(torch.autograd.Function):
    """The tensor that it gets, whose gradient does something as it passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Callable[[], None]) -> torch.Tensor:
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.act()
        return grad, None


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    seconds: float
    floor: float  # seconds
    bound: str  # by what: FLOPs or bytes; empty without a floor


def measure(step: Callable[[], object], count: int) -> tuple[list[Row], Row, float, float]:
    """(a row of each operation, of the whole step, matmul FLOP/s, copy bytes/s) of `count` steps after a first one."""
    clock = Clock()
    step()
    taken: list[dict[str, Cost]] = []
    rates: list[tuple[float, float]] = []
    with watched_by(clock):
        for _ in range(count):
            rates.append((matmul_rate(torch.float32), copy_rate()))
            clock.take()
            with clock.on(REST):
                step()
            taken.append(clock.take())
    matmul, copy = (statistics.median(each) for each in zip(*rates, strict=True))
    rows = []
    for name in (*NAMES, REST):
        costs = [one[name] for one in taken]  # KeyError: our step does it no more, or by another name
        seconds = statistics.median(cost.seconds for cost in costs)
        floor = statistics.median(cost.floor(matmul, copy) for cost in costs)
        bound = "FLOPs" if costs[0].flops else "bytes" if costs[0].bytes else ""
        rows.append(Row(name, seconds, floor, bound))
    whole = statistics.median(sum(cost.seconds for cost in one.values()) for one in taken)
    return rows, Row("the step", whole, sum(row.floor for row in rows), ""), matmul, copy


def markdown(rows: list[Row], whole: Row) -> str:
    """As docs/performance.md has it."""
    lines = ["| | seconds | of the step | floor, seconds | of | seconds / floor |", "|---|---:|---:|---:|---|---:|"]
    for row in (*sorted(rows, key=lambda row: (row.name == REST, -row.seconds)), whole):
        times = f"{row.seconds / row.floor:.2f}" if row.floor else ""
        floor = f"{row.floor:.3f}" if row.floor else ""
        lines.append(
            f"| {row.name} | {row.seconds:.3f} | {row.seconds / whole.seconds:.1%} | {floor} | {row.bound} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--rows", type=int, default=4, help="of 1024 tokens")
    parser.add_argument("--json", type=Path, help="write the fraction there")
    options = parser.parse_args()
    tokens = bench.alone(options.rows)
    step, _ = bench.ours(bench.shape("fp32"), tokens)
    rows, whole, matmul, copy = measure(step, options.steps)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rows} x {bench.SEQ_LEN} tokens, "
          f"{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}: "
          f"a matmul {matmul / 1e9:.0f} GFLOP/s in fp32, a copy {copy / 1e9:.1f} GB/s")  # fmt: skip
    print(markdown(rows, whole))
    entry = bench.entry("step_fp32_floor_fraction", whole.floor, whole.seconds, whole.floor / whole.seconds, "seconds")
    if options.json:
        options.json.write_text(json.dumps([entry], indent=2))


if __name__ == "__main__":
    main()
