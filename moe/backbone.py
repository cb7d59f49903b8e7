"""The decoder: a model config becomes Megatron-core's transformer config and layer specs, and these a GPTModel.

Legend: T tokens of a micro-batch (packed rows), H hidden, V vocabulary, D MTP depth.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
    mtp_on_this_rank,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from perilune.kernels.cross_entropy import linear_cross_entropy
from perilune.moe.attention import LatentAttention, PackedCoreAttention, PackedRows
from perilune.moe.experts import ExpertLayer, GroupedExperts
from perilune.moe.mtp import DepthLayer
from perilune.moe.norm import RMSNorm
from perilune.moe.router import Router, StepScale
from perilune.parallel import recompute
from perilune.parallel.context import Cut
from perilune.parallel.mesh import FLEX_BACKENDS, Mesh
from perilune.parallel.precision import spec_provider, with_eps


@dataclass(frozen=True)
class BackboneConfig:
    """Everything that shapes a decoder: `model` has the fields of `pretrain.schema.Model`, in the papers' words."""

    model: Any
    mesh: Mesh
    dtype: torch.dtype = torch.float32
    dispatcher: str = "alltoall"
    fp8: str = "off"  # Transformer Engine's recipe: blockwise (V3 section 3.3), current, mxfp8
    layout: str | None = None  # Megatron-core's pipeline layout, such as Ett|tt|tmL; None: equal stages
    recompute_granularity: str = "none"
    recompute_modules: tuple[str, ...] = ()
    kernels: dict[str, str] = field(default_factory=dict)  # by the names of `pretrain.schema.Kernels`; else auto


def transformer_config(config: BackboneConfig) -> MLATransformerConfig:
    """Megatron-core's config in the papers' terms."""
    m, mesh = config.model, config.mesh
    moe: dict[str, Any] = {}
    if m.n_routed_experts:
        moe = {
            "num_moe_experts": m.n_routed_experts,
            "moe_ffn_hidden_size": m.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": m.n_shared_experts * m.moe_intermediate_size or None,
            "moe_router_topk": m.num_experts_per_tok,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": m.n_group if m.n_group > 1 else None,
            "moe_router_group_topk": m.topk_group if m.n_group > 1 else None,
            "moe_router_topk_scaling_factor": m.routed_scaling_factor,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",  # the sequence-wise loss is moe/router.py's
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "flex" if config.dispatcher in FLEX_BACKENDS else config.dispatcher,
            "moe_flex_dispatcher_backend": FLEX_BACKENDS.get(config.dispatcher, "deepep"),
            "moe_permute_fusion": config.kernels.get("permute") == "transformer_engine",
            "moe_router_fusion": config.kernels.get("router") == "transformer_engine",
        }
    fp8: dict[str, Any] = {}
    if config.fp8 != "off":
        recipe = {"blockwise": "blockwise", "current": "tensorwise", "mxfp8": "mxfp8"}[config.fp8]
        fp8 = {"fp8": "e4m3", "fp8_recipe": recipe}
    yarn = m.rope_scaling_factor > 1
    return MLATransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        ffn_hidden_size=m.intermediate_size,
        q_lora_rank=m.q_lora_rank,
        kv_lora_rank=m.kv_lora_rank,
        qk_head_dim=m.qk_nope_head_dim,
        qk_pos_emb_head_dim=m.qk_rope_head_dim,
        v_head_dim=m.v_head_dim,
        # A list, also where all layers are alike: a checkpoint then names each layer, whatever the model.
        moe_layer_freq=[int(i >= m.first_k_dense_replace) for i in range(m.num_layers)],
        qk_layernorm=True,
        layernorm_epsilon=m.rms_norm_eps,
        rope_type="yarn" if yarn else "rope",
        rotary_base=m.rope_theta,
        rotary_scaling_factor=m.rope_scaling_factor if yarn else 1.0,
        original_max_position_embeddings=m.original_max_position_embeddings,
        beta_fast=m.beta_fast,
        beta_slow=m.beta_slow,
        mscale=m.mscale,
        mscale_all_dim=m.mscale_all_dim if yarn else 0.0,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        # On a CPU by parallel/cpu.py; on a GPU Megatron-core compiles it.
        bias_activation_fusion=not torch.cuda.is_available() or config.kernels.get("swiglu") == "compiled",
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mtp_num_layers=m.num_nextn_predict_layers or None,
        calculate_per_token_loss=True,  # not divided by micro-batches: the objective's mean is the global batch's
        perform_initialization=False,  # moe/init.py draws the weights
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=config.dtype,
        pipeline_dtype=config.dtype,
        bf16=config.dtype is torch.bfloat16,
        gradient_accumulation_fusion=False,  # needs NVIDIA's apex, built from source
        tensor_model_parallel_size=mesh.tp,
        sequence_parallel=mesh.tp > 1,
        pipeline_model_parallel_size=mesh.pp,
        pipeline_model_parallel_layout=config.layout,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        # Batched P2P pairs messages wrongly when previous and next rank are the same (pp=2 with vpp).
        overlap_p2p_comm=mesh.vpp > 1,
        batch_p2p_comm=mesh.vpp == 1,
        **recompute.settings(config.recompute_granularity, config.recompute_modules),
        **moe,
        **fp8,
    )


