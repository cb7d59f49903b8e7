"""Operations in parts on threads of their own: every part once, errors told, the numbers of one thread."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perilune.kernels import attention_blocks, threads
from perilune.kernels.attention_blocks import blocked_attention
from perilune.kernels.experts_loop import routed_swiglu
from perilune.kernels.permute import Order


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_item_is_drawn_once_by_threads_that_multiply_alone() -> None:
    drawn: list[tuple[int, str, int, bool]] = []
    both = threading.Barrier(2, timeout=30)

    def work(items: Iterator[int]) -> None:
        both.wait()
        for item in items:
            drawn.append((item, threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
            time.sleep(0.001)

    threads.share(work, range(50), 2)
    assert sorted(item for item, *_ in drawn) == list(range(50))
    assert len({name for _, name, *_ in drawn}) == 2
    assert {(count, grad) for *_, count, grad in drawn} == {(1, False)}
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


@pytest.mark.parametrize("who", ["caller", "other"])
def test_an_error_comes_out_when_all_have_ended(who: str) -> None:
    ended = []
    here = threading.get_ident()

    def work(items: Iterator[int]) -> None:
        if (threading.get_ident() == here) == (who == "caller"):
            raise ValueError("a part failed")
        time.sleep(0.05)
        ended.extend(items)

    with pytest.raises(ValueError, match="a part failed"):
        threads.share(work, [1, 2, 3], 2)
    assert ended == [1, 2, 3]
    assert torch.get_num_threads() == 2


def test_inference_mode_is_that_of_the_caller() -> None:
    q, k, v = (torch.randn(300, 2, 8) for _ in range(3))
    expected = blocked_attention(q, k, v, [(0, 300)], [(0, 300)], 0.2)
    with torch.inference_mode():
        assert torch.equal(blocked_attention(q, k, v, [(0, 300)], [(0, 300)], 0.2), expected)


def test_an_interruption_while_others_work_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(others: list[object]) -> None:
        wait(others)  # type: ignore[type-var]
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.share(list, [1, 2, 3], 2)
    assert torch.get_num_threads() == 2


def test_where_no_thread_can_be_started_the_caller_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(threads, "_pool", lambda: pool)
    done: list[int] = []
    threads.share(done.extend, [1, 2, 3], 2)
    assert done == [1, 2, 3] and torch.get_num_threads() == 2


def test_one_large_item_is_left_to_shared_matmuls() -> None:
    assert threads.worth([10, 10, 10, 10]) == 2
    assert threads.worth([40, 10]) == 1
    assert threads.worth([40]) == threads.worth([]) == 1
    with FlopCounterMode(display=False):  # it sees its own thread alone
        assert threads.worth([10, 10, 10, 10]) == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # so does that
        assert threads.worth([10, 10, 10, 10]) == 1


def test_a_forked_process_has_threads_of_its_own() -> None:
    threads.share(lambda items: [*items] and None, range(4), 2)
    if not (child := os.fork()):
        found: list[int] = []
        threads.share(found.extend, range(4), 2)
        os._exit(0 if sorted(found) == [0, 1, 2, 3] else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done[1] == 0


def _with_gradients(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = f(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, attention_blocks.KEPT])
def test_attention_is_that_of_one_thread(dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "KEPT", kept)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, 3, D, generator=generator).to(dtype).requires_grad_() for D in (24, 24, 16))
    ranges = [(0, 200), (200, 300)]

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return blocked_attention(*inputs, ranges, ranges, 0.2)

    two = _with_gradients(attend, q, k, v)
    torch.set_num_threads(1)
    for a, b in zip(two, _with_gradients(attend, q, k, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_those_of_one_thread(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    T, H, F, E, K = 200, 32, 16, 8, 2
    x, w1, w2 = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((T, H), (E, 2 * F, H), (E, H, F))
    )
    weights = torch.rand(T, E, generator=generator)
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(1, weights.topk(K).indices, True)
    order = Order.of(chosen, K)
    probs = weights[order.tokens_R, order.experts_R].requires_grad_()

    def experts(*inputs: torch.Tensor) -> torch.Tensor:
        return routed_swiglu(*inputs, order)

    assert threads.worth(order.counts_E.tolist()) == 2
    two = _with_gradients(experts, x, w1, w2, probs)
    torch.set_num_threads(1)
    for a, b in zip(two, _with_gradients(experts, x, w1, w2, probs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-5)


def test_threads_that_wait_spinning_are_ended_and_started_anew() -> None:
    if threads._pause() is None:
        pytest.skip("torch runs on another OpenMP here")

    def running() -> int:
        return len(os.listdir("/proc/self/task"))

    x = torch.randn(512, 512)
    expected = x @ x
    before = running()
    threads._end_spinning()
    deadline = time.monotonic() + 10
    while running() >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() < before
    assert torch.equal(x @ x, expected) and torch.get_num_threads() == 2
    assert running() == before
