"""The reference against transformers, and against itself in other words. What it is wrong in, all is wrong in."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from perilune.pretrain import presets
from perilune.pretrain.schema import Model

TINY = presets.get("tiny").model
VARIANTS = {
    "groups": TINY,
    "no query latent": replace(TINY, q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=3),
    # transformers gives the latent norms 1e-6 whatever `rms_norm_eps` is: a large one shows that they are kept apart
    "two shared": replace(TINY, n_shared_experts=2, norm_topk_prob=False, rope_theta=50000.0, rms_norm_eps=1e-2),
    "dense": replace(TINY, n_routed_experts=0, first_k_dense_replace=3, num_nextn_predict_layers=0),
    "yarn": replace(TINY, rope_scaling_factor=4.0, qk_rope_head_dim=16, beta_fast=8.0),
}


def hf_config(model: Model) -> DeepseekV3Config:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": model.rope_scaling_factor,
            "original_max_position_embeddings": model.original_max_position_embeddings,
            "beta_fast": model.beta_fast,
            "beta_slow": model.beta_slow,
            "mscale": model.mscale,
            "mscale_all_dim": model.mscale_all_dim,
        }
    names = (
        "hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "vocab_size intermediate_size first_k_dense_replace n_shared_experts num_experts_per_tok moe_intermediate_size "
        "n_group topk_group routed_scaling_factor norm_topk_prob rms_norm_eps tie_word_embeddings "
        "num_nextn_predict_layers"
    ).split()
    return DeepseekV3Config(
        num_hidden_layers=model.num_layers,
        num_key_value_heads=model.num_attention_heads,
        n_routed_experts=max(1, model.n_routed_experts),
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
        **{name: getattr(model, name) for name in names},
    )


def fuse_experts(weights: reference.Weights, layer: int, experts: int) -> reference.Weights:
    """The tensors of a layer below `model.layers.N.`, experts stacked as transformers keeps them in memory."""
    prefix = f"model.layers.{layer}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if "mlp.gate.weight" in own:
        parts = [
            {p: own.pop(f"mlp.experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(experts)
        ]
        own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat([p["gate"], p["up"]]) for p in parts])
        own["mlp.experts.down_proj"] = torch.stack([p["down"] for p in parts])
    return own


def hf_model(model: Model, weights: reference.Weights) -> DeepseekV3ForCausalLM:
    """transformers' model with the reference's weights; every tensor must find its place."""
    built = DeepseekV3ForCausalLM(hf_config(model)).to(next(iter(weights.values())).dtype).eval()
    state = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(model.num_layers):
        fused = fuse_experts(weights, layer, model.n_routed_experts)
        state |= {f"model.layers.{layer}.{name}": value for name, value in fused.items()}
    built.load_state_dict(state, strict=True)
    return built


def documents(model: Model, *lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    model = VARIANTS[variant]
    weights = reference.init_weights(model, seed=1)
    (doc,) = documents(model, 48)
    ours = reference.forward(model, weights, reference.packed_batch([[doc]], model.num_nextn_predict_layers), 0.3)
    with torch.no_grad():
        theirs = hf_model(model, weights)(input_ids=torch.tensor([doc])).logits[0]
    assert theirs.std() > 0.5  # else equal logits would say little
    assert (ours.logits[0] - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_mtp_logits_equal_transformers() -> None:
    model = replace(TINY, num_nextn_predict_layers=2)
    weights = reference.init_weights(model, seed=2)
    (doc,) = documents(model, 32)
    ours = reference.forward(model, weights, reference.packed_batch([[doc]], 2), 0.3)
    main = hf_model(model, weights)
    mtp = MtpModel(main, 2).eval()
    names = {"shared_head.norm.weight": "post_norm.weight"}
    for k, layer in enumerate(mtp.layers):
        state = fuse_experts(weights, model.num_layers + k, model.n_routed_experts)
        own = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
        state = {names.get(n, n if n in own else f"mtp_block.{n}"): v for n, v in state.items()}
        layer.load_state_dict(state, strict=True)
    with torch.no_grad():
        hidden = main.model(input_ids=torch.tensor([doc])).last_hidden_state
        for k in (1, 2):
            tokens = torch.tensor([doc[k:]])
            positions = torch.arange(tokens.shape[1])[None]
            hidden = mtp.forward_layer(k - 1, hidden[:, : tokens.shape[1]], positions, None, input_ids=tokens)
            theirs = main.lm_head(hidden)[0]
            difference = (ours.logits[k, : len(doc) - k] - theirs).abs().max()
            assert difference < 2e-5 * theirs.abs().max(), k


def test_packed_documents_equal_documents_alone() -> None:
    model = replace(TINY, num_nextn_predict_layers=2)
    weights = reference.init_weights(model, seed=3, dtype=torch.float64)
    docs = documents(model, 20, 3, 1, 40, 32, 32)
    packed = reference.forward(model, weights, reference.packed_batch([docs[:4], docs[4:]], 2), 0.3)
    start, sums = 0, torch.zeros(3, dtype=torch.float64)
    for doc in docs:
        alone = reference.forward(model, weights, reference.packed_batch([[doc]], 2), 0.3)
        for k in range(3):
            seen = max(0, len(doc) - k)
            expected = packed.logits[k, start : start + seen]
            torch.testing.assert_close(alone.logits[k, :seen], expected, rtol=1e-10, atol=1e-10)
        sums += alone.loss_sums
        start += len(doc)
    torch.testing.assert_close(packed.loss_sums, sums, rtol=1e-10, atol=0)
    assert packed.loss_counts.tolist() == [sum(max(0, len(d) - 1 - k) for d in docs) for k in range(3)]


def test_without_document_mask_a_row_is_one_document() -> None:
    weights = reference.init_weights(TINY, seed=3)
    first, second = documents(TINY, 20, 44)
    loose = reference.forward(TINY, weights, reference.packed_batch([[first, second]], 1, document_mask=False), 0.3)
    whole = reference.forward(TINY, weights, reference.packed_batch([[first + second]], 1), 0.3)
    cut = reference.forward(TINY, weights, reference.packed_batch([[first, second]], 1), 0.3)
    assert torch.equal(loose.logits, whole.logits)
    assert torch.equal(cut.logits[0, :20], whole.logits[0, :20])
    assert not torch.allclose(cut.logits[0, 20:], whole.logits[0, 20:], atol=1e-2)


def test_objective_is_the_sum_of_its_parts() -> None:
    model = replace(TINY, num_nextn_predict_layers=2, seq_aux_loss_alpha=0.02)
    weights = reference.init_weights(model, seed=4, dtype=torch.float64)
    docs = documents(model, 30, 34, 64)
    out = reference.forward(model, weights, reference.packed_batch([docs[:2], docs[2:]], 2), 0.3)
    n_main = 29 + 33 + 63
    first, second = out.loss_sums[1], out.loss_sums[2]
    main = torch.nn.functional.nll_loss(
        out.logits[0, :29].log_softmax(-1), torch.tensor(docs[0][1:]), reduction="sum"
    ) + torch.nn.functional.nll_loss(
        torch.cat([out.logits[0, 30:63], out.logits[0, 64:127]]).log_softmax(-1),
        torch.tensor(docs[1][1:] + docs[2][1:]),
        reduction="sum",
    )
    rows, layers = out.aux_losses.shape
    assert (rows, layers) == (2, 4)  # two expert layers, two of MTP
    expected = (main + 0.15 * first + 0.15 * second) / n_main + 0.02 * out.aux_losses.sum() / 2
    torch.testing.assert_close(out.objective, expected, rtol=1e-12, atol=0)


def test_sequence_loss_by_hand() -> None:
    """Two experts of four a token, two tokens a row: L = sum_i f_i P_i with f_i = 4 / (2*2) count_i."""
    model = replace(TINY, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    batch = reference.packed_batch([[[1, 2]], [[3, 4]]], 0)
    scores[1, 3] = 0.1  # no ties: row 0 counts are 1, 2, 1, 0
    shares = torch.stack([scores[0], scores[1] / 0.9])
    expected = (torch.tensor([1.0, 2.0, 1.0, 0.0]) * shares.mean(0)).sum()
    assert reference.sequence_loss(model, scores, batch)[0] == pytest.approx(float(expected), rel=1e-6)
    even = reference.sequence_loss(model, torch.full((4, 4), 0.3), batch)
    torch.testing.assert_close(even, torch.ones(2))  # equal scores: sum_i f_i / E = 1 whichever are counted


def test_groups_and_bias_rule_the_choice_but_not_the_weights() -> None:
    model = replace(TINY, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2)
    # K/M = 1: a group is as good as its best expert. Groups: (.9 .0) (.8 .7) (.6 .5): the first two stay.
    assert reference.choose(model, torch.tensor([[0.9, 0.0, 0.8, 0.7, 0.6, 0.5]])).tolist() == [[0, 2]]
    # K/M = 2: by sums .9, 1.5, 1.1 the first group falls out, though it holds the best expert.
    by_two = replace(model, topk_group=1)
    assert reference.choose(by_two, torch.tensor([[0.9, 0.0, 0.8, 0.7, 0.6, 0.5]])).tolist() == [[2, 3]]

    weights = reference.init_weights(TINY, seed=5)
    batch = reference.packed_batch([documents(TINY, 64)], 1)
    layer = "model.layers.2.mlp.gate.e_score_correction_bias"
    shifted = reference.forward(TINY, weights | {layer: weights[layer] + 7.0}, batch, 0.3)
    plain = reference.forward(TINY, weights, batch, 0.3)
    torch.testing.assert_close(shifted.logits, plain.logits)  # a common shift changes no choice, and no weight
    pushed = weights[layer].clone()
    pushed[0] += 2.0
    out = reference.forward(TINY, weights | {layer: pushed}, batch, 0.3)
    assert out.loads[2][0] == 64 and out.loads[2].sum() == 64 * TINY.num_experts_per_tok


def test_gradients_reach_every_weight_and_stop_at_masks() -> None:
    model = replace(TINY, num_nextn_predict_layers=2)
    weights = reference.init_weights(model, seed=6)
    for value in weights.values():
        value.requires_grad_(True)
    batch = reference.packed_batch([documents(model, 64), documents(model, 24, 40, seed=1)], 2)
    out = reference.forward(model, weights, batch, 0.3)
    grads = torch.autograd.grad(out.objective, list(weights.values()), allow_unused=True)
    for name, grad in zip(weights, grads, strict=True):
        if name.endswith("e_score_correction_bias"):
            assert grad is None
        elif (expert := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)) and not grad.any():
            assert out.loads[int(expert[1])][int(expert[2])] == 0, name
        else:
            assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, name

    batch.loss_mask[:, 64:] = 0  # the second row no longer counts
    again = reference.forward(replace(model, seq_aux_loss_alpha=0.0), weights, batch, 0.3)
    (grad,) = torch.autograd.grad(again.objective, [weights["model.embed_tokens.weight"]])
    only_second = set(batch.inputs[0, 64:].tolist()) - set(batch.inputs[0, :64].tolist())
    assert only_second and grad[sorted(only_second)].abs().max() == 0


def test_shapes_are_those_of_the_published_checkpoint() -> None:
    """Names and shapes read in the published tensor headers of DeepSeek-V3 (layer 61 is MTP)."""
    shapes = reference.tensor_shapes(presets.get("deepseek_v3").model)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.60.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert {"model.layers.61.enorm.weight", "model.layers.61.hnorm.weight"} <= shapes.keys()
    # 91,991 tensors on disk less the FP8 scales and MTP's copies of embedding and head
    quantised = sum(
        len(s) == 2 and ("self_attn" in n or "_proj" in n) and "eh_proj" not in n for n, s in shapes.items()
    )
    assert len(shapes) + quantised + 2 == 91_991
