"""The loss of each token from its hidden state: output projection and cross-entropy in chunks of tokens.

Neither logits nor probabilities of many tokens are ever held in fp32: those of KEPT numbers at most, of more a
chunk's, which backward computes again. Where bf16 is multiplied as such, the logits of all tokens are held in bf16.
What is held, the gradients replace. The vocabulary may be split over tensor-parallel ranks (Megatron-LM, arXiv
1909.08053, section 3). On a GPU with Triton each logit is read once and, in backward, read and written once, in the
type that it has (`kernels/cross_entropy_triton.py`).

T tokens, H hidden, V vocabulary of this rank, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from perilune.kernels import matmul
from perilune.kernels.weight_gradient import WeightGradient

CHUNK = 1 << 21  # logits at once (8 MB in fp32)
KEPT = 1 << 26  # fp32 numbers that a call may hold from forward to backward (256 MB)
TOGETHER = 64  # tokens of a chunk whose logits stay in a CPU's cache from one operation on them to the next
CHUNK_GPU = 1 << 27  # the same on a GPU (512 MB): every chunk reads all of the weight, from memory that is no cache


def linear_cross_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    keep: bool = True,
) -> torch.Tensor:
    """-log softmax(hidden weight^T)[label] of every token, [T] in fp32.

    With `group`, rank r holds words [r V, (r+1) V) of the vocabulary; the gradient of `hidden_TH` is then this rank's
    part, to be summed over the group. Labels are of the whole vocabulary. Without `keep` nothing of [T, V] is held
    however small it is, and backward may be called twice. `kernels/weight_gradient.py` says where the
    weight's gradient goes.
    """
    backward = torch.is_grad_enabled()
    out: torch.Tensor = _LinearCrossEntropy.apply(matmul.wide(hidden_TH), weight_VH, labels_T, group, backward, keep)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        group: dist.ProcessGroup | None,
        backward: bool,
        keep: bool,
    ) -> torch.Tensor:
        T, V, wide_VH = hidden_TH.shape[0], weight_VH.shape[0], matmul.wide(weight_VH)
        first = V * group.rank() if group is not None else 0
        at_T = labels_T - first
        mine_T = (at_T >= 0) & (at_T < V)
        at_T = at_T.clamp(0, V - 1)
        narrow = hidden_TH.dtype in (torch.bfloat16, torch.float16)
        kept_TV = hidden_TH.new_empty(T, V) if backward and keep and (narrow or T * V <= KEPT) else None
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        most_T, sum_T, label_T = (hidden_TH.new_empty(T, dtype=wide) for _ in range(3))
        ctx.once = _by_triton(hidden_TH)
        read = _read_once if ctx.once else _read
        read(hidden_TH, wide_VH, kept_TV, at_T, most_T, sum_T, label_T)
        label_T *= mine_T
        log_sum_T = most_T + sum_T.log_()
        if group is not None and group.size() > 1:
            log_sum_T = _over_group(log_sum_T, label_T, group)
        ctx.save_for_backward(hidden_TH, weight_VH, at_T, mine_T, most_T, log_sum_T, kept_TV)
        ctx.weight = weight_VH
        return log_sum_T - label_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> Any:
        hidden_TH, weight_VH, at_T, mine_T, most_T, log_sum_T, kept_TV = ctx.saved_tensors
        wide_VH = matmul.wide(weight_VH)
        dhidden_TH = torch.empty_like(hidden_TH)
        dweight = WeightGradient(ctx.weight, ctx.needs_input_grad[1])
        part = dweight.buffer(weight_VH.shape)
        of_logits = _of_logits_once if ctx.once else _of_logits
        for rows, dlogits in of_logits(
            hidden_TH, wide_VH, kept_TV, at_T, most_T, log_sum_T, grad_T.contiguous(), -grad_T * mine_T
        ):
            torch.mm(dlogits, wide_VH, out=dhidden_TH[rows])
            dweight.add(dlogits.T, hidden_TH[rows], part)
        return dhidden_TH, dweight.done(), None, None, None, None


def _read(
    hidden_TH: torch.Tensor,
    wide_VH: torch.Tensor,
    kept_TV: torch.Tensor | None,
    at_T: torch.Tensor,
    most_T: torch.Tensor,
    sum_T: torch.Tensor,
    label_T: torch.Tensor,
) -> None:
    """Into the last three: each row's largest logit, the sum of exp(logit - largest), and the logit at `at_T`.

    In fp32 it leaves exp(logit - largest) in what is kept, else the logits.
    """
    T, V = len(hidden_TH), len(wide_VH)
    buffer = _buffer(hidden_TH, V)
    whole = kept_TV is not None and kept_TV.dtype == buffer.dtype
    together = TOGETHER if hidden_TH.device.type == "cpu" else T
    for rows in [slice(0, T)] if whole else _chunks(hidden_TH, V):
        logits = _logits(hidden_TH[rows], wide_VH, buffer, kept_TV[rows] if kept_TV is not None else None)
        label_T[rows] = logits.gather(1, at_T[rows, None])[:, 0]
        for part, most, total in zip(*(x.split(together) for x in (logits, most_T[rows], sum_T[rows])), strict=True):
            torch.amax(part, -1, out=most)
            torch.sum(part.sub_(most[:, None]).exp_(), -1, out=total)


def _of_logits(
    hidden_TH: torch.Tensor,
    wide_VH: torch.Tensor,
    kept_TV: torch.Tensor | None,
    at_T: torch.Tensor,
    most_T: torch.Tensor,
    log_sum_T: torch.Tensor,
    grad_T: torch.Tensor,
    of_label_T: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and the gradient of their logits: all in what was kept, or a chunk's, valid until the next."""
    buffer = _buffer(hidden_TH, len(wide_VH))
    exps = kept_TV is not None and kept_TV.dtype == buffer.dtype
    scale_T = (most_T - log_sum_T).exp_().mul_(grad_T)
    for rows in _chunks(hidden_TH, len(wide_VH)):
        if kept_TV is not None and exps:
            p = kept_TV[rows].mul_(scale_T[rows, None])
        else:
            if kept_TV is not None:
                p = buffer[: rows.stop - rows.start].copy_(kept_TV[rows])
            else:
                p = _logits(hidden_TH[rows], wide_VH, buffer, None)
            p.sub_(log_sum_T[rows, None]).exp_().mul_(grad_T[rows, None])
        p.scatter_add_(1, at_T[rows, None], of_label_T[rows, None].to(p.dtype))
        if kept_TV is None:
            yield rows, p.to(hidden_TH.dtype)
        elif not exps:
            kept_TV[rows] = p
    if kept_TV is not None:
        yield slice(None), kept_TV


