"""Every refusal names the key, its value and a remedy; every preset is a plan that fits."""

from __future__ import annotations

import importlib.util
import typing
from typing import Any

import pytest

from perilune.pretrain import config as configs
from perilune.pretrain import presets, ranges, rules
from perilune.pretrain.errors import InputError


def _numbers(hint: Any) -> set[Any]:
    """The types of which `hint` is made, but for a mapping's: it has its own rules."""
    return set() if typing.get_origin(hint) is dict else {hint, *typing.get_args(hint)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision.compute=fp16"], ["precision.compute=fp16", "bf16"]),
        (["precision.fp8=emulated"], ["precision.fp8=emulated", "precision.fp8=off"]),
        (["precision.fp8=blockwise"], ["precision.fp8=blockwise", "precision.compute=bf16"]),
        (["optim.name=muon", "optim.momentum=1.5"], ["optim.momentum=1.5", "between 0 and 1"]),
        (["optim.ema_decay=1"], ["optim.ema_decay=1.0", "between 0 and 1, 1 excluded"]),
        (["optim.ema_decay=-0.5"], ["optim.ema_decay=-0.5", "between 0"]),
        (["parallel.cp=4", "data.seq_len=60"], ["2 x 4", "data.seq_len=60", "56 and 64"]),
        (["parallel.dispatcher=flex"], ["flex", "alltoall"]),
        (
            ["parallel.overlap_param_gather=true"],
            ["overlap_param_gather=true", "overlap_grad_reduce=true (it is false)"],
        ),
        (
            ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true", "parallel.zero1=false"],
            ["zero1=true (it is false)"],
        ),
        (["parallel.overlap_ep=true", "parallel.ep=2"], ["overlap_ep=true", "false"]),
        (["kernels.attention=varlen_attn"], ["kernels.attention=varlen_attn", "compute=bf16, not fp32", "=auto"]),
        (
            ["kernels.attention=varlen_attn", "precision.compute=bf16", "model.qk_nope_head_dim=250"],
            ["kernels.attention=varlen_attn", "nope_head_dim=250 + model.qk_rope_head_dim=8 make 258", "=auto"],
        ),
        (["kernels.rope=triton", "model.v_head_dim=24"], ["kernels.rope=triton", "model.v_head_dim=24;", "=auto"]),
        (
            ["kernels.rope=triton", "model.num_attention_heads=12", "parallel.tp=2"],
            ["not model.num_attention_heads/parallel.tp=12/2; use"],
        ),
        (["parallel.cuda_graphs=true"], ["cuda_graphs=true", "false"]),
        (["recompute.granularity=full", "recompute.modules=[moe]"], ["granularity=full", "selective"]),
        (
            ["recompute.granularity=selective", "recompute.modules=[mtp]", "model.num_nextn_predict_layers=0"],
            ["names mtp", "num_nextn_predict_layers=0"],
        ),
        (["recompute.granularity=selective"], ["recompute.modules", "mla_up_proj"]),
        (["recompute.granularity=selective", "recompute.modules=[norm]"], ["'norm'", "layernorm"]),
        (["recompute.granularity=selective", "recompute.modules=[moe, moe_act]"], ["moe_act", "contains"]),
        (["data.quarantine_limit=-1"], ["data.quarantine_limit=-1", "at least 0"]),
        (["data.retry_s=-1"], ["data.retry_s=-1"]),
        (["model.tie_word_embeddings=true"], ["tie_word_embeddings"]),
        (["model.norm_topk_prob=false"], ["norm_topk_prob"]),
        (["model.qk_rope_head_dim=7"], ["qk_rope_head_dim=7", "even"]),
        (["model.first_k_dense_replace=9"], ["first_k_dense_replace=9", "num_layers=3"]),
        (["model.first_k_dense_replace=3"], ["all 3 layers are dense", "n_routed_experts=16"]),
        (["model.n_routed_experts=0"], ["n_routed_experts=0", "first_k_dense_replace=3"]),
        (["model.n_group=5"], ["n_routed_experts=16", "n_group=5"]),
        (["model.n_group=0"], ["n_group=0", "at least 1"]),
        (["model.topk_group=0"], ["topk_group=0", "between 1 and"]),
        (["model.rope_theta=0"], ["rope_theta=0.0", "between 1 and"]),
        (["model.rms_norm_eps=-1"], ["rms_norm_eps=-1.0"]),
        (["model.topk_group=5"], ["topk_group=5", "n_group=4"]),
        (["model.num_experts_per_tok=3"], ["3/2", "multiple of model.topk_group"]),
        (["model.num_experts_per_tok=9"], ["num_experts_per_tok=9", "8"]),
        (["parallel.tp=2", "model.num_attention_heads=3"], ["num_attention_heads=3", "tp=2", "[1]"]),
        (["parallel.tp=1000000000000"], ["tp=1000000000000", "[1, 2, 4]"]),
        (["parallel.ep=4", "model.n_routed_experts=6", "model.n_group=1", "model.topk_group=1"], ["=6", "ep=4"]),
        (["parallel.pp=2", "parallel.layout=Ett|tm|L"], ["Ett|tm|L"]),
        (["parallel.pp=2", "parallel.layout=Etttm|L"], ["MTP", "loss"]),
        (["train.global_batch_size=6", "train.micro_batch_size=4"], ["train.global_batch_size=6", "= 4", "4 and 8"]),
        (["train.micro_batch_size=0"], ["train.micro_batch_size=0", "at least 1"]),
        (["optim.lr=-1"], ["optim.lr=-1.0", "between 0"]),
        (["optim.beta1=1.5"], ["optim.beta1=1.5"]),
        (["model.num_nextn_predict_layers=-1"], ["num_nextn_predict_layers=-1"]),
        (["model.moe_intermediate_size=0"], ["moe_intermediate_size=0"]),
        (["schedule.milestones=[0.5]"], ["milestones=[0.5]", "factors"]),
        (["data.seq_len=128"], ["data.seq_len=128", "max_position_embeddings=64", "set model.max_position_emb"]),
        (["optim.beta1=1"], ["optim.beta1=1.0", "1 excluded", "0.9"]),
        (["optim.beta2=1"], ["optim.beta2=1.0", "1 excluded"]),
        (["optim.momentum=1"], ["optim.momentum=1.0", "1 excluded"]),
        (["model.rope_scaling_factor=0"], ["rope_scaling_factor=0.0", "between 1 and"]),
        (["schedule.mtp_switch_ratio=7"], ["mtp_switch_ratio=7.0", "between 0 and 1"]),
        (["schedule.factors=[-1,2]"], ["schedule.factors=[-1.0, 2.0]", "between 0 and"]),
        (["schedule.milestones=[0.9,0.8]"], ["schedule.milestones=[0.9, 0.8]", "rising"]),
        (["schedule.moves=[step]"], ["schedule.moves=['step']", "a move for each"]),
        (["schedule.moves=[step,jump]"], ["'jump'", "step, linear, cosine, sqrt"]),
        (["train.batch_ramp_start=99", "train.batch_ramp_tokens=1000"], ["batch_ramp_start=99", "size=8"]),
        (["train.steps=0"], ["train.steps=0", "train.tokens=0", "exactly one"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_run_is_refused_in_one_sentence(overrides: list[str], words: list[str]) -> None:
    config = configs.resolve("tiny", overrides)
    p = config.parallel
    with pytest.raises(InputError) as refused:
        rules.check(config, world=max(4, p.tp) if max(p.tp, p.pp, p.ep, p.cp) > 1 else 1)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("key", [key for key, hint in configs.keys().items() if {int, float} & _numbers(hint)])
def test_every_number_has_a_range(key: str) -> None:
    hint = configs.keys()[key]
    value = "[-5, -4]" if typing.get_origin(hint) is tuple else "-5"
    # The one has experts, the other everything else.
    start = ("tiny", []) if key.startswith("model.") else ("demo_vlm", ["stage=vit"])
    with pytest.raises(InputError, match="-5"):
        rules.check(configs.resolve(start[0], [*start[1], f"{key}={value}"]), 2)


@pytest.mark.parametrize("name", presets.names())
def test_numbers_of_every_preset_lie_in_their_ranges(name: str) -> None:
    for stage in presets.stages(name) or ("",):
        assert ranges.all_problems(presets.get(name, stage)) == []


@pytest.mark.parametrize(
    ("name", "world", "overrides"),
    [
        ("tiny", 1, []),
        ("demo", 2, []),
        ("proxy_100m", 8, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
        ("moonlight_16b_a3b", 8, ["optim.name=adamw"]),
        ("deepseek_v3", 2048, []),
    ],
)
def test_presets_fit(name: str, world: int, overrides: list[str]) -> None:
    rules.check(configs.resolve(name, overrides), world)
    assert name in presets.names()


def test_this_machine_is_asked_apart_from_the_plan() -> None:
    config = configs.resolve("tiny", ["precision.compute=bf16", "precision.fp8=blockwise"])
    rules.check(config, 1)
    with pytest.raises(InputError, match="needs a GPU"):
        rules.check_machine(config, gpus=0)
    flex = configs.resolve("tiny", ["parallel.ep=2", "parallel.dispatcher=flex"])
    rules.check(flex, 2)
    with pytest.raises(InputError, match="deep_ep"):
        rules.check_machine(flex, gpus=0)


@pytest.mark.parametrize(
    "word",
    [
        "attention=varlen_attn",
        "swiglu=compiled",
        "permute=transformer_engine",
        "router=transformer_engine",
        "rope=triton",
    ],
)
def test_kernels_are_planned_anywhere_and_refused_where_they_cannot_run(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.resolve("tiny", [f"kernels.{word}", "precision.compute=bf16"])
    name = word.partition("=")[0]
    rules.check(config, 1)
    with pytest.raises(InputError, match=rf"^kernels\.{word} is a GPU's, .*; use kernels\.{name}=auto$"):
        rules.check_machine(config, gpus=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if word == "rope=triton":
        with pytest.raises(InputError, match="needs Triton"):
            rules.check_machine(config, gpus=1)
    elif "transformer_engine" not in word:
        rules.check_machine(config, gpus=1)
    if "transformer_engine" not in word:
        return
    with pytest.raises(InputError, match=rf"kernels\.{word} needs Transformer Engine 2\.[16] .* here is none: pip"):
        rules.check_machine(config, gpus=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rules.metadata, "version", lambda name: "2.0.1")
    with pytest.raises(InputError, match=r"here is 2\.0\.1: pip"):
        rules.check_machine(config, gpus=1)
    monkeypatch.setattr(rules.metadata, "version", lambda name: "2.17.1+cu13")
    rules.check_machine(config, gpus=1)
