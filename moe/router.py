"""DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2) on Megatron-core's: sigmoid scores, bias, groups, balance.

T tokens on this rank, E experts, R rows (sequences) of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter


@dataclass
class StepScale:
    """What every router must know of the global batch; the training step sets it before the forward pass."""

    alpha: float  # weight of the sequence-wise loss, V3 eq. 17
    tokens_per_row: int  # of this context-parallel rank
    rows: float = 1.0  # of the global batch


class Router(TopKRouter):
    """Megatron-core's top-k router with V3's sequence-wise loss by row, and counts of the experts' load.

    Megatron-core takes a sequence from the tensor's shape and scales by this rank's tokens. Here a sequence is a row
    of the pack, wherever its tokens lie (a rank may hold a part of a row or several), and the loss is the mean over
    the global batch's rows, whatever their loss masks.
    """

    def __init__(self, *, scale: StepScale, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        self.register_buffer("load_E", torch.zeros(self.num_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("balance_sum", torch.zeros((), dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As ever, but that counts and bias keep their type: in bf16 a count of tokens stops growing."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[Any, Any]:
        """Weights and choices, both [T, E] and zero where an expert is not chosen, from logits [S, B, E]."""
        if padding_mask is not None:
            raise ValueError("packed rows hold no padding; a padding mask is not expected here")
        logits = logits.reshape(-1, self.num_experts)
        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
        )
        if torch.is_grad_enabled():  # not in the first pass of a recomputed layer, nor in validation
            with torch.no_grad():
                self.load_E += routing_map.sum(0)
            if self.training and self.scale.alpha > 0:
                balance = self._sequence_balance(torch.sigmoid(logits.float()))
                self.balance_sum += balance.detach()
                probs = MoEAuxLossAutoScaler.apply(probs, balance * (self.scale.alpha / self.scale.rows))
        self._apply_expert_bias(routing_map)
        return probs, routing_map

    def _sequence_balance(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over rows of sum_i f_i P_i (V3 eq. 17 to 20; 1 for a row in perfect balance).

        The top-k of f counts raw scores, without bias and groups, as the paper's eq. 18 has it.
        """
        T, E = scores_TE.shape
        normalised_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        top_TK = scores_TE.topk(self.topk, dim=-1).indices
        offset = self.tp_group.rank() * T if self.config.sequence_parallel else 0
        row_T = (torch.arange(T, device=scores_TE.device) + offset) // self.scale.tokens_per_row
        rows = T * (self.tp_group.size() if self.config.sequence_parallel else 1) // self.scale.tokens_per_row
        count_RE = torch.zeros(rows * E, device=scores_TE.device)
        slots = (row_T[:, None] * E + top_TK).flatten()
        count_RE = count_RE.index_add_(0, slots, torch.ones_like(slots, dtype=count_RE.dtype)).view(rows, E)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(count_RE, group=self.tp_cp_group)
        score_RE = normalised_TE.new_zeros(rows, E).index_add(0, row_T, normalised_TE)
        length = self.scale.tokens_per_row * self.cp_group.size()
        return (count_RE * score_RE).sum() * E / (self.topk * length * length)
