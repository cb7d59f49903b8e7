"""Counts against published numbers, transformers' model on the meta device, and FLOPs that torch counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from perilune.pretrain import presets
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token, mean_context, parameters, table
from perilune.pretrain.plan.ranks import bytes_per_rank, parameters_per_rank, rank_table
from perilune.pretrain.schema import Model, Parallel

TINY = presets.get("tiny").model
MODELS = {name: presets.get(name).model for name in presets.names()}


def hf_on_meta(model: Model) -> DeepseekV3ForCausalLM:
    same = (
        "hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
        " vocab_size intermediate_size first_k_dense_replace n_routed_experts n_shared_experts num_experts_per_tok"
        " n_group moe_intermediate_size topk_group tie_word_embeddings"
    ).split()
    keys: dict[str, Any] = {name: getattr(model, name) for name in same}
    config = DeepseekV3Config(
        num_hidden_layers=model.num_layers,
        num_key_value_heads=model.num_attention_heads,
        attn_implementation="eager",
        experts_implementation="eager",
        **keys,
    )
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config)


def test_published_deepseek_v3() -> None:
    count = parameters(MODELS["deepseek_v3"])
    assert count.total == 671_026_419_200
    assert round(count.active / 1e9, 1) == 36.6
    assert round(count.mtp / 1e9, 2) == 11.61
    assert round((count.mtp - count.mtp_eh_proj) / 1e9, 2) == 11.51


def test_published_moonlight() -> None:
    count = parameters(MODELS["moonlight_16b_a3b"])
    assert count.total_without_embeddings == 15_289_021_568
    assert count.active_without_embeddings == 2_243_685_888
    assert count.mtp == 0


def test_proxy_100m() -> None:
    count = parameters(MODELS["proxy_100m"])
    assert (round(count.total / 1e6, 1), round(count.mtp / 1e6, 1)) == (108.1, 14.3)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_transformers_on_meta(name: str) -> None:
    built, count = hf_on_meta(MODELS[name]), parameters(MODELS[name])
    weights = sum(p.numel() for p in built.parameters())
    biases = sum(b.numel() for n, b in built.named_buffers() if n.endswith("e_score_correction_bias"))
    assert biases == count.router_bias
    assert weights + biases == count.total
    layers = built.model.layers
    assert sum(p.numel() for p in layers[0].parameters()) == count.dense_layer
    own_bias = MODELS[name].n_routed_experts
    assert sum(p.numel() for p in layers[-1].parameters()) + own_bias == count.moe_layer


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        replace(TINY, q_lora_rank=None, n_shared_experts=0, num_nextn_predict_layers=2),
        replace(TINY, n_routed_experts=0, first_k_dense_replace=3),
        replace(TINY, tie_word_embeddings=True, num_nextn_predict_layers=0),
    ],
    ids=["tiny", "no query latent", "dense", "tied"],
)
def test_parameters_equal_the_reference_with_mtp(model: Model) -> None:
    count = parameters(model)
    assert count.total + count.mtp == sum(w.numel() for w in reference.init_weights(model, seed=0).values())


def test_active_are_the_weights_that_get_a_gradient_from_one_token() -> None:
    weights = reference.init_weights(TINY, seed=0)
    for value in weights.values():
        value.requires_grad_(True)
    model = replace(TINY, num_nextn_predict_layers=0, seq_aux_loss_alpha=0.0)
    out = reference.forward(model, weights, reference.packed_batch([[[3]]], 0), 0.0)
    hit = torch.autograd.grad(out.logits[0, 0].sum(), list(weights.values()), allow_unused=True)
    # The gradient of queries is 0 where a token sees only itself, so 0 means "not met" for experts alone.
    used = sum(
        w.numel()
        for (name, w), g in zip(weights.items(), hit, strict=True)
        if g is not None and (".mlp.experts." not in name or g.any())
    )
    count = parameters(TINY)
    assert used == count.active_without_embeddings + count.embedding + count.head


def test_forward_flops_equal_those_counted_in_transformers() -> None:
    model = replace(MODELS["tiny"], max_position_embeddings=96)
    real = hf_on_meta(model).to_empty(device="cpu")
    real.load_state_dict({n: torch.randn(v.shape) * 0.05 for n, v in real.state_dict().items()})
    tokens = torch.randint(model.vocab_size, (2, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real(input_ids=tokens, use_cache=False, position_ids=torch.arange(96)[None].expand(2, -1))
    flops = flops_per_token(model, 96, causal=False, mtp=False)
    assert counter.get_total_flops() == flops.forward * tokens.numel()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_training_flops_equal_those_counted_in_the_reference(depth: int) -> None:
    model = replace(TINY, num_nextn_predict_layers=depth)
    weights = reference.init_weights(model, seed=0)
    for value in weights.values():
        value.requires_grad_(True)
    batch = reference.packed_batch([[list(range(48))]], depth)
    with FlopCounterMode(display=False) as counter:
        out = reference.forward(model, weights, batch, 0.3)
        forward = counter.get_total_flops()
        out.objective.backward()
    flops = flops_per_token(model, 48, causal=False)
    assert forward == flops.forward * 48
    assert counter.get_total_flops() == flops.training * 48
    assert flops.forward - flops.mtp == flops_per_token(model, 48, causal=False, mtp=False).forward


def test_mean_context() -> None:
    assert mean_context(4) == 2.5  # 1, 2, 3, 4 keys
    assert mean_context(4, causal=False) == 4
    assert mean_context(6, document_lengths=[2, 4]) == (1 + 2 + 1 + 2 + 3 + 4) / 6
    assert mean_context(6, causal=False, document_lengths=[2, 4]) == (2 * 2 + 4 * 4) / 6
    batch = reference.packed_batch([[[1] * 5, [2] * 11], [[3] * 16]], 0)
    seen = reference.visible(batch).sum().item() / 32
    assert mean_context(16, document_lengths=[5, 11, 16]) == seen
    with pytest.raises(InputError, match="at least 1 token"):
        mean_context(4, document_lengths=[3, 0])


def test_scaling_law_flops_of_a_dense_model() -> None:
    """DeepSeek LLM's M = 72 n d^2 + 12 n d l, for plain attention with d = heads x head dim and an FFN of 8/3 d."""
    d, n, length = 96, 3, 64
    model = replace(
        TINY, num_layers=n, hidden_size=d, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=1, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=24, intermediate_size=8 * d // 3, n_routed_experts=0, first_k_dense_replace=n,
    )  # fmt: skip
    ours = flops_per_token(model, length, causal=False).training_without_vocabulary
    # MLA's k and v come through a latent of 1: count what it costs, and take away what plain k and v projections would
    latent = 6 * n * (d * (1 + 8) + 4 * (16 + 24))
    assert ours == 72 * n * d**2 + 12 * n * d * length - 6 * n * 2 * d**2 + latent


