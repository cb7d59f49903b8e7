"""The loss by chunks of tokens, and by ranks that hold parts of the vocabulary, against PyTorch's on all logits."""

import gloo_ranks as ranks
import pytest
import torch
import torch.nn.functional as F

from perilune.kernels import cross_entropy
from perilune.kernels.cross_entropy import linear_cross_entropy, reference
from perilune.parallel.workers import Workers


@pytest.mark.usefixtures("bf16_multiplied")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("collected", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 11 * 50])
def test_chunks_equal_pytorch_in_values_and_gradients(
    dtype: torch.dtype, collected: torch.dtype | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 3 * 50)  # three tokens
    monkeypatch.setattr(cross_entropy, "KEPT", kept)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(50, (11,), generator=generator)
    upstream = torch.rand(11, generator=generator) * (labels > 5)  # some tokens count nothing
    theirs = reference(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(theirs, (hidden, weight), upstream)
    if collected:
        weight.main_grad = torch.ones_like(weight, dtype=collected)  # type: ignore[attr-defined]
    ours = linear_cross_entropy(hidden, weight, labels)
    ours.backward(upstream)
    close = {"atol": 0.05, "rtol": 0.02} if torch.bfloat16 in (dtype, collected) else {"atol": 1e-5, "rtol": 1e-5}
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(hidden.grad, dhidden, **close)
    if collected:
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(weight.main_grad.float(), 1 + dweight.float(), **close)  # type: ignore[attr-defined]
    else:
        torch.testing.assert_close(weight.grad, dweight, **close)


@pytest.mark.parametrize("kept", [0, 11 * 50])
def test_a_vocabulary_split_over_ranks_is_pytorch_s_whole_one(kept: int, workers: Workers) -> None:
    """Each of two ranks has half of the vocabulary's rows; the other's labels are none of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (11, 50))
    labels = torch.tensor([0, 24, 25, 49, 3, 30, 12, 41, 25, 7, 48])  # the halves' first and last among them
    upstream = torch.rand(11, generator=generator)
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    dhidden, dweight = torch.autograd.grad(theirs, (hidden, weight), upstream)
    chunk = 3 * 25  # three tokens of a rank's words
    got = workers.run(2, ranks.split_head, hidden.detach(), weight.detach(), labels, upstream, kept, chunk)
    for losses, dhidden_sum, _ in got:
        torch.testing.assert_close(losses, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dhidden_sum, dhidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for *_, part in got]), dweight, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_collects_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    weight.main_grad = torch.zeros(5, 4)  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 2])).sum().backward()
    assert hidden.grad is not None and not weight.main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_may_be_called_twice_where_nothing_is_kept(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 2]), keep=False).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


def test_a_chunk_on_a_gpu_is_large_enough_for_its_matmul() -> None:
    assert cross_entropy._rows(129280, torch.device("cuda")) >= 512


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = 200 * torch.eye(4), 200 * torch.eye(4)
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), torch.tensor([0.0, 0.0, 0.0, 40000.0]))


def test_no_tensor_of_all_logits_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the logits of all tokens are held in bf16; in fp32 those of a chunk alone."""
    monkeypatch.setattr(cross_entropy, "KEPT", 0)
    from torch.utils._python_dispatch import TorchDispatchMode

    T, V = 12, 64
    monkeypatch.setattr(cross_entropy, "CHUNK", 2 * V)

    class Largest(TorchDispatchMode):
        fp32 = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = op(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.fp32 = max(self.fp32, tensor.numel())
            return out

    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.randn(rows, 4).to(dtype).requires_grad_() for rows in (T, V))
        with Largest() as seen:
            linear_cross_entropy(hidden, weight, torch.zeros(T, dtype=torch.int64)).sum().backward()
        assert 0 < seen.fp32 <= max(2 * V, weight.numel())