@functools.cache
def _triton() -> Any:
    """The kernels in Triton, where that is installed and there is a GPU, else None."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from perilune.kernels import cross_entropy_triton

    return cross_entropy_triton


def _by_triton(hidden_TH: torch.Tensor) -> bool:
    return hidden_TH.is_cuda and hidden_TH.dtype != torch.float64 and _triton() is not None


def _read_once(
    hidden_TH: torch.Tensor,
    wide_VH: torch.Tensor,
    kept_TV: torch.Tensor | None,
    at_T: torch.Tensor,
    *found: torch.Tensor,
) -> None:
    """As `_read`; what is kept are logits."""
    V = len(wide_VH)
    for rows in [slice(0, len(hidden_TH))] if kept_TV is not None else _chunks(hidden_TH, V):
        logits = torch.mm(hidden_TH[rows], wide_VH.T, out=kept_TV)
        _triton().statistics(logits, at_T[rows], *(x[rows] for x in found))


def _of_logits_once(
    hidden_TH: torch.Tensor,
    wide_VH: torch.Tensor,
    kept_TV: torch.Tensor | None,
    at_T: torch.Tensor,
    most_T: torch.Tensor,
    *rest: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """As `_of_logits`."""
    del most_T  # log_sum_T says it
    for rows in [slice(0, len(hidden_TH))] if kept_TV is not None else _chunks(hidden_TH, len(wide_VH)):
        logits = torch.mm(hidden_TH[rows], wide_VH.T) if kept_TV is None else kept_TV
        yield rows, _triton().gradient_(logits, at_T[rows], *(x[rows] for x in rest))


def _over_group(log_sum_T: torch.Tensor, label_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The log-sum over all words from each rank's; the label's logit, which one rank knows, to all (in place)."""
    most_T = log_sum_T.clone()
    dist.all_reduce(most_T, dist.ReduceOp.MAX, group=group)
    both = torch.stack(((log_sum_T - most_T).exp_(), label_T))
    dist.all_reduce(both, group=group)
    label_T.copy_(both[1])
    return most_T + both[0].log_()


def _logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, buffer: torch.Tensor, kept_CV: torch.Tensor | None
) -> torch.Tensor:
    """[C, V] in fp32, in the buffer; as the matmul gave them in `kept_CV` if that is there, alone if that is fp32."""
    wide = buffer[: hidden_CH.shape[0]]
    if buffer.dtype == hidden_CH.dtype:
        return torch.mm(hidden_CH, weight_VH.T, out=wide if kept_CV is None else kept_CV)
    low = torch.mm(hidden_CH, weight_VH.T) if kept_CV is None else torch.mm(hidden_CH, weight_VH.T, out=kept_CV)
    return wide.copy_(low)


def _buffer(hidden_TH: torch.Tensor, V: int) -> torch.Tensor:
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    return torch.empty(min(hidden_TH.shape[0], _rows(V, hidden_TH.device)), V, dtype=wide, device=hidden_TH.device)


def _rows(V: int, device: torch.device) -> int:
    return max(1, (CHUNK if device.type == "cpu" else CHUNK_GPU) // V)


def _chunks(hidden_TH: torch.Tensor, V: int) -> Iterator[slice]:
    T, rows = hidden_TH.shape[0], _rows(V, hidden_TH.device)
    for at in range(0, T, rows):
        yield slice(at, min(at + rows, T))


def reference(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's cross-entropy on all logits in fp32; for tests."""
    return F.cross_entropy((hidden_TH @ weight_VH.T).float(), labels_T, reduction="none")
