"""Generation: the same tokens as transformers, and the cache against recomputing everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate_ranks as ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

from perilune.parallel.workers import Workers
from perilune.pretrain.evaluate.generate import probabilities

NEW = 20
PROMPTS = [[7, 250, 31, 4, 199, 88, 12], [5], list(range(20, 60, 2))]
NAMES = ["plain", "q_lora_rank None", "groups, K/M=2", "MTP 1", "YaRN", "odd sizes"]
Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def theirs(hf: Folder, transformers_model: Callable[[Path], Any]) -> Callable[..., list[list[int]]]:
    """transformers' greedy continuation of each prompt, one after the other."""

    def generate(name: str, prompts: list[list[int]], **more: Any) -> list[list[int]]:
        net = transformers_model(hf(name))
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **more)
            rows.append(out[0, len(prompt) :].tolist())
        return rows

    return generate


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name: str, hf: Folder, workers: Workers, theirs: Any) -> None:
    """Prompts of unlike length in one batch, against transformers one by one."""
    ours = workers.run(1, ranks.continuations, hf(name), PROMPTS, NEW)[0]
    assert [list(one.tokens) for one in ours] == theirs(name, PROMPTS)
    assert not any(one.ended for one in ours)
    assert len({token for one in ours for token in one.tokens}) > NEW // 2  # not one token over and over


def test_stops_at_eos_as_transformers(hf: Folder, workers: Workers, theirs: Any) -> None:
    free = theirs("plain", PROMPTS)
    eos = [free[0][6], free[2][11]]
    ours = workers.run(1, ranks.continuations, hf("plain"), PROMPTS, NEW, eos)[0]
    assert [list(one.tokens) for one in ours] == theirs("plain", PROMPTS, eos_token_id=eos, pad_token_id=eos[0])
    assert [one.ended for one in ours] == [any(token in eos for token in row) for row in free]
    assert ours[0].ended and len(ours[0].tokens) <= 7


@pytest.mark.parametrize("name", ["plain", "q_lora_rank None", "YaRN"])
def test_cache_equals_recomputation(name: str, hf: Folder, workers: Workers) -> None:
    rows = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(2)).tolist()
    cached, whole, kept = workers.run(1, ranks.cached_and_recomputed, hf(name), rows, 8)[0]
    assert cached.shape == whole.shape == (3, 33, 400)
    assert float((cached - whole).abs().max()) < 5e-5
    assert kept == 3 * (16 + 8)  # layers x (kv_lora_rank + qk_rope_head_dim), whatever the heads


def test_unlike_lengths_do_not_touch_each_other(hf: Folder, workers: Workers) -> None:
    rows = [list(range(3, 3 + n)) for n in (9, 30, 17)]
    assert workers.run(1, ranks.ragged_against_alone, hf("plain"), rows, 6)[0] < 5e-5


def test_sampling_repeats_by_seed(hf: Folder, workers: Workers) -> None:
    def sample(seed: int, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
        found = workers.run(1, ranks.sampled, hf("plain"), prompts, seed)[0]
        return [one.tokens for one in found]

    first = sample(3)
    assert first == sample(3) and first != sample(4)
    assert first[0] == sample(3, PROMPTS[:1])[0]  # whatever else is in the batch


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (1.5, 0.3), (1.0, 1e-6)])
def test_probabilities_equal_transformers(temperature: float, top_p: float) -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)
    torch.testing.assert_close(probabilities(logits, temperature, top_p), expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(probabilities(logits, temperature, 1.0), torch.eye(50)[logits.argmax(-1)])


def test_routers_in_fp32_beside_bf16_stay_so(hf: Folder, workers: Workers, tmp_path: Path) -> None:
    tensors = load_file(hf("plain") / "model.safetensors")
    tensors = {name: t if ".mlp.gate." in name else t.bfloat16() for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((hf("plain") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")))
    weight, continued = workers.run(1, ranks.router, tmp_path, PROMPTS, NEW)[0]
    assert torch.equal(weight, tensors["model.layers.1.mlp.gate.weight"]) and weight.dtype is torch.float32
    assert [len(one.tokens) for one in continued] == [NEW] * len(PROMPTS)
