"""What goes beside the tensors: the tokenizer of the run's data, generation_config.json, and the model card.

The card says what the checkpoint knows and, where it lies in its run, what that measured at its step; no more.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perilune.pretrain.data.manifest import image_rule, read_manifest
from perilune.pretrain.data.tokenizer import load_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.config import ARCHITECTURE
from perilune.pretrain.hf.config_vision import ARCHITECTURES, Media
from perilune.pretrain.hf.folder import read_json, write_text
from perilune.pretrain.hf.source import Checkpoint
from perilune.vision.image_header import ImageRule

# Data only: a tokenizer that needs its own Python file is not copied.
_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja vocab.json "
    "merges.txt tokenizer.model"
).split()


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to copy and the special ids; `missing` says why there are none."""

    files: tuple[Path, ...] = ()
    ids: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(("bos", "eos", "pad")))
    media: Media | None = None  # of images, where the vocabulary has them
    missing: str = ""

    def copy_to(self, folder: Path) -> None:
        for file in self.files:
            with open(file, "rb") as source, open(folder / file.name, "xb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())


def tokenizer_of(checkpoint: Checkpoint) -> TokenizerFiles:
    """The tokenizer that the run's data was packed with, or that lay beside the imported weights.

    Raises InputError where the data's is there and damaged or another, or one has more tokens than the model.
    """
    data, source = checkpoint.config.data, checkpoint.manifest["run_state"].get("imported_from")
    packed = [path for path in (data.path, *data.blend) if path is not None]
    if packed and not (Path(packed[0]) / "manifest.json").is_file():
        return TokenizerFiles(missing=f"the packed dataset {packed[0]} is not there, and it names the tokenizer")
    if packed:
        named = read_manifest(Path(packed[0]))["tokenizer"]
        path, fingerprint = Path(named["path"]), named["fingerprint"]
    elif source is not None:
        path, fingerprint = Path(source), None
    else:
        return TokenizerFiles(missing="the run names no packed dataset (data.path)")
    if not (path / "tokenizer.json").is_file():
        return TokenizerFiles(missing=f"{path} holds no tokenizer.json")
    try:
        if "auto_map" in read_json(path / "tokenizer_config.json"):
            return TokenizerFiles(missing=f"the one in {path} needs Python code of its own, which is not copied")
        tokenizer = load_tokenizer(path)
    except InputError as error:
        if packed:
            raise
        return TokenizerFiles(missing=str(error))  # of another's weights, which are whole without it
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise InputError(f"{path} is not the tokenizer that {packed[0]} was packed with: its fingerprint differs")
    if tokenizer.vocab_size > checkpoint.config.model.vocab_size:
        raise InputError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model {checkpoint.config.model.vocab_size}"
        )
    files = tuple(path / name for name in _FILES if (path / name).is_file())
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    if tokenizer.media_pad_id is None:
        return TokenizerFiles(files, ids)
    begin, _, end, pad = tokenizer.media_ids()
    return TokenizerFiles(files, ids, Media(pad, begin, end))


def patch_limit(checkpoint: Checkpoint) -> int:
    """Patches above which the images of the run's data were scaled down; Kimi-VL's where the data is not there."""
    data = checkpoint.config.data
    for path in (data.path, *data.blend):
        if path is not None and (Path(path) / "manifest.json").is_file():
            rule = image_rule(read_manifest(Path(path)))
            if rule is not None:
                return rule.patch_limit
    return ImageRule.patch_limit


def generation_config(tokenizer: TokenizerFiles) -> dict[str, Any]:
    """generation_config.json: where to begin and to end; decoding stays transformers' default (greedy)."""
    return {f"{name}_token_id": number for name, number in tokenizer.ids.items() if number is not None}


