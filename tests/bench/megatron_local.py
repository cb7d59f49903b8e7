"""Megatron-core's own local spec on this machine: the rival of tests/bench/step.py that shares our framework.

Its GPTModel from `get_gpt_decoder_block_spec` without Transformer Engine: its MLA with its DotProductAttention and
causal mask, its TopKRouter, one matmul after another for the experts (SequentialMLP), its torch RMSNorm, its linear
layers, its vocabulary-parallel cross-entropy. `parallel/cpu.py` lets it run without CUDA, as it does for us; nothing
else of ours is in it. Only `Attention` stands between: MLA hands its core two arguments that the local core does not
take.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import mlp
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module

from perilune.moe import backbone
from perilune.parallel import cpu
from perilune.parallel.mesh import Mesh
from perilune.pretrain import model as models
from perilune.pretrain.schema import Config


class Attention(DotProductAttention):
    """As Megatron-core's; its output has the width of the values, for which the hidden size over the heads stands."""

    def __init__(self, *, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        del k_channels
        super().__init__(**kwargs)
        if v_channels not in (None, self.hidden_size_per_attention_head):
            raise ValueError(
                f"the local attention core wants v_head_dim == hidden_size / heads, "
                f"not {v_channels} and {self.hidden_size_per_attention_head}"
            )


@dataclass(frozen=True)
class Way:
    """One way in which its user might run it; the fastest counts."""

    fused: bool  # SwiGLU and cross-entropy compiled by torch.compile
    optimizer: str  # megatron; distributed (Megatron's, with ZeRO-1 of one rank); torch (fused AdamW, no DDP)

    def __str__(self) -> str:
        return f"{self.optimizer} optimizer{', compiled SwiGLU and cross-entropy' if self.fused else ''}"


def ways(compute: str) -> list[Way]:
    """In bf16 its optimizers hold fp32 masters; torch's own would not."""
    last = Way(True, "torch") if compute == "fp32" else Way(True, "megatron")
    return [Way(False, "distributed"), Way(True, "distributed"), last]


def weights_of(ours: models.Model) -> dict[str, Any]:
    """A copy of our weights and biases by their names, for `build`."""
    state = ours.bare()[0].state_dict()
    return {name: value.detach().clone() for name, value in state.items() if torch.is_tensor(value)}


def build(config: Config, weights: dict[str, Any], tokens: torch.Tensor, way: Way) -> Callable[[], float]:
    """A step on `tokens` [rows, S], each row a document, from `weights`; the step returns its loss."""
    bf16 = config.precision.compute == "bf16"
    net = _model(config, way)
    net.load_state_dict(_by_expert(weights, net), strict=True)
    mc = net.config
    o = config.optim
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, -1)
    labels = tokens.roll(-1, 1)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]  # the mask it would make, on a GPU only
    counted = torch.ones(rows, length)
    counted[:, -1] = 0  # nothing follows the last token of a document

    def loss_of(module: torch.nn.Module) -> torch.Tensor:
        with (
            patch.object(layers, "linear_with_grad_accumulation_and_async_allreduce", cpu._LINEAR),
            patch.object(mlp, "bias_swiglu_impl", cpu._SWIGLU),
        ):
            losses = module(input_ids=tokens, position_ids=positions, attention_mask=hidden, labels=labels)
        return (losses.float() * counted).sum() / counted.sum()

    if way.optimizer == "torch":
        return _torch_step(net, loss_of, o)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=way.optimizer == "distributed", bucket_size=None
    )
    for parameter in net.parameters():
        parameter.allreduce = getattr(parameter, "allreduce", True)  # type: ignore[attr-defined]
    chunk = DistributedDataParallel(mc, ddp, Float16Module(mc, net) if bf16 else net)
    options = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip,
        bf16=bf16,
        params_dtype=mc.params_dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
    )
    adam = get_megatron_optimizer(options, [chunk], use_gloo_process_groups=False)

    def step() -> float:
        chunk.zero_grad_buffer()
        adam.zero_grad()
        loss = loss_of(chunk)
        loss.backward()
        finalize_model_grads([chunk])
        adam.step()
        return float(loss)

    return step


def _model(config: Config, way: Way) -> GPTModel:
    mc = replace(
        backbone.transformer_config(models.backbone_config(config, Mesh(world=1))),
        normalization="RMSNorm",
        moe_grouped_gemm=False,  # Transformer Engine's and CUTLASS's grouped matmuls want a GPU
        calculate_per_token_loss=False,
        moe_router_bias_update_rate=0.0,
        bias_activation_fusion=way.fused,
        cross_entropy_loss_fusion=way.fused,
    )
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = get_gpt_decoder_block_spec(mc, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = Attention
    return GPTModel(
        config=mc,
        transformer_layer_spec=spec,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.model.tie_word_embeddings,
    ).to(mc.params_dtype)


def _by_expert(mine: dict[str, Any], net: GPTModel) -> dict[str, Any]:
    """Our weights by its names: the same but for the experts, which it keeps one by one."""
    found: dict[str, Any] = {}
    for name, slot in net.state_dict().items():
        if ".local_experts." in name and name.endswith(".weight"):
            layer, rest = name.split(".local_experts.")
            index, part = rest.split(".", 1)
            found[name] = mine[f"{layer}.{'w1' if part.startswith('linear_fc1') else 'w2'}"][int(index)]
        elif name.endswith(("_extra_state", ".local_tokens_per_expert")):
            found[name] = slot
        else:
            found[name] = mine[name]
    return found


def _torch_step(net: GPTModel, loss_of: Callable[[torch.nn.Module], torch.Tensor], o: Any) -> Callable[[], float]:
    adam = torch.optim.AdamW(
        net.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )

    def step() -> float:
        adam.zero_grad()
        loss = loss_of(net)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip)
        adam.step()
        return float(loss)

    return step
