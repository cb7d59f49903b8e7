"""Analytic counts of a model: parameters (total and active) and FLOPs a token; `ranks.py` shares them out.

Everything derives from one list, `layer_weights`: the weights of a layer with their shapes and how Megatron-core's
local layer spec splits each. Counting is then adding up, and a matmul costs 2 FLOPs a weight and token.

Conventions, stated because sources differ:
- The router bias is counted as a parameter in totals (671,026,419,200 for V3 has it) but not as active: no gradient
  reaches it and no token is multiplied by it.
- Active parameters count one of embedding and head, as the 36.6B of V3 does (README_WEIGHTS of DeepSeek-V3 counts
  both: 36.7B is said to include 0.9B of each). MTP is apart.
- FLOPs are those of matrix products: norms, softmax, RoPE, activations, top-k and the embedding's look-up are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Model

Part = Literal["attention", "dense_ffn", "router", "router_bias", "routed", "shared", "norm", "mtp_projection"]


@dataclass(frozen=True)
class Weight:
    """`copies` equal tensors of `shape` ([out, in] for a matrix), split along `split_dim`.

    `over` says over which ranks: "tp", "experts" (ep by whole copies, then etp along `split_dim`) or "none".
    """

    name: str  # DeepSeek's, below the layer
    part: Part
    shape: tuple[int, ...]
    over: Literal["tp", "experts", "none"] = "none"
    split_dim: int = 0
    copies: int = 1

    @property
    def numel(self) -> int:
        return self.copies * math.prod(self.shape)


def layer_weights(model: Model, layer: int) -> list[Weight]:
    """The weights of decoder layer `layer`; from `num_layers` on, of an MTP layer (V3 section 2.2, eq. 21-23).

    Splits are those of Megatron-core 0.19's local spec: the down-projections to the latents are column-parallel too.
    (Transformer Engine's spec keeps those two whole on every rank.)
    """
    hidden = model.hidden_size
    is_mtp = layer >= model.num_layers
    weights = [
        Weight("input_layernorm", "norm", (hidden,)),
        *_attention_weights(model),
        Weight("post_attention_layernorm", "norm", (hidden,)),
        *_ffn_weights(model, min(layer, model.num_layers - 1)),  # an MTP layer is of the last layer's kind
    ]
    if is_mtp:
        weights += [Weight(name, "norm", (hidden,)) for name in ("enorm", "hnorm", "shared_head.norm")]
        weights.append(Weight("eh_proj", "mtp_projection", (hidden, 2 * hidden), "tp"))
    return weights


def _attention_weights(model: Model) -> list[Weight]:
    """Multi-head latent attention (V3 section 2.1.1, eq. 1-11)."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent = model.kv_lora_rank
    if model.q_lora_rank is None:
        weights = [Weight("self_attn.q_proj", "attention", (queries, hidden), "tp")]
    else:
        weights = [
            Weight("self_attn.q_a_proj", "attention", (model.q_lora_rank, hidden), "tp"),
            Weight("self_attn.q_a_layernorm", "norm", (model.q_lora_rank,)),
            Weight("self_attn.q_b_proj", "attention", (queries, model.q_lora_rank), "tp"),
        ]
    keys_values = heads * (model.qk_nope_head_dim + model.v_head_dim)
    return weights + [
        Weight("self_attn.kv_a_proj_with_mqa", "attention", (latent + model.qk_rope_head_dim, hidden), "tp"),
        Weight("self_attn.kv_a_layernorm", "norm", (latent,)),
        Weight("self_attn.kv_b_proj", "attention", (keys_values, latent), "tp"),
        Weight("self_attn.o_proj", "attention", (hidden, heads * model.v_head_dim), "tp", split_dim=1),
    ]


def _ffn_weights(model: Model, layer: int) -> list[Weight]:
    """A dense SwiGLU, or router, routed experts and the shared experts as one SwiGLU (V3 section 2.1.2, eq. 12-16)."""

    def swiglu(prefix: str, part: Part, inner: int, over: Literal["tp", "experts"], copies: int = 1) -> list[Weight]:
        up, down = (inner, model.hidden_size), (model.hidden_size, inner)
        return [
            Weight(f"{prefix}.gate_proj", part, up, over, 0, copies),
            Weight(f"{prefix}.up_proj", part, up, over, 0, copies),
            Weight(f"{prefix}.down_proj", part, down, over, 1, copies),
        ]

    if layer < model.first_k_dense_replace or model.n_routed_experts == 0:
        return swiglu("mlp", "dense_ffn", model.intermediate_size, "tp")
    experts = model.n_routed_experts
    weights = [
        Weight("mlp.gate.weight", "router", (experts, model.hidden_size)),
        Weight("mlp.gate.e_score_correction_bias", "router_bias", (experts,)),
        *swiglu("mlp.experts", "routed", model.moe_intermediate_size, "experts", copies=experts),
    ]
    if model.n_shared_experts:
        inner = model.n_shared_experts * model.moe_intermediate_size
        weights += swiglu("mlp.shared_experts", "shared", inner, "tp")
    return weights


@dataclass(frozen=True)
class ParameterCount:
    """Parameters in numbers of elements; nothing of MTP is in a field that does not say so."""

    total: int  # with embedding, head and router biases
    embedding: int
    head: int  # 0 when tied
    dense_layer: int  # of one dense layer
    moe_layer: int  # of one expert layer, router bias included; 0 if there is none
    router_bias: int  # of all expert layers
    active_without_embeddings: int  # what one token meets, without embedding, head and router biases
    mtp: int  # of all MTP layers, with eh_proj and router biases; embedding and head are shared, hence not in it
    mtp_eh_proj: int
    mtp_router_bias: int

    @property
    def total_without_embeddings(self) -> int:
        return self.total - self.embedding - self.head

    @property
    def active(self) -> int:
        """What one token meets, counting one of embedding and head."""
        return self.active_without_embeddings + self.embedding


def parameters(model: Model) -> ParameterCount:
    """Parameters of the whole model."""
    layers = [layer_weights(model, i) for i in range(model.num_layers)]
    mtp = [layer_weights(model, model.num_layers + k) for k in range(model.num_nextn_predict_layers)]
    embedding = model.vocab_size * model.hidden_size
    head = 0 if model.tie_word_embeddings else embedding
    final_norm = model.hidden_size
    dense = [_sum(w) for i, w in enumerate(layers) if not _is_moe(model, i)]
    moe = [_sum(w) for i, w in enumerate(layers) if _is_moe(model, i)]
    return ParameterCount(
        total=embedding + head + final_norm + sum(dense) + sum(moe),
        embedding=embedding,
        head=head,
        dense_layer=dense[0] if dense else 0,
        moe_layer=moe[0] if moe else 0,
        router_bias=sum(_sum(w, "router_bias") for w in layers),
        active_without_embeddings=final_norm + sum(_active(model, w) for w in layers),
        mtp=sum(_sum(w) for w in mtp),
        mtp_eh_proj=sum(_sum(w, "mtp_projection") for w in mtp),
        mtp_router_bias=sum(_sum(w, "router_bias") for w in mtp),
    )


def _is_moe(model: Model, layer: int) -> bool:
    return layer >= model.first_k_dense_replace and model.n_routed_experts > 0


def _sum(weights: Sequence[Weight], *parts: Part) -> int:
    return sum(w.numel for w in weights if not parts or w.part in parts)


def _active(model: Model, weights: Sequence[Weight]) -> int:
    """Parameters of these weights that one token meets: all but the router bias and the experts not chosen."""
    routed = _sum(weights, "routed")
    chosen = routed * model.num_experts_per_tok // model.n_routed_experts if routed else 0
    return _sum(weights) - _sum(weights, "router_bias") - routed + chosen


@dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs a token of the main model's parts, and of MTP as one sum. Training is three forwards."""

    attention_projections: float
    attention_scores: float  # scores and their product with the values, over the mean context
    dense_ffn: float
    router: float
    routed_experts: float
    shared_experts: float
    head: float
    mtp: float  # projection, block and head of all depths

    @property
    def forward(self) -> float:
        return sum(vars(self).values())

    @property
    def training(self) -> float:
        """Forward and backward: the gradients of inputs and of weights cost one forward each. Without recompute."""
        return 3 * self.forward

    @property
    def training_without_vocabulary(self) -> float:
        """No head, no MTP."""
        return 3 * (self.forward - self.head - self.mtp)


def mean_context(seq_len: int, causal: bool = True, document_lengths: Sequence[int] | None = None) -> float:
    """Mean number of keys that a query meets: in rows of `seq_len`, or in documents of the given lengths.

    Causal, the i-th token of a document meets i keys, itself included: (L+1)/2 on average.
    """
    lengths = list(document_lengths) if document_lengths is not None else [seq_len]
    if not lengths or min(lengths) < 1:
        raise InputError(f"document lengths {lengths[:8]}: there must be at least one, each of at least 1 token")
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    return pairs / sum(lengths)


def flops_per_token(
    model: Model,
    seq_len: int,
    *,
    causal: bool = True,
    mtp: bool = True,
    document_lengths: Sequence[int] | None = None,
) -> FlopCount:
    """FLOPs of one token in a row of `seq_len` tokens, or in rows packed from documents of `document_lengths` tokens.

    causal: count only the keys that a token may see, as a fused kernel computes; False counts the whole square, as
    plain matrix products with a mask do.
    """
    context = mean_context(seq_len, causal, document_lengths)
    # V3 eq. 10: q.k over nope+rope dims, then the sum over values of v dims, in every head
    head_dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    scores = 2 * model.num_attention_heads * head_dims * context
    head = 2.0 * model.hidden_size * model.vocab_size
    layers = [layer_weights(model, i) for i in range(model.num_layers)]

    def products(weights: Sequence[Weight], *parts: Part) -> float:
        share = model.num_experts_per_tok / model.n_routed_experts if parts == ("routed",) and weights else 1.0
        return 2.0 * _sum(weights, *parts) * share

    def of_all(part: Part) -> float:
        return sum(products(w, part) for w in layers if _sum(w, part))

    mtp_sum = 0.0
    for k in range(model.num_nextn_predict_layers if mtp else 0):
        weights = layer_weights(model, model.num_layers + k)
        parts: tuple[Part, ...] = ("attention", "dense_ffn", "router", "routed", "shared", "mtp_projection")
        mtp_sum += scores + head + sum(products(weights, part) for part in parts if _sum(weights, part))
    return FlopCount(
        attention_projections=of_all("attention"),
        attention_scores=model.num_layers * scores,
        dense_ffn=of_all("dense_ffn"),
        router=of_all("router"),
        routed_experts=of_all("routed"),
        shared_experts=of_all("shared"),
        head=head,
        mtp=mtp_sum,
    )


def scaling_flops(model: Model, seq_len: int) -> float:
    """M of DeepSeek LLM's scaling laws (arXiv 2401.02954, section 3.2), training FLOPs a token: C = M D.

    Theirs is 72 n d^2 + 12 n d l: the layers' matrices, and attention over the whole square of `seq_len`, masked or
    not; without embedding and head. Here the same of any model: MLA's matrices and head sizes, the experts that a token
    meets, the router; MTP, which is no part of the model that is used, is left out.
    """
    return flops_per_token(model, seq_len, causal=False, mtp=False).training_without_vocabulary


def table(model: Model, seq_len: int) -> str:
    """Parameters and FLOPs of a model, a line each, numbers in full."""
    count = parameters(model)
    flops = flops_per_token(model, seq_len)
    rows = [
        ("parameters, without MTP", count.total),
        ("  embedding", count.embedding),
        ("  head", count.head),
        ("  one dense layer", count.dense_layer),
        ("  one expert layer", count.moe_layer),
        ("  router biases", count.router_bias),
        ("  without embedding and head", count.total_without_embeddings),
        ("active, with one of embedding and head", count.active),
        ("active, without both", count.active_without_embeddings),
        ("MTP, besides the shared embedding and head", count.mtp),
        ("  of which eh_proj", count.mtp_eh_proj),
        (f"FLOPs a token, forward, rows of {seq_len}", flops.forward),
        ("  attention projections", flops.attention_projections),
        ("  attention scores and values", flops.attention_scores),
        ("  dense FFN", flops.dense_ffn),
        ("  router", flops.router),
        ("  routed experts", flops.routed_experts),
        ("  shared experts", flops.shared_experts),
        ("  head", flops.head),
        ("  MTP", flops.mtp),
        ("FLOPs a token, training", flops.training),
        ("  M of scaling laws (arXiv 2401.02954)", scaling_flops(model, seq_len)),
    ]
    return "\n".join(f"{name:<44}{value:>24,.0f}" for name, value in rows)