def _layer_specs(config: BackboneConfig, backend: Any, scale: StepScale) -> tuple[ModuleSpec, ModuleSpec | None]:
    """The spec of a dense layer, and of an expert layer (None in a dense model)."""
    m = config.model
    norm = backend.layer_norm()
    latent_norm = with_eps(norm, m.latent_norm_eps)
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    core, by = backend.core_attention(), config.kernels.get("attention", "auto")
    # Transformer Engine's cuts each document over the context-parallel ranks, and wants it padded to 2 x cp.
    if config.mesh.cp > 1 or by != "auto":
        core = ModuleSpec(module=PackedCoreAttention, params={"by": by})
    attention = ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rope": config.kernels.get("rope", "auto")},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=backend.linear(),
            linear_q_up_proj=column,
            linear_kv_down_proj=backend.linear(),
            linear_kv_up_proj=column,
            core_attention=core,
            linear_proj=row,
            q_layernorm=IdentityOp if m.q_lora_rank is None else latent_norm,
            kv_layernorm=latent_norm,
        ),
    )

    def layer(mlp: Any) -> ModuleSpec:
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=norm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )

    dense = layer(partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)))
    if not m.n_routed_experts:
        return dense, None
    stock = get_moe_module_spec_for_backend(backend, num_experts=m.n_routed_experts, moe_grouped_gemm=True)
    parts: MoESubmodules = stock.keywords["submodules"]
    ours = MoESubmodules(
        router=partial(Router, scale=scale), experts=parts.experts, shared_experts=parts.shared_experts
    )
    return dense, layer(partial(ExpertLayer, submodules=ours))


