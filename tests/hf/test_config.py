"""config.json and our model, both ways, with transformers between them."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hf_folders as folders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.pretrain import presets
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.config import config_from_hf, config_to_hf
from perilune.pretrain.schema import Model

# As published with DeepSeek-V3's weights, but for what is of no consequence here (auto_map, transformers_version).
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_deepseek_v3_as_published() -> None:
    """The preset's sizes, with YaRN on top; what is written has every published field with its value."""
    expected = replace(
        presets.get("deepseek_v3").model, rope_scaling_factor=40.0, original_max_position_embeddings=4096,
        max_position_embeddings=163840, seq_aux_loss_alpha=0.001, init_std=0.02,
    )  # fmt: skip
    assert config_from_hf(V3) == expected
    written = config_to_hf(expected, dtype="bfloat16", bos=0, eos=1)
    for name, value in V3.items():
        if isinstance(value, dict):
            assert value.items() <= written[name].items()
        else:
            assert written[name] == value, name


@st.composite
def models(draw: Any) -> Model:
    """Any shape that transformers can compute."""
    sizes = st.integers(1, 40)
    groups = draw(st.sampled_from([1, 2, 4]))
    kept = draw(st.integers(1, groups))
    active = st.integers(2, 40)
    layers = draw(st.integers(1, 8))
    dense = draw(st.booleans())
    yarn = draw(st.booleans())
    real = st.floats(0.25, 64.0)
    extra: dict[str, Any] = {}
    if yarn:
        extra = {
            "rope_scaling_factor": draw(st.floats(1.5, 64.0)), "original_max_position_embeddings": draw(sizes),
            "beta_fast": draw(real), "beta_slow": draw(real), "mscale": draw(st.sampled_from([0.0, 0.707, 1.0])),
            "mscale_all_dim": draw(st.sampled_from([0.0, 0.707, 1.0])),
        }  # fmt: skip
    return Model(
        num_layers=layers, hidden_size=draw(sizes), num_attention_heads=draw(sizes),
        q_lora_rank=draw(st.none() | sizes), kv_lora_rank=draw(sizes), qk_nope_head_dim=draw(sizes),
        qk_rope_head_dim=2 * draw(sizes), v_head_dim=draw(sizes), intermediate_size=draw(sizes),
        first_k_dense_replace=layers if dense else draw(st.integers(0, layers - 1)),
        n_routed_experts=0 if dense else groups * draw(st.integers(2, 8)), n_shared_experts=draw(st.integers(1, 3)),
        num_experts_per_tok=2 * kept if kept < groups else draw(active), moe_intermediate_size=draw(sizes),
        n_group=groups, topk_group=kept, routed_scaling_factor=draw(real), norm_topk_prob=draw(st.booleans()),
        seq_aux_loss_alpha=draw(st.floats(0, 1)), num_nextn_predict_layers=draw(st.integers(0, 3)),
        vocab_size=draw(sizes), rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])), rope_theta=draw(st.floats(100, 1e6)),
        max_position_embeddings=draw(sizes), init_std=draw(st.floats(1e-4, 1)), **extra,
    )  # fmt: skip


@given(models())
def test_inverse_of_each_other(model: Model) -> None:
    written = json.loads(json.dumps(config_to_hf(model)))
    assert config_from_hf(written) == model
    for old in ("rope_parameters", "dtype"):  # as configs were before transformers 5
        written.pop(old)
    assert config_from_hf(written) == model


