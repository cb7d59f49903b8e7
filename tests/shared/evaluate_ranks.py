"""What tests/evaluate runs in a process of its own: functions of `parallel.workers.Workers`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from perilune.moe.decode import Decoder
from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint
from perilune.pretrain import config as configs
from perilune.pretrain import model as models
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.stream import valid_batches
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate import choices, likelihood, validation
from perilune.pretrain.evaluate.generate import Continuation, generate
from perilune.pretrain.evaluate.load import Loaded, open_model
from perilune.pretrain.evaluate.prompts import encode_prompts
from perilune.pretrain.hf import ours
from perilune.pretrain.objective import next_token
from perilune.pretrain.schema import Config
from perilune.pretrain.step import evaluate


def _open(path: Path) -> Loaded:
    meshes.start(meshes.Mesh(1))
    return open_model(path)


def continuations(
    path: Path, prompts: Sequence[Sequence[int]], new: int, eos_ids: Sequence[int] = ()
) -> list[Continuation]:
    """Greedy, on the model at `path`."""
    return generate(_open(path).net, prompts, new, eos_ids=eos_ids)


def router(path: Path, prompts: list[list[int]], new: int) -> tuple[torch.Tensor, list[Continuation]]:
    """The router of the first expert layer as the model holds it, and what it continues the prompts with."""
    net = _open(path).net
    return net.decoder.layers[1].mlp.router.weight.detach(), generate(net, prompts, new)


def sampled(path: Path, prompts: Sequence[Sequence[int]], seed: int) -> list[Continuation]:
    """Twelve tokens drawn."""
    return generate(_open(path).net, prompts, 12, temperature=0.8, top_p=0.9, seed=seed)


def cached_and_recomputed(path: Path, rows: list[list[int]], prompt: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits [B, steps, V] of rows of one length, from the cache after `prompt` tokens, and from whole forwards.

    Last, how many numbers the cache keeps of a token.
    """
    loaded = _open(path)
    decoder = Decoder(loaded.net)
    steps = len(rows[0]) - prompt
    logits, cache = decoder.prefill([row[:prompt] for row in rows], len(rows[0]))
    cached = [logits]
    for at in range(prompt, prompt + steps):
        cached.append(decoder.step(torch.tensor([row[at] for row in rows]), cache))
    whole = torch.stack([ours.forward(loaded.net, loaded.model, row)[0, prompt - 1 :] for row in rows])
    return torch.stack(cached, dim=1), whole, cache.numbers_per_token


def ragged_against_alone(path: Path, rows: list[list[int]], steps: int) -> float:
    """The largest difference of logits between prompts of unlike length decoded together and one by one."""
    decoder = Decoder(_open(path).net)

    def logits(some: list[list[int]]) -> torch.Tensor:
        out, cache = decoder.prefill([row[:-steps] for row in some], max(map(len, some)))
        outs = [out]
        for at in range(-steps, 0):
            outs.append(decoder.step(torch.tensor([row[at] for row in some]), cache))
        return torch.stack(outs, dim=1)

    return float((logits(rows) - torch.cat([logits([row]) for row in rows])).abs().max())


def log_likelihoods(path: Path, rows: list[list[int]], tokens: int) -> list[torch.Tensor]:
    """`likelihood.log_likelihoods`, in forward passes of `tokens` tokens."""
    loaded = _open(path)
    before, likelihood.FORWARD_TOKENS = likelihood.FORWARD_TOKENS, tokens
    try:
        return list(likelihood.log_likelihoods(loaded.net, rows))
    finally:
        likelihood.FORWARD_TOKENS = before


def scores(path: Path, questions: list[choices.Question]) -> list[list[float]]:
    """`choices.choose`."""
    return choices.choose(_open(path), questions)


def make_run(run: Path, config: Config) -> tuple[float, float]:
    """A run of random weights with a checkpoint; returns what training would log as its (valid loss, bits a byte)."""
    mesh = meshes.Mesh(1)
    meshes.start(mesh)
    net = models.build(config, mesh)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in net.bare()[0].parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    state = {"step": 7, "data": {}}
    checkpoint.save(run / "checkpoints", 7, net, None, state, config=config, keep=0)
    configs.save(config, run / "config.yaml")
    batches = valid_batches(
        PackedDataset(str(config.valid.path)),
        dp_rank=0,
        dp_size=1,
        micro_batch_size=3,
        depth=config.model.num_nextn_predict_layers,
        document_mask=config.data.document_mask,
    )
    return evaluate(net, batches, next_token)[:2]


def validated(path: Path, data: Path, document_mask: bool, max_rows: int) -> validation.Validation:
    """`validation.validate` on the model at `path`."""
    loaded = _open(path)
    check = functools.partial(validation.validate, vocab_size=loaded.model.vocab_size, document_mask=document_mask)
    return check(loaded.net, data, max_rows=max_rows)


def refusals(path: Path, data: Path) -> list[str]:
    """What the model at `path`, with a tokenizer, says to too long or empty texts, and to data of another tokenizer."""
    loaded = _open(path)
    long = "Moon " * loaded.model.max_position_embeddings
    actions: list[Callable[[], object]] = [
        lambda: choices.choose(loaded, [choices.Question("f:1", "t", long, ("a", "b"), 0)]),
        lambda: encode_prompts(loaded, ["The Moon"], loaded.model.max_position_embeddings),
        lambda: encode_prompts(loaded, [""], 1),
        lambda: encode_prompts(loaded, ["The \udcff"], 1),
        lambda: validation.validate(loaded.net, data, vocab_size=400, tokenizer_fingerprint="another"),
        lambda: validation.validate(loaded.net, data, vocab_size=300),
        lambda: open_model(path.parent),
    ]
    said = []
    for action in actions:
        try:
            action()
        except InputError as error:
            said.append(str(error))
    return said
