"""Text from the model: token after token with the latent cache of `moe/decode.py`, greedy or sampled.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from perilune.moe.backbone import Backbone
from perilune.moe.decode import Decoder
from perilune.pretrain.evaluate.likelihood import check_finite
from perilune.vision.vlm import Images, VisionLanguageModel


@dataclass(frozen=True)
class Continuation:
    """What follows one prompt. `tokens` ends with the EOS that ended it, if one did."""

    tokens: tuple[int, ...]
    ended: bool  # by an EOS; else by max_new_tokens


def generate(
    net: Backbone,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    images: Images | None = None,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Continuation]:
    """Continue each prompt (token ids, one or more) by at most `max_new_tokens` tokens.

    `images` are those of all prompts, with the places of their features in the prompts' tokens end to end, on the
    model's device; they need a model with a tower.

    `temperature` 0 takes the likeliest token. Above 0, logits are divided by it and a token is drawn from the fewest
    likeliest ones whose probability reaches `top_p` (arXiv 1904.09751, section 3.1), with a generator of its own for
    each prompt, seeded by `seed` and the prompt's place: the same numbers give the same text. Raises ValueError for
    numbers outside their ranges, InputError where the model's logits are not finite.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: must be at least 1, at least "
            "0, and in (0, 1]"
        )
    decoder = Decoder(net)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    found: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    logits_BV, cache = decoder.prefill(prompts, max(map(len, prompts)) + max_new_tokens, _given(net, images))
    while True:
        tokens = _pick(logits_BV, temperature, top_p, generators)
        for row, token in enumerate(tokens):
            if not ended[row] and len(found[row]) < max_new_tokens:
                found[row].append(token)
                ended[row] = token in eos_ids
        if all(end or len(row) == max_new_tokens for end, row in zip(ended, found, strict=True)):
            return [Continuation(tuple(row), end) for row, end in zip(found, ended, strict=True)]
        logits_BV = decoder.step(torch.tensor(tokens, device=logits_BV.device), cache)


@torch.no_grad()
def _given(net: Backbone, images: Images | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where the features of the images stand, and what they are."""
    if images is None or not images.places_F.numel():
        return None
    if not isinstance(net, VisionLanguageModel):
        raise ValueError("images for a model without a tower")
    return images.places_F, net.features(images)[images.features_F]


def _pick(logits_BV: torch.Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> list[int]:
    """The next token of each sequence."""
    check_finite(logits_BV, "logits")
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probs_BV = probabilities(logits_BV.cpu(), temperature, top_p)
    return [
        int(torch.multinomial(probs_V, 1, generator=generator))
        for probs_V, generator in zip(probs_BV, generators, strict=True)
    ]


def probabilities(logits_BV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """[B, V] of what is drawn from: zero for tokens outside the fewest likeliest ones that together reach `top_p`."""
    # From the largest on and in fp64: the smallest temperature then makes nothing infinite but what has no chance.
    below_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
    probs_BV = (below_BV / temperature).softmax(-1).float()
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # those before it reach top_p already
        probs_BV = probs_BV.masked_fill(torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), 0.0)
    return probs_BV / probs_BV.sum(-1, keepdim=True)