def write(folder: Path, checkpoint: Checkpoint, target: str, verdict: str | None) -> None:
    """README.md: shape, training and provenance as the checkpoint has them."""
    m, config, manifest = checkpoint.config.model, checkpoint.config, checkpoint.manifest
    run_state = manifest["run_state"]
    parameters = sum(math.prod(t.shape) for t in checkpoint.tensors.values() if t.router or not t.fp32)
    heads = f"{m.num_attention_heads} (MLA, KV latent {m.kv_lora_rank}, query latent {m.q_lora_rank or 'none'})"
    facts = {
        "Architecture": f"`{ARCHITECTURES.get(checkpoint.names, ARCHITECTURE)}`",
        "Parameters": f"{parameters:,} (embedding and head once each, MTP included, router biases not)",
        "Layers": f"{m.num_layers}, the first {m.first_k_dense_replace} dense; then {m.num_nextn_predict_layers} MTP",
        "Hidden size": f"{m.hidden_size:,}",
        "Attention heads": heads,
        "Vocabulary": f"{m.vocab_size:,}",
        "Longest position": f"{m.max_position_embeddings:,}",
        "Tensors": _type_of_tensors(checkpoint, target),
    }
    if v := config.vision.num_layers and config.vision:
        facts["Vision tower"] = (
            f"MoonViT, {v.num_layers} layers, hidden size {v.hidden_size:,}, {v.num_attention_heads} heads, patches of "
            f"{v.patch_size} pixels, {v.merge_size} x {v.merge_size} to a token"
        )
    if m.n_routed_experts:
        facts["Experts"] = (
            f"{m.n_routed_experts} routed, {m.num_experts_per_tok} a token, {m.n_shared_experts} shared; "
            f"{m.topk_group} of {m.n_group} groups"
        )
    if source := run_state.get("imported_from"):
        facts["Weights"] = f"imported from `{Path(source).name}`, not trained since"
    else:
        facts["Preset"] = config.preset
        facts["Steps"] = f"{manifest['step']:,}"
        tokens = (run_state.get("data") or {}).get("tokens")
        facts |= {} if tokens is None else {"Tokens trained": f"{tokens:,}"}
        t, optim = config.train, config.optim
        facts["Batch"] = f"{t.global_batch_size:,} rows of {config.data.seq_len:,} tokens"
        facts["Optimizer"] = f"{optim.name}, peak learning rate {optim.lr:g}, {config.schedule.lr} schedule"
        facts["Trained in"] = config.precision.compute
        if checkpoint.average:  # what the run measured at its step was the last weights'
            facts["Weights"] = f"their exponential moving average, decay {optim.ema_decay:g}"
        else:
            facts |= _measured(checkpoint)
        for path, digest in ((run_state.get("data") or {}).get("fingerprints") or {}).items():
            facts[f"Data `{Path(path).name}`"] = f"fingerprint `{digest}`"
    facts["Checkpoint written by"] = ", ".join(
        f"{name} {version}" for name, version in manifest.get("versions", {}).items()
    )
    if verdict is not None:
        facts["Verified"] = verdict
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    mtp = ""
    if m.num_nextn_predict_layers:
        names = ", ".join(f"`model.layers.{m.num_layers + depth}`" for depth in range(m.num_nextn_predict_layers))
        mtp = (
            f"\nMTP (multi-token prediction) lies in {names}: vLLM and SGLang read it for speculative decoding; "
            "transformers leaves it out and may list it as unexpected.\n"
        )
    task, how = _use(checkpoint.names)
    write_text(
        folder / "README.md",
        f"""---
library_name: transformers
pipeline_tag: {task}
---

# {folder_title(checkpoint)}

| | |
|---|---|
{table}
{mtp}
{how}
""",
    )


def _use(names: str) -> tuple[str, str]:
    """(the hub's name of the task, how the folder is opened)."""
    if names == "kimi_vl":
        said = "vLLM and SGLang read this folder by Kimi-VL's names. transformers has no class for it: export with "
        return "image-text-to-text", said + "`--format kimi_k25` for one that it opens."
    kind = "AutoModelForCausalLM" if names == "deepseek_v3" else "Kimi_K25ForConditionalGeneration"
    code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("this folder", dtype="auto")'
    return "text-generation" if names == "deepseek_v3" else "image-text-to-text", f"```python\n{code}\n```"


def _measured(checkpoint: Checkpoint) -> dict[str, str]:
    """What the run recorded at the checkpoint's step; nothing of one that was moved away from its run."""
    file = None if checkpoint.run_dir is None else checkpoint.run_dir / "metrics.jsonl"
    if file is None or not file.is_file():
        return {}
    with file.open("rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                if entry["step"] != checkpoint.manifest["step"]:
                    continue
                found = {"Training loss": f"{entry['loss']:.4f} nats a token, in the last step"}
                if "valid_bpb" in entry:
                    found["Validation"] = (
                        f"{entry['valid_bpb']:.4f} bits a byte, {entry['valid_loss']:.4f} nats a token"
                    )
                return found
            except (ValueError, KeyError, TypeError):  # a line cut short, a loss that is null: not a fact
                continue
    return {}


def _type_of_tensors(checkpoint: Checkpoint, target: str) -> str:
    """The type, and what became of the weights' own if that is another."""
    own = "float32" if checkpoint.average else checkpoint.dtype()
    if target == own:
        return target
    if target == "bfloat16":
        return f"{target}, rounded from {own}"
    if not checkpoint.has_masters():
        return f"{target}, cast from {own} weights"
    frozen = ", ".join(checkpoint.config.train.freeze)
    return f"{target}, the masters of the {own} weights" + (f"; what was frozen ({frozen}) cast" if frozen else "")


def folder_title(checkpoint: Checkpoint) -> str:
    """The run's folder and the step; its own folder where it was imported or moved."""
    if "imported_from" in checkpoint.manifest["run_state"]:
        return checkpoint.path.resolve().name
    where = checkpoint.run_dir or checkpoint.path.resolve()
    return f"{where.name}, step {checkpoint.manifest['step']:,}"