@pytest.mark.parametrize("name", folders.MODELS)
def test_through_transformers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers reads ours as it would its own, without a warning, and what it saves again is the same model."""
    from transformers import AutoConfig, DeepseekV3Config

    model = folders.MODELS[name]
    theirs = folders.config(model)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model)))
    with caplog.at_level(logging.WARNING):
        read = AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records and isinstance(read, DeepseekV3Config)
    dense = "first_k_dense_replace"
    for key, value in theirs.to_dict().items():
        if key in ("bos_token_id", "eos_token_id", "dtype", "architectures", "transformers_version", "_name_or_path"):
            continue
        if key == "rope_parameters":
            assert value.items() <= getattr(read, key).items()
        elif key != dense or model.n_routed_experts:
            assert getattr(read, key) == value, key
    read.save_pretrained(tmp_path / "again")
    assert config_from_hf(json.loads((tmp_path / "again/config.json").read_text())) == model
    theirs.architectures = ["DeepseekV3ForCausalLM"]
    theirs.save_pretrained(tmp_path / "theirs")
    known = {f.name: getattr(model, f.name) for f in fields(Model)}
    found = config_from_hf(json.loads((tmp_path / "theirs/config.json").read_text()))
    assert found == Model(**known | {"seq_aux_loss_alpha": Model.seq_aux_loss_alpha, "init_std": 0.02})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type 'llama'"),
    "another head": ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "SequenceClassification"),
    "softmax": ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "top-k method": ({"topk_method": "greedy"}, "topk_method='greedy'"),
    "layers without experts between": ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "half-split RoPE": ({"rope_interleave": False}, "rope_interleave=False"),
    "no hidden_size": ({"hidden_size": ...}, "no hidden_size"),
    "no q_lora_rank": ({"q_lora_rank": ...}, "no q_lora_rank"),
    "text for a number": ({"hidden_size": "7168"}, "hidden_size='7168'"),
    "true for 1": ({"n_shared_experts": True}, "n_shared_experts=True"),
    "a float for a count": ({"num_hidden_layers": 61.0}, "num_hidden_layers=61.0"),
    "NaN": ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor=nan"),
    "grouped queries": ({"num_key_value_heads": 8}, "num_key_value_heads=8, by its other fields 128"),
    "head dim": ({"qk_head_dim": 128}, "qk_head_dim=128, by its other fields 192"),
    "types in a list": ({"torch_dtype": ["bfloat16"], "architectures": 5}, "architectures 5"),
    "no groups": ({"n_group": 0}, "n_group=0, which must be at least 1"),
    "no group kept": ({"topk_group": 0}, "topk_group=0, which must be at least 1"),
    "fewer than no experts": ({"n_routed_experts": -4}, "n_routed_experts=-4, which must be at least 0"),
    "beyond a float": ({"routed_scaling_factor": 10**400}, "which is not float"),
    "two MTP depths": ({"num_mtp_layers": 2}, "num_mtp_layers=2"),
    "two bases": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}}, "rope_theta is 50000.0"),
    "YaRN and none": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type is default"),
    "no base": ({"rope_theta": ...}, "no rope_theta"),
    "linear RoPE": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "YaRN without factor": ({"rope_scaling": {"type": "yarn"}}, "no factor"),
    "half of YaRN's mscales": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0}}, "one of"
    ),
    "YaRN's factor disagrees": ({"rope_scaling": V3["rope_scaling"] | {"attention_factor": 2.0}}, "multiply cos"),  # type: ignore[operator]
    "YaRN's factor is text": ({"rope_scaling": V3["rope_scaling"] | {"attention_factor": "2"}}, "='2', which is not"),  # type: ignore[operator]
    "one expert a token": (
        {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "transformers divides it by itself"
    ),
    "top-3 of a group": ({"num_experts_per_tok": 12}, "K/M = 12/4 = 3"),
    "one expert a group": ({"n_group": 256, "topk_group": 256}, "leaves 1 expert"),
    "tied": ({"tie_word_embeddings": True}, "head of its own"),
    "no shared expert": ({"n_shared_experts": 0}, "n_shared_experts=0"),
    "experts in MTP alone": ({"first_k_dense_replace": 61}, "after dense layers only"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, message = REFUSED[name]
    config = {k: v for k, v in (V3 | changes).items() if v is not ...}
    with pytest.raises(InputError, match=re.escape(message)):
        config_from_hf(config)


def test_a_group_rule_without_effect_is_written() -> None:
    """Where every group is kept, how groups are scored does not matter."""
    assert config_to_hf(replace(folders.TINY, n_group=2, topk_group=2, num_experts_per_tok=2))["topk_group"] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_norm_eps": 1e-5}, "latent_norm_eps=1e-05"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 1}, "K/M = 1/1 = 1"),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}, "tokens would go to other experts"),
        ({"n_shared_experts": 0}, "shared expert"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ],
)
def test_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        config_to_hf(replace(folders.TINY, **changes))
