"""config.json of `DeepseekV3ForCausalLM` from our model, and back; what one of the two cannot say is refused.

Fields are those of the published DeepSeek-V3 config.json, which vLLM and SGLang read, with those that transformers 5
reads beside them (`rope_parameters` next to `rope_theta` and `rope_scaling`, `dtype` next to `torch_dtype`).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Model

LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm: transformers and the published code give them no other
ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"

_SAME = {  # their name -> ours; values are equal
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "n_shared_experts": "n_shared_experts",
    "n_routed_experts": "n_routed_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "num_experts_per_tok": "num_experts_per_tok",
    "first_k_dense_replace": "first_k_dense_replace",
    "norm_topk_prob": "norm_topk_prob",
    "aux_loss_alpha": "seq_aux_loss_alpha",
    "num_nextn_predict_layers": "num_nextn_predict_layers",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_std",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
_FIXED: dict[str, Any] = {  # what the architecture has no choice in
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_ABSENT = {  # what a config.json without the key means
    "aux_loss_alpha": Model.seq_aux_loss_alpha,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_YARN = {  # their name -> ours
    "factor": "rope_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


# ---------------------------------------------------------------- ours to theirs


def config_to_hf(
    model: Model, *, dtype: str = "float32", bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """config.json of `model` with tensors of `dtype` (`float32` or `bfloat16`) and the tokenizer's special ids.

    Raises InputError, with the reason, for a model that transformers would compute otherwise.
    """
    for reason in not_expressible(model):
        raise InputError(f"this model cannot be written for Hugging Face: {reason}")
    same = {theirs: getattr(model, ours) for theirs, ours in _SAME.items()}
    if not model.n_routed_experts:  # layers from first_k_dense_replace on hold experts, MTP's included
        same["first_k_dense_replace"] = model.num_layers + model.num_nextn_predict_layers
    rope = _rope_to_hf(model)
    legacy = {"type": "yarn", **{k: v for k, v in rope.items() if k != "rope_theta"}}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **same,
        **_FIXED,
        "num_key_value_heads": model.num_attention_heads,
        "seq_aux": True,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": legacy if rope["rope_type"] == "yarn" else None,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def not_expressible(m: Model) -> Iterator[str]:
    """Why transformers' DeepseekV3ForCausalLM would not compute this model; nothing if it would."""
    if m.latent_norm_eps != LATENT_EPS:
        yield (
            f"model.latent_norm_eps={m.latent_norm_eps}, but transformers, vLLM and the published code compute the "
            f"norms of the latents with {LATENT_EPS} whatever config.json says"
        )
    if m.tie_word_embeddings:
        yield "model.tie_word_embeddings=true, but DeepSeek-V3 has a head of its own"
    if not m.n_routed_experts:
        return
    K, M, G, E = m.num_experts_per_tok, m.topk_group, m.n_group, m.n_routed_experts
    if M < G and K != 2 * M:
        yield (
            f"a group's score here is the sum of its best K/M = {K}/{M} = {K / M:g} experts (V3 section 2.1.2), in "
            f"transformers, vLLM and SGLang that of its best 2 whatever K and M are: tokens would go to other experts. "
            "Only model.num_experts_per_tok = 2 x model.topk_group, or one group, gives the same model there"
        )
    if E // G < 2:
        yield (
            f"model.n_routed_experts={E} in model.n_group={G} groups leaves {E // G} expert a group, but transformers "
            "sums the best 2 of each"
        )
    if K == 1:
        yield (
            "model.num_experts_per_tok=1: Megatron-core leaves the weight of a token's only expert as the router gives "
            "it, transformers divides it by itself. 2 or more give the same model there"
        )
    if not m.n_shared_experts:
        yield "model.n_shared_experts=0, but transformers builds a shared expert in every expert layer"