def test_rank_counts_add_up_to_the_model() -> None:
    """tp, ep and etp share out everything but norms and routers; pp shares layers and copies MTP's embedding."""
    model = replace(TINY, num_nextn_predict_layers=2)
    count = parameters(model)
    trained = count.total - count.router_bias + count.mtp - count.mtp_router_bias
    shapes = reference.tensor_shapes(model)
    whole = sum(
        torch.Size(s).numel() for n, s in shapes.items() if "norm" in n or n.endswith("mlp.gate.weight")
    )  # kept whole on every tp rank
    alone = parameters_per_rank(model, Parallel(), 0)
    assert alone.total == trained
    assert alone.router_bias == count.router_bias + count.mtp_router_bias
    for parallel in (Parallel(tp=2), Parallel(tp=4, ep=2), Parallel(pp=3), Parallel(tp=2, pp=3, ep=4, etp=2)):
        ranks = [parameters_per_rank(model, parallel, r) for r in range(parallel.pp)]
        experts = sum(r.experts for r in ranks) * parallel.ep * parallel.etp
        dense = sum(r.dense for r in ranks) * parallel.tp - (parallel.tp - 1) * whole
        copy = count.embedding if parallel.pp > 1 else 0
        assert experts == alone.experts
        assert dense + experts == trained + copy
        assert sum(r.head for r in ranks) * parallel.tp == count.head


def test_deepseek_v3_on_its_published_layout() -> None:
    """64 ways of expert parallelism leave 4 experts a rank and layer; 16 stages of 4 layers, 1 on the last."""
    config = presets.get("deepseek_v3")
    expert = 3 * 7168 * 2048
    ranks = [parameters_per_rank(config.model, config.parallel, r) for r in range(16)]
    assert [r.experts // expert // 4 for r in ranks] == [1] + [4] * 14 + [2]  # three dense layers first; MTP last
    assert ranks[0].embedding == ranks[15].embedding == ranks[15].head == 129280 * 7168
    assert not any(r.embedding or r.head for r in ranks[1:15])
    lines = rank_table(config, world_size=2048).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "1-14", "15"]


def test_bytes_by_hand() -> None:
    alone = parameters_per_rank(TINY, Parallel(), 0)
    fp32 = bytes_per_rank(TINY, Parallel(), 0, world_size=1, compute="fp32")
    bf16 = bytes_per_rank(TINY, Parallel(), 0, world_size=1, compute="bf16")
    assert fp32.total == 16 * alone.total and bf16.total == 18 * alone.total
    sharded = bytes_per_rank(TINY, Parallel(ep=2), 0, world_size=8, compute="bf16")
    assert sharded.optimizer == 12 * (alone.dense / 8 + alone.experts / 2 / 4)
    muon = bytes_per_rank(TINY, Parallel(ep=2), 0, world_size=8, compute="bf16", optimizer="muon")
    assert sharded.optimizer - muon.optimizer == 4 * ((alone.dense - alone.vectors) / 8 + alone.experts / 2 / 4)
    averaged = bytes_per_rank(TINY, Parallel(ep=2), 0, world_size=8, compute="bf16", optimizer="muon", average=True)
    assert averaged.optimizer - muon.optimizer == 4 * (alone.dense / 8 + alone.experts / 2 / 4)
    unsharded = bytes_per_rank(TINY, Parallel(ep=2, zero1=False), 0, world_size=8, compute="bf16")
    assert unsharded.optimizer == 12 * (alone.dense + alone.experts / 2)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(tp=3), r"model.num_attention_heads = 4 must divide by parallel.tp=3"),
        (Parallel(ep=3), r"model.n_routed_experts = 16 must divide by parallel.ep=3"),
        (Parallel(etp=3), r"gate_proj = 32 must divide by parallel.etp=3"),
        (Parallel(pp=3, vpp=2), r"model.num_layers=3 cannot fill parallel.pp x parallel.vpp = 3 x 2 = 6 chunks"),
        (Parallel(pp=2, layout="Ett|tL"), r"0 m, 1 L: it must have .* model.num_nextn_predict_layers=1 m"),
        (Parallel(pp=3, layout="Ett|tm|L"), r"MTP \(m\) apart from the loss"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(parallel: Parallel, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parameters_per_rank(TINY, parallel, 0)


def test_world_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="6 processes must divide by"):
        bytes_per_rank(TINY, Parallel(ep=4), 0, world_size=6, compute="bf16")


def test_table_says_the_totals_in_full() -> None:
    text = table(MODELS["deepseek_v3"], 4096)
    assert "671,026,419,200" in text and "11,610,068,224" in text
    assert len({len(line) for line in text.splitlines()}) == 1
