"""config.json and preprocessor_config.json of a model with a tower: Kimi-VL's (`kimi_vl`) or Kimi-K2.5's (`kimi_k25`).

Kimi-VL's are those that its published code, vLLM and SGLang read. Of Kimi-K2.5, whose tower reads a single frame as
Kimi-VL's does, transformers' own classes read one set of keys and the published code another: both are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Vision

ARCHITECTURES = {"kimi_vl": "KimiVLForConditionalGeneration", "kimi_k25": "Kimi_K25ForConditionalGeneration"}
_MEAN = [0.5, 0.5, 0.5]  # and standard deviation, of each colour (perilune.vision.images)


@dataclass(frozen=True)
class Media:
    """Ids of an image's placeholder and of the tokens around it (Kimi-VL's); None where they are not known."""

    pad: int
    start: int | None = None
    end: int | None = None


def with_vision(text: dict[str, Any], vision: Vision, names: str, media: Media | None) -> dict[str, Any]:
    """config.json in the format `names`, of the decoder's own `text` and a tower.

    Raises InputError for a tower that the format's readers would compute otherwise, or without the tokens of images.
    """
    for reason in _not_expressible(vision, names):
        raise InputError(f"this model cannot be written as {names}: {reason}")
    if media is None:
        raise InputError(
            f"this model cannot be written as {names}: the id of the placeholder of images is not known without the "
            "tokenizer of its data; put the packed dataset and its tokenizer where data.path says"
        )
    special = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")}
    common = {
        "architectures": [ARCHITECTURES[names]],
        "model_type": names,
        "text_config": text,
        "media_placeholder_token_id": media.pad,
        "ignore_index": -100,
        "tie_word_embeddings": False,
        **special,
    }
    merge = [vision.merge_size, vision.merge_size]
    sizes = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_attention_heads": vision.num_attention_heads,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
        "merge_kernel_size": merge,
    }
    table = {"height": vision.pos_emb_height, "width": vision.pos_emb_width}
    if names == "kimi_vl":
        positions = {f"init_pos_emb_{side}": size for side, size in table.items()}
        return common | {"vision_config": {"model_type": "moonvit", **sizes, **positions}}
    published = {f"vt_{name}": sizes[name] for name in list(sizes)[:4]}
    return common | {
        "vision_config": {
            "model_type": "kimi_k25_vision",
            **sizes,
            **{f"pos_emb_{side}": size for side, size in table.items()},
            **{f"init_pos_emb_{side}": size for side, size in table.items()},
            **published,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            "mm_hidden_size": vision.hidden_size,
            "text_hidden_size": text["hidden_size"],
            "projector_ln_eps": vision.layer_norm_eps,
        },
        "projection_hidden_size": vision.hidden_size,
        "projection_layer_norm_eps": vision.layer_norm_eps,
        "image_token_id": media.pad,
        **{
            f"vision_{mark}_token_id": number
            for mark, number in (("start", media.start), ("end", media.end))
            if number is not None
        },
        "video_token_id": text["vocab_size"],  # none: beyond the vocabulary
    }


def without_vision(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Vision, str, Media] | None:
    """(the decoder's config.json, the tower, the format, ids) of such a config.json; None of another kind.

    Raises InputError for a field that is absent or of another type, or for what our tower does not compute.
    """
    names = raw.get("model_type")
    if not isinstance(names, str) or names not in ARCHITECTURES:
        return None
    text, tower = raw.get("text_config"), raw.get("vision_config")
    if not isinstance(text, Mapping) or not isinstance(tower, Mapping):
        raise InputError(f"config.json is of model_type {names!r} and has no text_config and vision_config")

    def number(*keys: str) -> int:
        for key in keys:
            value = tower.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise InputError(f"config.json's vision_config has no {keys[0]} that is a number above 0")

    merge = tower.get("merge_kernel_size", [2, 2])
    if merge != [2, 2]:
        raise InputError(f"config.json has merge_kernel_size={merge!r}; 2 x 2 patches are merged here")
    rope = tower.get("rope_parameters") or {}
    theta = rope.get("rope_theta", Vision.rope_theta) if isinstance(rope, Mapping) else rope
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise InputError(f"config.json's vision_config has rope_parameters={rope!r}; rope_theta is a number above 0")
    vision = Vision(
        num_layers=number("num_hidden_layers", "vt_num_hidden_layers"),
        hidden_size=number("hidden_size", "vt_hidden_size"),
        num_attention_heads=number("num_attention_heads", "vt_num_attention_heads"),
        intermediate_size=number("intermediate_size", "vt_intermediate_size"),
        patch_size=number("patch_size"),
        pos_emb_height=number("init_pos_emb_height", "pos_emb_height"),
        pos_emb_width=number("init_pos_emb_width", "pos_emb_width"),
        rope_theta=float(theta),
    )
    pad = raw.get("media_placeholder_token_id", raw.get("image_token_id"))
    if not isinstance(pad, int):
        raise InputError("config.json has no media_placeholder_token_id, the token that stands for images")
    media = Media(pad, raw.get("vision_start_token_id"), raw.get("vision_end_token_id"))
    kind = {"model_type": "deepseek_v3"} if text.get("model_type") == "kimi_k2" else {}
    types = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    return {**text, "architectures": None, **kind, **types}, vision, names, media


def patch_limit_of(raw: Mapping[str, Any]) -> int:
    """Patches above which a preprocessor_config.json has images scaled down. Raises InputError where it says none.

    Kimi-K2.5's published one has them below `media_proc_cfg`.
    """
    inner = raw.get("media_proc_cfg")
    fields = {**raw, **(inner if isinstance(inner, Mapping) else {})}
    limit = fields.get("in_token_limit", fields.get("in_patch_limit", fields.get("max_patches")))
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(f"preprocessor_config.json has no limit of patches (in_token_limit, max_patches): {limit!r}")
    return limit


def _not_expressible(v: Vision, names: str) -> Iterator[str]:
    if v.layer_norm_eps != 1e-5:
        yield f"vision.layer_norm_eps={v.layer_norm_eps}, and its readers compute with 1e-05 whatever config.json says"
    if names == "kimi_vl" and v.rope_theta != 10000.0:
        yield f"vision.rope_theta={v.rope_theta}, and its readers turn by 10000 whatever config.json says"
    if names == "kimi_k25" and v.pos_emb_height != v.pos_emb_width:
        yield (
            f"a table of vision.pos_emb_height={v.pos_emb_height} x vision.pos_emb_width={v.pos_emb_width} positions, "
            "and transformers interpolates square ones"
        )


def preprocessor(names: str, vision: Vision, patch_limit: int) -> dict[str, Any]:
    """preprocessor_config.json: how the format's own processor makes the patches that this model was trained on.

    Transparency differs: it is laid over white here, which those processors leave to the caller.
    """
    common = {"patch_size": vision.patch_size, "image_mean": _MEAN, "image_std": _MEAN}
    if names == "kimi_vl":
        return {
            "image_processor_type": "KimiVLImageProcessor",
            **common,
            "pad_input": True,
            "in_token_limit": patch_limit,
            "merge_kernel_size": [vision.merge_size, vision.merge_size],
        }
    return {
        "image_processor_type": "Kimi_K25ImageProcessor",
        **common,
        "merge_size": vision.merge_size,
        "max_patches": patch_limit,
    }
