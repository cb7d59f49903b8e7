"""What changes during training, as functions of the tokens consumed: learning rate, bias speed, MTP weight, batch.

A run's state therefore needs no scheduler object: the tokens consumed say everything. Two clocks are in use. The
batch size, the router-bias speed and the MTP weight of a step follow from the tokens consumed *before* it. The learning
rate is best asked for the tokens consumed *after* it, so that the first step of a warm-up is not at zero and the last
step is at the schedule's end.

`multiple` is what a global batch must divide by: data-parallel ranks x `train.micro_batch_size`. It only matters while
the batch grows, where the layout then rounds the batch, and by it the count of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Optim, Schedule, Train


def learning_rate(optim: Optim, schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """The learning rate at `tokens` of `total_tokens`; past the end it stays at its last value.

    - warm-up: linear from 0 to the peak over `warmup_tokens`, the same for all shapes; one longer than the run is
      simply not finished
    - cosine: from the peak at the warm-up's end to `min_lr_ratio` of it at the run's end (arXiv 1608.03983, eq. 5)
    - multistep: the peak, then `factors[i]` of it from `milestones[i]` of the run on (DeepSeek LLM, arXiv 2401.02954,
      section 2.3); with `moves` the way there from the milestone before: "step" jumps at the milestone, "linear",
      "cosine" and "sqrt" (fast, then slow: arXiv 2405.18392, section 3) arrive at it, as V3's plateau, cosine and tail
    - wsd: the peak, then linear to `min_lr_ratio` of it over the last `decay_ratio` of the run (warm-up, stable, decay:
      arXiv 2404.06395, section 4; the linear decay: arXiv 2405.18392, section 3)
    - constant: the peak

    Raises InputError if a multistep schedule's milestones, factors and moves do not pair, milestones rising.
    """
    if tokens < schedule.warmup_tokens:
        return optim.lr * tokens / schedule.warmup_tokens
    if schedule.lr == "cosine":
        progress = _progress(tokens, schedule.warmup_tokens, total_tokens)
        share = schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.lr == "wsd":
        progress = _progress(
            tokens, max(schedule.warmup_tokens, (1 - schedule.decay_ratio) * total_tokens), total_tokens
        )
        share = 1 + (schedule.min_lr_ratio - 1) * progress
    elif schedule.lr == "multistep":
        share = _multistep(schedule, tokens, total_tokens)
    else:
        share = 1.0
    return optim.lr * share


def _progress(tokens: int, start: float, end: float) -> float:
    """Where `tokens` lies between `start` (0) and `end` (1), held to that range."""
    if tokens >= end:
        return 1.0
    return max(0.0, (tokens - start) / (end - start))


# Of the way from one rate to the next, the part that is behind at the part `p` of the tokens between.
_MOVES: dict[str, Callable[[float], float]] = {
    "step": lambda p: 0.0,
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)),
    "sqrt": math.sqrt,
}


def milestones_problem(schedule: Schedule) -> str | None:
    """Why milestones, factors and moves do not pair, milestones rising; None where they do."""
    moves, number = schedule.moves, len(schedule.milestones)
    if unknown := [move for move in moves if move not in _MOVES]:
        return f"schedule.moves={list(moves)}: {unknown[0]!r} is none of {', '.join(_MOVES)}"
    if len(schedule.factors) != number or list(schedule.milestones) != sorted(schedule.milestones):
        return (
            f"schedule.milestones={list(schedule.milestones)} and schedule.factors={list(schedule.factors)}: a "
            "multistep schedule needs one factor for each milestone, milestones rising; set both, as "
            "milestones=[0.8,0.9] factors=[0.316,0.1]"
        )
    if moves and len(moves) != number:
        return (
            f"schedule.moves={list(moves)} and schedule.milestones={list(schedule.milestones)}: a move for each "
            "milestone, or none at all, which is a step at each; as milestones=[0.8,1] factors=[1,0.1] "
            "moves=[step,cosine]"
        )
    return None


def _multistep(schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """The factor of the last milestone passed, and as far as the move to the next one has come."""
    if wrong := milestones_problem(schedule):
        raise InputError(wrong)
    at, share = float(schedule.warmup_tokens), 1.0
    moves = schedule.moves or ("step",) * len(schedule.milestones)
    for milestone, factor, move in zip(schedule.milestones, schedule.factors, moves, strict=True):
        then = milestone * total_tokens
        if tokens < then:
            return share + (factor - share) * _MOVES[move](_progress(tokens, at, then))
        at, share = max(at, then), factor
    return share


def bias_update_speed(schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """gamma, the step of the router bias: 0 from `bias_freeze_ratio` of the run on (V3 sections 2.1.2, 4.2)."""
    return schedule.bias_update_speed if tokens < schedule.bias_freeze_ratio * total_tokens else 0.0


def mtp_weight(schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """lambda, the weight of the MTP loss: the late one from `mtp_switch_ratio` of the run on (V3 sections 2.2, 4.2)."""
    return schedule.mtp_weight if tokens < schedule.mtp_switch_ratio * total_tokens else schedule.mtp_weight_late


def global_batch_rows(train: Train, seq_len: int, tokens: int, multiple: int = 1) -> int:
    """Rows of the optimizer step that starts after `tokens` tokens.

    Grows linearly in tokens from `batch_ramp_start` to `global_batch_size` over `batch_ramp_tokens`, rounded down to
    `multiple` and never below it (V3 section 4.2: 3072 to 15360 over the first 469B tokens).

    Raises InputError if `global_batch_size` is not a positive multiple of `multiple`, or the ramp does not rise.
    """
    if seq_len < 1:
        raise InputError(f"data.seq_len={seq_len} must be at least 1 token")
    if train.global_batch_size < 1 or train.global_batch_size % multiple:
        raise InputError(
            f"train.global_batch_size={train.global_batch_size} rows must be a positive multiple of data-parallel "
            f"ranks x train.micro_batch_size = {multiple}"
        )
    if not 0 <= train.batch_ramp_start <= train.global_batch_size:
        raise InputError(
            f"train.batch_ramp_start={train.batch_ramp_start} must lie between 0 and "
            f"train.global_batch_size={train.global_batch_size}"
        )
    if tokens >= train.batch_ramp_tokens:
        return train.global_batch_size
    growth = train.global_batch_size - train.batch_ramp_start
    rows = train.batch_ramp_start + growth * tokens // train.batch_ramp_tokens
    return max(multiple, rows // multiple * multiple)


def tokens_after(train: Train, seq_len: int, steps: int, multiple: int = 1) -> int:
    """Tokens consumed by the first `steps` steps. Walks the ramp step by step, the rest in closed form."""
    tokens = 0
    while steps > 0 and tokens < train.batch_ramp_tokens:
        tokens += global_batch_rows(train, seq_len, tokens, multiple) * seq_len
        steps -= 1
    return tokens + steps * global_batch_rows(train, seq_len, train.batch_ramp_tokens, multiple) * seq_len


def steps_until(train: Train, seq_len: int, tokens: int, multiple: int = 1) -> int:
    """The fewest steps that consume at least `tokens` tokens."""
    steps = consumed = 0
    while consumed < min(tokens, train.batch_ramp_tokens):
        consumed += global_batch_rows(train, seq_len, consumed, multiple) * seq_len
        steps += 1
    full = global_batch_rows(train, seq_len, train.batch_ramp_tokens, multiple) * seq_len
    return steps + -(-max(0, tokens - consumed) // full)


def total_tokens(train: Train, seq_len: int, multiple: int = 1) -> int:
    """Tokens of the whole run: `train.tokens`, or what `train.steps` steps consume. The schedules' end.

    Raises InputError unless exactly one of `train.steps` and `train.tokens` is set.
    """
    _check_length(train)
    return train.tokens if train.tokens else tokens_after(train, seq_len, train.steps, multiple)


def total_steps(train: Train, seq_len: int, multiple: int = 1) -> int:
    """Steps of the whole run: `train.steps`, or the fewest that consume `train.tokens`. Raises as `total_tokens`.

    The last step may pass `train.tokens` by less than one batch.
    """
    _check_length(train)
    return train.steps if train.steps else steps_until(train, seq_len, train.tokens, multiple)


def _check_length(train: Train) -> None:
    if min(train.steps, train.tokens) < 0 or (train.steps > 0) == (train.tokens > 0):
        raise InputError(
            f"train.steps={train.steps} and train.tokens={train.tokens}: exactly one must be positive and the other 0; "
            "set the one that is to rule"
        )
