"""The model in plain PyTorch, for one device, one file, from the papers' formulas: what all else is compared with.

Nothing here is fast, sharded or shared with the code under test. Weights are a dict under DeepSeek's tensor names;
the dtype of the weights is the dtype of all arithmetic, so float64 weights give a float64 reference.

Sources: "V3" is arXiv 2412.19437. Choices where it is silent or where the published checkpoints differ:
- MTP concatenates [norm(embedding); norm(hidden)], the order of the checkpoint; eq. 21 writes the opposite.
- MTP's first hidden state is taken after the main model's final norm. Depth k > 1 takes depth k-1's after its output
  norm (`shared_head.norm`), which has its own place only in the checkpoint. Megatron-core chains them so.
- All losses are divided by the count of main-loss tokens, also those of MTP (V3 eq. 24 divides by T, not T-k).
- A sequence of the sequence-wise loss is one row, whatever documents are in it. Its top-k knows neither bias nor
  groups (eq. 18). MTP's expert layers count among the layers. All positions of a row count, also those of MTP that have
  no input left.
- Router weights are divided by their sum + 1e-20.

Legend: T tokens of the batch (R rows of S), H hidden, N heads, E experts, K chosen of them, V vocabulary, D MTP depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.schema import Model

Weights = dict[str, Tensor]


@dataclass
class ReferenceOutput:
    """What one batch gives; everything differentiable but the counts and choices."""

    logits: Tensor  # [1+D, T, V]
    token_losses: Tensor  # [1+D, T] cross entropy, unmasked
    loss_sums: Tensor  # [1+D] masked sums: 0 is the main loss, k MTP's depth k
    loss_counts: Tensor  # [1+D] tokens in each
    aux_losses: Tensor  # [R, expert layers, MTP's last] L_bal without alpha (V3 eq. 17)
    chosen: dict[int, Tensor]  # layer -> [T, K] experts, best first by biased score
    loads: dict[int, Tensor]  # layer -> [E] tokens sent to each expert
    objective: Tensor  # what is minimised


def tensor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, router biases included; embedding and head of MTP are the main model's."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    qk = model.qk_nope_head_dim + model.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}

    def mlp(prefix: str, inner: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, inner)

    for layer in range(model.num_layers + model.num_nextn_predict_layers):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        if model.q_lora_rank is None:
            shapes[f"{attention}.q_proj.weight"] = (heads * qk, hidden)
        else:
            shapes[f"{attention}.q_a_proj.weight"] = (model.q_lora_rank, hidden)
            shapes[f"{attention}.q_a_layernorm.weight"] = (model.q_lora_rank,)
            shapes[f"{attention}.q_b_proj.weight"] = (heads * qk, model.q_lora_rank)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (model.kv_lora_rank + model.qk_rope_head_dim, hidden)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (model.kv_lora_rank,)
        shapes[f"{attention}.kv_b_proj.weight"] = (
            heads * (model.qk_nope_head_dim + model.v_head_dim),
            model.kv_lora_rank,
        )
        shapes[f"{attention}.o_proj.weight"] = (hidden, heads * model.v_head_dim)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        if is_moe(model, layer):
            shapes[f"{block}.mlp.gate.weight"] = (model.n_routed_experts, hidden)
            shapes[f"{block}.mlp.gate.e_score_correction_bias"] = (model.n_routed_experts,)
            for expert in range(model.n_routed_experts):
                mlp(f"{block}.mlp.experts.{expert}", model.moe_intermediate_size)
            if model.n_shared_experts:
                mlp(f"{block}.mlp.shared_experts", model.n_shared_experts * model.moe_intermediate_size)
        else:
            mlp(f"{block}.mlp", model.intermediate_size)
        if layer >= model.num_layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                shapes[f"{block}.{name}.weight"] = (hidden,)
            shapes[f"{block}.eh_proj.weight"] = (hidden, 2 * hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def is_moe(model: Model, layer: int) -> bool:
    """Whether a layer has experts; an MTP layer is of the last decoder layer's kind."""
    return model.n_routed_experts > 0 and min(layer, model.num_layers - 1) >= model.first_k_dense_replace