def _rope_to_hf(m: Model) -> dict[str, Any]:
    if m.rope_scaling_factor <= 1:
        return {"rope_type": "default", "rope_theta": m.rope_theta}
    rope = {"rope_type": "yarn", "rope_theta": m.rope_theta, **{k: getattr(m, v) for k, v in _YARN.items()}}
    if _attention_factor(m) != _transformers_attention_factor(m):
        rope["attention_factor"] = _attention_factor(m)
    return rope


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t) (arXiv 2309.00071, eq. 22) as DeepSeek's code scales it."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(m: Model) -> float:
    """By what DeepSeek's published code and Megatron-core multiply cos and sin."""
    return _mscale(m.rope_scaling_factor, m.mscale) / _mscale(m.rope_scaling_factor, m.mscale_all_dim)


def _transformers_attention_factor(m: Model) -> float:
    """The same where config.json does not state it: transformers takes a zero for an absent number."""
    return _attention_factor(m) if m.mscale and m.mscale_all_dim else _mscale(m.rope_scaling_factor, 1.0)


# ---------------------------------------------------------------- theirs to ours


def config_from_hf(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes; inverse of `config_to_hf`.

    Raises InputError for another architecture, an absent or wrongly typed field, fields that contradict each other,
    and what our model does not compute as transformers does.
    """
    _check_fixed(config)
    values: dict[str, Any] = {ours: _value(config, theirs, ours) for theirs, ours in _SAME.items()}
    values |= _rope_from_hf(config)
    model = Model(**values, latent_norm_eps=LATENT_EPS)
    model = _without_unused_experts(model)
    for reason in not_expressible(model):
        raise InputError(f"config.json describes a model that is not computed here as transformers does: {reason}")
    derived = {
        "num_key_value_heads": model.num_attention_heads,
        "qk_head_dim": model.qk_nope_head_dim + model.qk_rope_head_dim,
        "head_dim": model.qk_rope_head_dim,
        "num_local_experts": config.get("n_routed_experts"),
        "num_mtp_layers": model.num_nextn_predict_layers,
    }
    for name, expected in derived.items():
        if config.get(name) not in (None, expected):
            raise InputError(f"config.json contradicts itself: {name}={config[name]!r}, by its other fields {expected}")
    return model


def dtype_of(config: Mapping[str, Any]) -> str:
    """`float32` or `bfloat16`. Raises InputError for another, for none, and where old and new field differ."""
    said = {str(config[name]) for name in ("dtype", "torch_dtype") if config.get(name) is not None}
    if len(said) != 1 or not said <= {"float32", "bfloat16"}:
        named = " and ".join(sorted(said)) or "no dtype"
        raise InputError(f"config.json names {named}; weights are read in float32 or bfloat16")
    return said.pop()


def _check_fixed(config: Mapping[str, Any]) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures")
    named = architectures is None or (isinstance(architectures, list) and ARCHITECTURE in architectures)
    if kind != MODEL_TYPE or not named:
        raise InputError(
            f"config.json is of model_type {kind!r} and architectures {architectures!r}; only {MODEL_TYPE!r} with "
            f"{ARCHITECTURE} is read"
        )
    for name, expected in _FIXED.items():
        if config.get(name, expected) != expected:
            raise InputError(f"config.json has {name}={config[name]!r}; our model computes only {expected!r}")


_HINTS = typing.get_type_hints(Model)


def _value(config: Mapping[str, Any], theirs: str, ours: str) -> Any:
    """The field, with the type that the schema wants."""
    value = config.get(theirs, _ABSENT.get(theirs, ...))
    if value is None and theirs in ("n_group", "topk_group"):
        return 1
    if value is None and theirs in ("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"):
        return 0
    if value is ...:
        raise InputError(f"config.json has no {theirs}; without it the model is not known")
    value = _typed(theirs, value, _HINTS[ours])
    least = 1 if theirs in ("n_group", "topk_group") else 0
    if value is not None and value < least:
        raise InputError(f"config.json has {theirs}={value}, which must be at least {least}")
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    members = typing.get_args(hint) or (hint,)
    if value is None and type(None) in members:
        return None
    kind = members[0]
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    try:
        fits = fits and (kind is not float or math.isfinite(value))
    except OverflowError:  # an integer beyond the largest float
        fits = False
    if not fits:
        raise InputError(f"config.json has {name}={value!r}, which is not {kind.__name__}")
    return kind(value)


def _rope_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our RoPE fields from `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before), or both."""
    new, old = _rope_fields(config, "rope_parameters"), _rope_fields(config, "rope_scaling")
    if config.get("rope_theta") is not None:
        old["rope_theta"] = config["rope_theta"]
    if new and config.get("rope_scaling", ...) is None:
        old["rope_type"] = "default"
    for name in sorted(new.keys() & old.keys()):
        if new[name] != old[name]:
            raise InputError(
                f"config.json contradicts itself: {name} is {new[name]} in rope_parameters and {old[name]} in "
                "rope_theta or rope_scaling"
            )
    rope = {"rope_type": "default"} | old | new
    if "rope_theta" not in rope:
        raise InputError("config.json has no rope_theta; without it the model is not known")
    theta = _typed("rope_theta", rope.pop("rope_theta"), float)
    kind = rope.pop("rope_type")
    if kind == "default" and not rope:
        return {"rope_theta": theta}
    stated, truncate = rope.pop("attention_factor", None), rope.pop("truncate", True)
    unknown = sorted(rope.keys() - _YARN.keys())
    if kind != "yarn" or unknown or truncate is not True:
        raise InputError(
            f"config.json's RoPE of type {kind!r} with {unknown or rope} is not built; default and yarn are"
        )
    for needed in ("factor", "original_max_position_embeddings"):
        if rope.get(needed) is None:
            raise InputError(f"config.json's YaRN has no {needed}")
    if (rope.get("mscale") is None) != (rope.get("mscale_all_dim") is None):
        raise InputError("config.json's YaRN has one of mscale and mscale_all_dim: transformers and vLLM differ then")
    if rope.get("mscale") is None:
        rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    values = {ours: _typed(theirs, rope[theirs], _HINTS[ours]) for theirs, ours in _YARN.items() if theirs in rope}
    if values["rope_scaling_factor"] <= 1:
        raise InputError(f"config.json's YaRN has factor={values['rope_scaling_factor']}, which must be above 1")
    model = dataclasses.replace(Model(), **values)
    ours = _attention_factor(model)
    theirs = _transformers_attention_factor(model) if stated is None else _typed("attention_factor", stated, float)
    if not math.isclose(theirs, ours, rel_tol=1e-12):
        raise InputError(
            f"config.json's YaRN makes transformers multiply cos and sin by {theirs}, while mscale and mscale_all_dim "
            f"mean {ours}: they must agree"
        )
    return {"rope_theta": theta, **values}


def _rope_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    fields = config.get(name) or {}
    if not isinstance(fields, Mapping):
        raise InputError(f"config.json has {name}={fields!r}, which is not an object")
    fields = dict(fields)
    kind = fields.pop("type", None)
    if kind is not None:
        fields.setdefault("rope_type", kind)
    return fields


def _without_unused_experts(m: Model) -> Model:
    """A model whose every layer is dense has no experts, whatever their number says."""
    layers, deep = m.num_layers, m.num_layers + m.num_nextn_predict_layers
    if m.n_routed_experts and m.first_k_dense_replace < layers:
        return m
    if m.first_k_dense_replace < deep and m.n_routed_experts:
        raise InputError(
            f"config.json has first_k_dense_replace={m.first_k_dense_replace} of {layers} layers and "
            f"{m.num_nextn_predict_layers} MTP layers: MTP layers with experts after dense layers only are not built"
        )
    return dataclasses.replace(m, n_routed_experts=0, first_k_dense_replace=layers)
