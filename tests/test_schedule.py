"""Schedules against values by hand, torch's schedulers, and what must hold for any numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perilune.pretrain import presets, schedule
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Optim, Schedule, Train

PEAK = Optim(lr=2.0)
SHAPES = ("cosine", "multistep", "wsd", "constant")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # tokens 0, 50, 100 of the warm-up of 100; 550 is half way from its end to 1000; then the end, and past it
        ("cosine", [0.0, 1.0, 2.0, 1.1, 0.2, 0.2]),
        ("wsd", [0.0, 1.0, 2.0, 2.0, 0.2, 0.2]),
        ("multistep", [0.0, 1.0, 2.0, 2.0, 0.2, 0.2]),
        ("constant", [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_learning_rate_by_hand(shape: str, expected: list[float]) -> None:
    plan = Schedule(lr=shape, warmup_tokens=100)
    got = [schedule.learning_rate(PEAK, plan, t, 1000) for t in (0, 50, 100, 550, 1000, 5000)]
    assert got == pytest.approx(expected)


def test_multistep_is_deepseek_llms() -> None:
    """31.6% of the peak after 80% of the tokens, 10% after 90% (arXiv 2401.02954, section 2.3)."""
    plan = Schedule(lr="multistep")
    got = [schedule.learning_rate(PEAK, plan, t, 1000) for t in (799, 800, 899, 900)]
    assert got == pytest.approx([2.0, 0.632, 0.632, 0.2])
    with pytest.raises(InputError, match="one factor for each milestone"):
        schedule.learning_rate(PEAK, Schedule(lr="multistep", milestones=(0.5,)), 10, 1000)


def test_v3s_rates_are_those_published() -> None:
    """Plateau until 10T tokens, cosine to 2.2e-5 over 4.3T, that for 333B, 7.3e-6 for 167B (arXiv 2412.19437, 4.2)."""
    config, t = presets.get("deepseek_v3"), 10**12
    at = [t, 10 * t, 10 * t + 43 * t // 40, 10 * t + 43 * t // 20, 143 * t // 10, 14632 * t // 1000, 14634 * t // 1000]
    got = [schedule.learning_rate(config.optim, config.schedule, tokens, config.train.tokens) for tokens in at]
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2
    assert got == pytest.approx([2.2e-4, 2.2e-4, quarter, 1.21e-4, 2.2e-5, 2.2e-5, 7.3e-6])
    assert schedule.learning_rate(config.optim, config.schedule, config.train.tokens, config.train.tokens) == got[-1]


@pytest.mark.parametrize(
    ("other", "moves"),
    [
        (Schedule(lr="cosine", warmup_tokens=100), {"milestones": (1.0,), "factors": (0.1,), "moves": ("cosine",)}),
        (
            Schedule(lr="wsd", warmup_tokens=100, decay_ratio=0.3),
            {"milestones": (0.7, 1.0), "factors": (1.0, 0.1), "moves": ("step", "linear")},
        ),
        (Schedule(lr="multistep", warmup_tokens=100), {"moves": ("step", "step")}),
        (Schedule(lr="wsd", warmup_tokens=100, decay_ratio=1), {"milestones": (0.05, 1), "moves": ("sqrt", "linear")}),
    ],
)
def test_moves_say_the_other_shapes(other: Schedule, moves: dict[str, Any]) -> None:
    """The last: a milestone inside the warm-up is passed when that ends, and its factor is where the next begins."""
    plan = Schedule(lr="multistep", warmup_tokens=100, **{"factors": (1.0, 0.1), **moves})
    if moves["moves"] == ("step", "step"):
        plan = replace(plan, factors=other.factors)
    for tokens in (*range(0, 1001, 7), 5000):
        one, two = (schedule.learning_rate(PEAK, s, tokens, 1000) for s in (plan, other))
        assert one == pytest.approx(two), tokens


def test_sqrt_falls_fast_then_slowly() -> None:
    plan = Schedule(lr="multistep", milestones=(0.5, 1), factors=(1, 0), moves=("step", "sqrt"))
    got = [schedule.learning_rate(PEAK, plan, t, 800) for t in (400, 500, 625, 800)]
    assert got == pytest.approx([2.0, 1.0, 0.5, 0.0])


def test_wsd_decays_over_its_last_part() -> None:
    plan = Schedule(lr="wsd", decay_ratio=0.2, min_lr_ratio=0.0)
    got = [schedule.learning_rate(PEAK, plan, t, 1000) for t in (800, 850, 900, 1000)]
    assert got == pytest.approx([2.0, 1.5, 1.0, 0.0])


def test_a_warm_up_longer_than_the_run_is_not_finished() -> None:
    for shape in SHAPES:
        assert schedule.learning_rate(PEAK, Schedule(lr=shape, warmup_tokens=400), 100, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_after_linear_equals_torch(warmup: int) -> None:
    """Schedulers of torch, a step a token."""
    total, ratio = 40, 0.1
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=PEAK.lr)
    lr = torch.optim.lr_scheduler
    cosine = lr.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=ratio * PEAK.lr)
    scheduler: torch.optim.lr_scheduler.LRScheduler = cosine
    if warmup:
        tiny = 1e-12  # torch refuses to start at 0
        linear = lr.LinearLR(optimizer, start_factor=tiny, total_iters=warmup)
        scheduler = lr.SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    plan = Schedule(lr="cosine", warmup_tokens=warmup, min_lr_ratio=ratio)
    for token in range(total + 1):
        assert schedule.learning_rate(PEAK, plan, token, total) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-9
        )
        optimizer.step()
        scheduler.step()


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(0, 10_000),
    total=st.integers(1, 10_000),
    ratio=st.floats(0, 1),
    decay=st.floats(0.01, 1),
    tokens=st.lists(st.integers(0, 20_000), min_size=2, max_size=6),
)
def test_learning_rate_rises_to_the_peak_then_never_rises(
    shape: str, warmup: int, total: int, ratio: float, decay: float, tokens: list[int]
) -> None:
    plan = Schedule(lr=shape, warmup_tokens=warmup, min_lr_ratio=ratio, decay_ratio=decay)
    tokens.sort()
    rates = [schedule.learning_rate(PEAK, plan, t, total) for t in tokens]
    assert all(0 <= r <= PEAK.lr * (1 + 1e-12) for r in rates)
    warm = [r for t, r in zip(tokens, rates, strict=True) if t < warmup]
    cold = [r for t, r in zip(tokens, rates, strict=True) if t >= warmup]
    assert warm == sorted(warm)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(cold))


def test_bias_speed_and_mtp_weight_switch_where_v3_did() -> None:
    plan, t = presets.get("deepseek_v3").schedule, 10**12
    total = 14_800_000_000_000
    assert [schedule.bias_update_speed(plan, n, total) for n in (0, 14_299_999_999_999, 143 * t // 10)] == [
        1e-3,
        1e-3,
        0,
    ]
    assert [schedule.mtp_weight(plan, n, total) for n in (0, 10 * t - 1, 10 * t, total)] == [0.3, 0.3, 0.1, 0.1]


def test_v3_warm_up_is_2000_steps() -> None:
    config = presets.get("deepseek_v3")
    train, length = config.train, config.data.seq_len
    assert schedule.steps_until(train, length, config.schedule.warmup_tokens) == 2000
    # dn/ds = seq (start + growth n / ramp) in closed form, steps taken as continuous
    rate = length * (15360 - 3072) / 469e9
    closed = length * 3072 / rate * (math.exp(2000 * rate) - 1)
    assert config.schedule.warmup_tokens == pytest.approx(closed, rel=1e-3)
    assert schedule.learning_rate(config.optim, config.schedule, config.schedule.warmup_tokens, 10**13) == 2.2e-4


def test_ramp_by_hand() -> None:
    train = Train(steps=1, global_batch_size=40, batch_ramp_start=8, batch_ramp_tokens=1600)
    got = [schedule.global_batch_rows(train, 10, t, 8) for t in (0, 399, 400, 799, 800, 1599, 1600, 10**9)]
    assert got == [8, 8, 16, 16, 24, 32, 40, 40]
    assert schedule.global_batch_rows(Train(global_batch_size=8, batch_ramp_tokens=100), 10, 0, 4) == 4
    # from 0: 8 rows to 80, 160, 240, 320, 400; 16 to 560, 720, 880; 24 to 1120, 1360; 32 to 1680; then 40 a step
    assert [schedule.tokens_after(train, 10, s, 8) for s in (1, 5, 8, 10, 11, 12)] == [80, 400, 880, 1360, 1680, 2080]


ramps = st.builds(
    lambda dp, per, start, ramp, seq: (
        Train(global_batch_size=dp * per, batch_ramp_start=min(start, dp * per), batch_ramp_tokens=ramp),
        seq,
        dp,
    ),
    dp=st.integers(1, 8),
    per=st.integers(1, 16),
    start=st.integers(0, 128),
    ramp=st.integers(0, 50_000),
    seq=st.integers(1, 64),
)


@given(ramps, st.lists(st.integers(0, 60_000), min_size=2, max_size=5))
def test_batches_divide_and_never_shrink(plan: tuple[Train, int, int], tokens: list[int]) -> None:
    train, seq, dp = plan
    rows = [schedule.global_batch_rows(train, seq, t, dp) for t in sorted(tokens)]
    assert rows == sorted(rows) and all(r % dp == 0 and dp <= r <= train.global_batch_size for r in rows)
    assert schedule.global_batch_rows(train, seq, train.batch_ramp_tokens, dp) == train.global_batch_size


@given(ramps, st.integers(1, 300))
def test_steps_and_tokens_are_each_others_inverse(plan: tuple[Train, int, int], steps: int) -> None:
    train, seq, dp = plan
    tokens = 0
    for _ in range(steps):  # the run itself
        tokens += schedule.global_batch_rows(train, seq, tokens, dp) * seq
    assert schedule.tokens_after(train, seq, steps, dp) == tokens
    assert schedule.steps_until(train, seq, tokens, dp) == steps
    assert schedule.steps_until(train, seq, tokens + 1, dp) == steps + 1


def test_length_of_a_run() -> None:
    by_steps = Train(steps=10, global_batch_size=4)
    assert (schedule.total_steps(by_steps, 8), schedule.total_tokens(by_steps, 8)) == (10, 320)
    by_tokens = Train(tokens=321, global_batch_size=4)
    assert (schedule.total_steps(by_tokens, 8), schedule.total_tokens(by_tokens, 8)) == (11, 321)


@pytest.mark.parametrize("train", [Train(), Train(steps=1, tokens=1), Train(steps=-1), Train(steps=2, tokens=-5)])
def test_exactly_one_of_steps_and_tokens(train: Train) -> None:
    for ask in (schedule.total_steps, schedule.total_tokens):
        with pytest.raises(InputError, match=f"train.steps={train.steps} and train.tokens={train.tokens}: exactly one"):
            ask(train, 8)


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"global_batch_size=10 rows must be a positive multiple .* = 4"):
        schedule.global_batch_rows(Train(global_batch_size=10), 8, 0, 4)
    with pytest.raises(InputError, match=r"batch_ramp_start=9 must lie between 0 and train.global_batch_size=8"):
        schedule.global_batch_rows(Train(global_batch_size=8, batch_ramp_start=9), 8, 0)
    with pytest.raises(InputError, match="seq_len=0"):
        schedule.global_batch_rows(Train(), 0, 0)


@pytest.mark.parametrize("name", presets.names())
def test_presets_have_a_length_and_reach_their_peak(name: str) -> None:
    config = presets.get(name)
    assert config.preset == name
    total = schedule.total_tokens(config.train, config.data.seq_len)
    assert config.schedule.warmup_tokens < total / 10 + 1
    assert (
        schedule.learning_rate(config.optim, config.schedule, config.schedule.warmup_tokens, total) == config.optim.lr
    )
    assert config.data.seq_len <= config.model.max_position_embeddings


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean proxy_100m"):
        presets.get("proxy100m")