class TokenLoss(torch.nn.Module):
    """Cross-entropy of each token by the head's weight, without the logits of all of them.

    A module without weights of its own, so that what must be done before the head's are read can be hooked to it.
    """

    def forward(
        self, head: torch.nn.Module, hidden_TH: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """Losses [T], of `hidden_TH` of all the group's tokens."""
        weight_VH: torch.Tensor = head.weight  # type: ignore[assignment]
        return linear_cross_entropy(hidden_TH, weight_VH, labels_T, group)


class Backbone(GPTModel):
    """Megatron-core's GPTModel that takes packed rows and gives the loss of every token at every depth."""

    scale: StepScale

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_loss = TokenLoss()

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super()._preprocess(input_ids=input_ids[:1], position_ids=position_ids, **kwargs)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        packed_seq_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        mtp_in_postprocess: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Losses [1+D, T] where `labels` ([1+D, T]) are given, else logits [1+D, T, V] (V of this TP rank).

        Megatron-core's own scales each depth by a local ratio of token counts; here the objective divides every depth
        by the global batch's main-loss tokens (V3 eq. 24: L_k divides by T).
        """
        if mtp_in_postprocess:
            hidden_states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
            )
        if not self.post_process:
            return hidden_states
        outs = []
        for depth, hidden in enumerate(hidden_states.chunk(1 + (self.config.mtp_num_layers or 0), dim=0)):
            outs.append(
                self.output_layer(hidden)[0].squeeze(1) if labels is None else self._loss(hidden, labels[depth])
            )
        return torch.stack(outs)

    def _loss(self, hidden_T1H: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=group)
        losses_T: torch.Tensor = self.token_loss(self.output_layer, hidden_T1H.squeeze(1), labels_T, group)
        return losses_T


def build(config: BackboneConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> Backbone:
    """This rank's part of the decoder (of pipeline stage `pp_rank`; None: this process's), weights not yet drawn."""
    return build_as(Backbone, config, vp_stage, pp_rank)


def build_as[Kind: Backbone](
    kind: type[Kind], config: BackboneConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> Kind:
    """`build`, as a `kind` of backbone."""
    from megatron.core import parallel_state

    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # GPTModel's deprecation notice
    mc = transformer_config(config)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
    backend = spec_provider(RMSNorm, PackedCoreAttention, GroupedExperts)
    scale = StepScale(alpha=config.model.seq_aux_loss_alpha, tokens_per_row=1)
    dense, expert = _layer_specs(config, backend, scale)
    first_expert = config.model.first_k_dense_replace
    all_layers = [expert if expert is not None and i >= first_expert else dense for i in range(mc.num_layers)]
    if mc.pipeline_model_parallel_layout is not None:
        layers = mc.pipeline_model_parallel_layout.get_layer_id_list(LayerType.decoder, vp_stage, pp_rank)
    else:
        offset = get_transformer_layer_offset(mc, vp_stage=vp_stage, pp_rank=pp_rank)
        layers = range(offset, offset + get_num_layers_to_build(mc, vp_stage=vp_stage, pp_rank=pp_rank))
    block = TransformerBlockSubmodules(
        layer_specs=[all_layers[layer] for layer in layers], layer_norm=backend.layer_norm()
    )
    mtp_spec = None
    if mc.mtp_num_layers and mtp_on_this_rank(
        layout=mc.pipeline_model_parallel_layout,
        mtp_num_layers=mc.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    ):
        norm = backend.layer_norm()
        depth = ModuleSpec(
            module=DepthLayer,
            params={"recompute": "mtp" in config.recompute_modules},
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=norm,
                hnorm=norm,
                layer_norm=norm,
                eh_proj=backend.column_parallel_linear(),
                mtp_model_layer=expert or dense,
            ),
        )
        mtp_spec = MultiTokenPredictionBlockSubmodules(layer_specs=[depth] * mc.mtp_num_layers)
    stages = mc.pipeline_model_parallel_size * (mc.virtual_pipeline_model_parallel_size or 1)
    at = pp_rank + (vp_stage or 0) * mc.pipeline_model_parallel_size
    model = kind(
        config=mc,
        transformer_layer_spec=block,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        pre_process=at == 0,
        post_process=at == stages - 1,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.model.tie_word_embeddings,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
    )
    model.scale = scale
    return model


def packed_params(cu_seqlens: torch.Tensor, max_seqlen: int, cut: Cut | None = None) -> PackedRows:
    """Document boundaries ([documents+1] int32) and what this rank holds of the pack, for `Backbone.forward`."""
    places_T = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    lengths = cu_seqlens.diff()
    positions_T = places_T - cu_seqlens[:-1].repeat_interleave(lengths)
    return PackedRows(
        qkv_format="thd",
        documents=cu_seqlens,
        longest=max_seqlen,
        positions_T=positions_T if cut is None else positions_T[cut.index_Q],
        cut=cut,
    )