def init_weights(model: Model, seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights that leave no part idle: norms away from 1, router biases away from 0, logits of order 1.

    Matrices are N(0, 1/in), so that activations keep their size whatever the widths; embeddings N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(model).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("e_score_correction_bias"):
            value = 0.1 * value
        elif len(shape) == 1:
            value = 1 + 0.2 * value
        elif "embed_tokens" not in name:
            value = value / math.sqrt(shape[1])
        weights[name] = value.to(dtype)
    return weights


def forward(model: Model, weights: Weights, batch: PackedBatch, mtp_weight: float) -> ReferenceOutput:
    """The whole model on one batch, and its objective.

    objective = (sum_0 + (lambda / D) sum_k sum_k) / count_0 + alpha mean over rows of the sum over layers of L_bal
    """
    routing: list[tuple[int, Tensor, Tensor]] = []  # (layer, chosen [T, K], L_bal of each row [R])
    embedding = weights["model.embed_tokens.weight"]
    head = embedding if model.tie_word_embeddings else weights["lm_head.weight"]

    h = embedding[batch.inputs[0]]
    for layer in range(model.num_layers):
        h = block(model, weights, layer, h, batch, routing)
    h = rms_norm(h, weights["model.norm.weight"], model.rms_norm_eps)
    logits = [h @ head.T]

    for k in range(1, model.num_nextn_predict_layers + 1):  # V3 eq. 21-23
        layer = model.num_layers + k - 1
        prefix = f"model.layers.{layer}"
        e = rms_norm(embedding[batch.inputs[k]], weights[f"{prefix}.enorm.weight"], model.rms_norm_eps)
        h = rms_norm(h, weights[f"{prefix}.hnorm.weight"], model.rms_norm_eps)
        h = torch.cat([e, h], dim=-1) @ weights[f"{prefix}.eh_proj.weight"].T
        h = block(model, weights, layer, h, batch, routing)
        h = rms_norm(h, weights[f"{prefix}.shared_head.norm.weight"], model.rms_norm_eps)
        logits.append(h @ head.T)

    token_losses = torch.stack(
        [F.cross_entropy(logits[k], batch.labels[k], reduction="none") for k in range(len(logits))]
    )
    mask = batch.loss_mask.to(token_losses.dtype)
    loss_sums, loss_counts = (token_losses * mask).sum(-1), mask.sum(-1)
    depths = max(1, model.num_nextn_predict_layers)
    objective = (loss_sums[0] + mtp_weight / depths * loss_sums[1:].sum()) / loss_counts[0]
    aux = torch.stack([a for _, _, a in routing], dim=1) if routing else token_losses.new_zeros(batch.rows, 0)
    objective = objective + model.seq_aux_loss_alpha * aux.sum(dim=1).mean()
    experts = model.n_routed_experts
    return ReferenceOutput(
        logits=torch.stack(logits),
        token_losses=token_losses,
        loss_sums=loss_sums,
        loss_counts=loss_counts,
        aux_losses=aux,
        chosen={layer: chosen for layer, chosen, _ in routing},
        loads={layer: torch.bincount(chosen.flatten(), minlength=experts) for layer, chosen, _ in routing},
        objective=objective,
    )


def block(
    model: Model,
    weights: Weights,
    layer: int,
    h: Tensor,
    batch: PackedBatch,
    routing: list[tuple[int, Tensor, Tensor]],
) -> Tensor:
    """One pre-norm transformer block, [T, H] -> [T, H]; an expert layer adds what it chose to `routing`."""
    prefix = f"model.layers.{layer}"
    x = rms_norm(h, weights[f"{prefix}.input_layernorm.weight"], model.rms_norm_eps)
    h = h + attention(model, weights, f"{prefix}.self_attn", x, batch)
    x = rms_norm(h, weights[f"{prefix}.post_attention_layernorm.weight"], model.rms_norm_eps)
    if not is_moe(model, layer):
        return h + swiglu(weights, f"{prefix}.mlp", x)
    y, chosen, aux = moe(model, weights, f"{prefix}.mlp", x, batch)
    routing.append((layer, chosen, aux))
    return h + y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / root mean square of x, times weight (arXiv 1910.07467)."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def swiglu(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def attention(model: Model, weights: Weights, prefix: str, x: Tensor, batch: PackedBatch) -> Tensor:
    """Multi-head latent attention, [T, H] -> [T, H] (V3 section 2.1.1, eq. 1-11), within the segments of the batch."""
    heads, nope, rope = model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim
    tokens = x.shape[0]
    if model.q_lora_rank is None:
        q = x @ weights[f"{prefix}.q_proj.weight"].T
    else:
        c_q = x @ weights[f"{prefix}.q_a_proj.weight"].T  # eq. 6
        c_q = rms_norm(c_q, weights[f"{prefix}.q_a_layernorm.weight"], model.latent_norm_eps)
        q = c_q @ weights[f"{prefix}.q_b_proj.weight"].T  # eq. 7 and 8
    q_nope, q_rope = q.view(tokens, heads, nope + rope).split([nope, rope], dim=-1)

    latent = x @ weights[f"{prefix}.kv_a_proj_with_mqa.weight"].T  # eq. 1 and 3
    c_kv, k_rope = latent.split([model.kv_lora_rank, rope], dim=-1)
    c_kv = rms_norm(c_kv, weights[f"{prefix}.kv_a_layernorm.weight"], model.latent_norm_eps)
    kv = c_kv @ weights[f"{prefix}.kv_b_proj.weight"].T  # eq. 2 and 5
    k_nope, v = kv.view(tokens, heads, nope + model.v_head_dim).split([nope, model.v_head_dim], dim=-1)

    angles = rope_angles(model, batch.positions, x.dtype)
    q_rope = rotate_pairs(q_rope, angles[:, None, :])
    k_rope = rotate_pairs(k_rope[:, None, :], angles[:, None, :])  # one key for all heads
    scale = (nope + rope) ** -0.5 * yarn_softmax_factor(model)
    scores = torch.einsum("tnd,snd->nts", q_nope, k_nope) + torch.einsum("tnd,sd->nts", q_rope, k_rope[:, 0])
    scores = (scores * scale).masked_fill(~visible(batch), float("-inf"))
    o = torch.einsum("nts,snd->tnd", scores.softmax(dim=-1), v)  # eq. 10
    return o.reshape(tokens, -1) @ weights[f"{prefix}.o_proj.weight"].T  # eq. 11


def visible(batch: PackedBatch) -> Tensor:
    """[T, T] bool: query t may look at key s of its own segment, not after it."""
    tokens = batch.positions.numel()
    place = torch.arange(tokens)
    segment = torch.bucketize(place, batch.cu_seqlens[1:].long(), right=True)
    return (segment[:, None] == segment[None, :]) & (place[:, None] >= place[None, :])


def rope_angles(model: Model, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, rope/2] angle of each pair: position * theta^(-2i/rope) (arXiv 2104.09864), slowed by YaRN where it is on.

    YaRN (arXiv 2309.00071, section 3.2): pairs that turn less than beta_slow times over the original length are slowed
    by the factor, those that turn more than beta_fast are left alone, in between goes a ramp over whole indices.
    """
    dim, theta = model.qk_rope_head_dim, model.rope_theta
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pair / dim)
    if model.rope_scaling_factor > 1:

        def index_of(turns: float) -> float:
            length = model.original_max_position_embeddings
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(index_of(model.beta_fast)), 0)
        high = min(math.ceil(index_of(model.beta_slow)), dim - 1)
        slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency * (1 - slowed) + frequency / model.rope_scaling_factor * slowed
    return (positions.to(torch.float64)[:, None] * frequency).to(dtype)


def yarn_softmax_factor(model: Model) -> float:
    """What YaRN multiplies the scores with: (0.1 mscale_all_dim ln s + 1)^2; 1 without YaRN (V3 section 4.3)."""
    if model.rope_scaling_factor <= 1:
        return 1.0
    if model.mscale != model.mscale_all_dim:
        raise NotImplementedError("only mscale == mscale_all_dim, where the rotation itself is not scaled")
    return (0.1 * model.mscale_all_dim * math.log(model.rope_scaling_factor) + 1) ** 2


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of the last dim by `angles` of half its length."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def moe(model: Model, weights: Weights, prefix: str, x: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Shared and routed experts (V3 section 2.1.2, eq. 12-16): output [T, H], chosen [T, K], L_bal of each row [R]."""
    scores = torch.sigmoid(x @ weights[f"{prefix}.gate.weight"].T)  # eq. 15
    chosen = choose(model, scores.detach() + weights[f"{prefix}.gate.e_score_correction_bias"].detach())
    gates = scores.gather(1, chosen)
    if model.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # eq. 13
    gates = gates * model.routed_scaling_factor

    y = torch.zeros_like(x)
    for expert in range(model.n_routed_experts):
        token, slot = torch.where(chosen == expert)
        out = swiglu(weights, f"{prefix}.experts.{expert}", x[token]) * gates[token, slot, None]
        y = y.index_add(0, token, out)
    if model.n_shared_experts:
        y = y + swiglu(weights, f"{prefix}.shared_experts", x)
    return y, chosen, sequence_loss(model, scores, batch)


def choose(model: Model, biased: Tensor) -> Tensor:
    """[T, K] experts by biased score, from the M best groups; a group's score is the sum of its K/M best."""
    tokens, experts = biased.shape
    if model.n_group > 1:
        size = experts // model.n_group
        groups = biased.view(tokens, model.n_group, size)
        group_scores = groups.topk(model.num_experts_per_tok // model.topk_group, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(model.topk_group, dim=-1).indices, True)
        biased = groups.masked_fill(~kept[:, :, None], float("-inf")).reshape(tokens, experts)
    return biased.topk(model.num_experts_per_tok, dim=-1).indices


def sequence_loss(model: Model, scores: Tensor, batch: PackedBatch) -> Tensor:
    """[R] sum_i f_i P_i of each row, without alpha (V3 eq. 17-20)."""
    experts, k = model.n_routed_experts, model.num_experts_per_tok
    rows = scores.view(batch.rows, batch.seq_len, experts)
    best = rows.detach().topk(k, dim=-1).indices
    counted = torch.zeros_like(rows).scatter(2, best, 1.0)
    f = experts / (k * batch.seq_len) * counted.sum(dim=1)  # eq. 18
    p = (rows / rows.sum(dim=-1, keepdim=True)).mean(dim=1)  # eq. 19 and 20
    return (f * p).sum(dim=-1)


def packed_batch(rows: list[list[list[int]]], depth: int, document_mask: bool = True) -> PackedBatch:
    """A batch from rows of documents of token ids, written from PackedBatch's contract, one token at a time.

    Every row must have as many tokens. Without `document_mask` a row is one segment.
    """
    segments = [doc for row in rows for doc in (row if document_mask else [[t for doc in row for t in doc]])]
    tokens = sum(map(len, segments))
    inputs, labels = torch.zeros(2, 1 + depth, tokens, dtype=torch.int64)
    mask = torch.zeros(1 + depth, tokens)
    start = 0
    for segment in segments:
        for i in range(len(segment)):
            for k in range(1 + depth):
                if i + k < len(segment):
                    inputs[k, start + i] = segment[i + k]
                if i + k + 1 < len(segment):
                    labels[k, start + i] = segment[i + k + 1]
                    mask[k, start + i] = 1
        start += len(segment)
    lengths = torch.tensor([len(segment) for segment in segments])
    return PackedBatch(
        inputs=inputs,
        labels=labels,
        loss_mask=mask,
        positions=torch.cat([torch.arange(int(n)) for n in lengths]),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        max_seqlen=int(lengths.max()),
        rows=len(rows),
        seq_len=tokens // len(rows),
    )
