"""Random models in Hugging Face folders, transformers' view of them, a tokenizer and a packed dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import save_file

from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.hf.config import config_to_hf
from perilune.pretrain.schema import Model

TINY = Model(
    num_layers=3, hidden_size=32, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=48, first_k_dense_replace=1, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.7,
    num_nextn_predict_layers=0, vocab_size=400, max_position_embeddings=128,
)  # fmt: skip
MODELS = {
    "plain": TINY,
    "q_lora_rank None": replace(TINY, q_lora_rank=None),
    "groups, K/M=2": replace(TINY, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
    "MTP 1": replace(TINY, num_nextn_predict_layers=1),
    "YaRN": replace(TINY, rope_scaling_factor=4.0, original_max_position_embeddings=16, mscale_all_dim=0.7,
                    mscale=0.7, beta_fast=8.0),
    "odd sizes": replace(TINY, hidden_size=27, num_attention_heads=3, q_lora_rank=13, kv_lora_rank=11,
                         qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7, n_routed_experts=5,
                         num_experts_per_tok=3, moe_intermediate_size=9, n_shared_experts=2, vocab_size=301),
}  # fmt: skip

SEQ_LEN = 64
# A file of lines and two folders of files.
CORPUS = {
    "lines.jsonl": "".join(
        json.dumps({"text": f"{n} moons, {n * n} craters\n" * (n % 7 + 1)}) + "\n" for n in range(60)
    ),
    "code/a.py": "def perilune(a: float, e: float) -> float:\n    return a * (1.0 - e)\n" * 20,
    "code/b.py": "for e in (0.0, 0.1):\n    print(perilune(1848.0, e))\n" * 15,
    "prose/c.md": "The Moon's nearest point is called the perilune, naïve 漢字 🙂.\n" * 25,
}


def save_hf(folder: Path, model: Model, seed: int = 1) -> Path:
    """A folder as `perilune export` would lay it out, from weights drawn by the reference."""
    weights = reference.init_weights(model, seed)
    for depth in range(model.num_nextn_predict_layers):
        layer = f"model.layers.{model.num_layers + depth}"
        weights[f"{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"{layer}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = config_to_hf(model, dtype="float32", bos=None, eos=None, pad=None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of MODELS by name."""
    root, made = tmp_path_factory.mktemp("hf"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_hf(root / str(len(made)), MODELS[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def models() -> dict[str, Model]:
    return MODELS


@pytest.fixture(scope="session")
def transformers_model() -> Callable[[Path], Any]:
    """transformers' own model of a folder, in fp32; it leaves MTP layers out."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    def load(folder: Path) -> Any:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            net = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        finally:
            logging.set_verbosity(level)
            logging.enable_progress_bar()
        return net.eval()

    return load


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train_tokenizer([str(corpus)], tmp_path_factory.mktemp("tokenizer") / "tok", 400)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in CORPUS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_path: Path) -> Path:
    out = tmp_path_factory.mktemp("packed") / "valid"
    pack([str(corpus)], out, tokenizer_path, SEQ_LEN)
    return out
