"""All routed experts of a rank in two weights, as a submodule of Megatron-core's MoE layer, and that layer.

T tokens on this rank, R routed copies of them, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer

from perilune.kernels.experts import grouped_swiglu
from perilune.kernels.experts_loop import routed_swiglu
from perilune.kernels.permute import Order


class ExpertLayer(MoELayer):
    """Megatron-core's MoE layer, which on a CPU does not dispatch where this rank holds all experts whole.

    There it goes from tokens to tokens in one operation (`kernels/experts_loop.py`): nothing is permuted in memory,
    and the copies of the tokens are not kept for backward.
    """

    _chosen_TE: torch.Tensor

    def _alone(self, hidden: torch.Tensor) -> bool:
        groups = (self.experts.ep_group, self.experts.tp_group) if isinstance(self.experts, GroupedExperts) else ()
        return hidden.device.type == "cpu" and bool(groups) and all(group.size() == 1 for group in groups)

    def preprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> Any:
        if not self._alone(hidden_states):
            return super().preprocess(hidden_states, probs, routing_map)
        self._chosen_TE = routing_map
        return hidden_states, probs

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        return (hidden_states, probs) if self._alone(hidden_states) else super().dispatch(hidden_states, probs)

    def routed_experts_compute(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        if not self._alone(hidden_states):
            return super().routed_experts_compute(hidden_states, probs)
        order = Order.of(self._chosen_TE, self.config.moe_router_topk)
        probs_R = probs[order.tokens_R, order.experts_R]
        x_TH = hidden_states.flatten(0, -2)
        out_TH = routed_swiglu(x_TH, self.experts.w1, self.experts.w2, probs_R, order)
        return out_TH.view_as(hidden_states), None

    def combine(self, output: torch.Tensor) -> Any:
        return output if self._alone(output) else super().combine(output)

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> Any:
        if not self._alone(output):
            return super().postprocess(output, shared_expert_output)
        return output if shared_expert_output is None else output + shared_expert_output


class GroupedExperts(MegatronModule):
    """E local experts as two weights, `w1` [E, 2F, H] (gate rows, then up rows) and `w2` [E, H, F].

    Takes the place of SequentialMLP, which loops over experts. In a checkpoint each weight is one global tensor with
    the experts as its first dim, under the names that Megatron-core's own grouped experts use.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, name: str | None = None) -> None:
        super().__init__(config=config)
        del name
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        E, F, H = num_local_experts, config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size
        self._recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        self.w1 = torch.nn.Parameter(torch.empty(E, 2 * F, H, dtype=config.params_dtype))
        self.w2 = torch.nn.Parameter(torch.empty(E, H, F, dtype=config.params_dtype))
        for weight, dim in ((self.w1, 1), (self.w2, 2)):
            # Reduced over expert data parallel ranks, which are not the others' even at ep=1 when tp and etp differ.
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.tensor_model_parallel = self.tp_group.size() > 1  # type: ignore[attr-defined]
            weight.partition_dim = dim  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(
        self, hidden_RH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_R: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """`hidden_RH` holds the routed tokens sorted by local expert. Returns the same shape, and no bias."""
        counts = torch.as_tensor(tokens_per_expert)
        recompute, compiled = self._recompute and self.training, self.config.bias_activation_fusion
        return grouped_swiglu(hidden_RH, self.w1, self.w2, counts, probs_R, recompute, compiled), None

    def backward_dw(self) -> None:
        """Megatron-core's hook for delayed weight gradients, which this module does not delay."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Experts sharded over EP at dim 0 and their FFN over ETP (gate and up each on their own)."""
        del metadata
        ep = (len(sharded_offsets), self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        axis = len(sharded_offsets)
        replica = (0, 0, self.dp_group.rank())

        def shard(name: str, weight: torch.Tensor, *offsets: tuple[int, int, int]) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{name}.weight",
                weight,
                *sharded_offsets,
                *offsets,
                replica_id=replica,
                prepend_axis_num=len(sharded_offsets),
            )

        w1 = shard("linear_fc1", self.w1, ep, (axis + 1, tp_rank, tp_size))
        w2 = shard("linear_fc2", self.w2, ep, (axis + 2, tp_rank, tp_size))
        return {
            f"{prefix}w1": w1 if tp_size == 1 else _split_gate_up(w1, (*sharded_offsets, ep), tp_rank, tp_size),
            f"{prefix}w2": w2,
        }


def _split_gate_up(w1: ShardedTensor, offsets: tuple[Any, ...], tp_rank: int, tp_size: int) -> Any:
    """Under ETP a rank's [gate; up] is not a slice of the global [gate; up]: two slices, put together on load."""
    from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory

    prepend = len(offsets) - 1

    def build(key: str, weight: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[Any]:
        if flattened_range is not None:
            raise ValueError(f"{key}: a flattened expert weight cannot be split into gate and up")
        gate, up = weight.chunk(2, dim=1)
        return [
            ShardedTensor.from_rank_offsets(
                key,
                part,
                *offsets,
                (prepend + 1, tp_rank + half * tp_size, 2 * tp_size),
                replica_id=replica_id,
                prepend_axis_num=prepend,
            )
            for half, part in enumerate((gate.contiguous(), up.contiguous()))
        ]

    def merge(parts: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(parts, dim=1)

    return ShardedTensorFactory(w1.key, w1.data, build, merge, w1.replica_id)
