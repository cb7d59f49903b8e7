"""How likely the model finds given tokens: the negative log-likelihood of every token after the first of its document.

T tokens of the documents end to end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from perilune.moe.backbone import Backbone, packed_params
from perilune.parallel import mesh as meshes
from perilune.pretrain.errors import InputError
from perilune.vision import vlm

FORWARD_TOKENS = (
    4096  # of a forward pass, at least one document or row; bounds the logits held, FORWARD_TOKENS x V fp32
)


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raises InputError where one of `values`, which a model computed, is not finite: no figure of them says anything,
    and nan compares with nothing, so that a choice among them would be the first."""
    if not bool(values.isfinite().all()):
        raise InputError(
            f"the model's {what} are not finite (nan or infinite): its weights are not, or it overflows. Nothing "
            "can be said of it; try an earlier checkpoint (RUN/checkpoints/step_...)"
        )


@torch.no_grad()
def packed_losses(
    net: Backbone,
    inputs_T: torch.Tensor,
    labels_T: torch.Tensor,
    positions_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    images: vlm.Images | None = None,
) -> torch.Tensor:
    """Cross entropy [T] (nats, fp32) of each label given the tokens of its segment up to its input.

    A model with a tower sees `images` there; None: text alone.
    """
    device = meshes.device()
    lengths = cu_seqlens.diff()
    net.scale.tokens_per_row = inputs_T.numel()
    given = {}
    if isinstance(net, vlm.VisionLanguageModel):
        given["images"] = (images or _no_images(net.vision_tower.vision.patch_size)).to(device)
    losses_1T = net(
        input_ids=inputs_T[None].to(device),
        position_ids=positions_T[None].to(device),
        attention_mask=None,
        labels=labels_T[None].to(device),
        packed_seq_params=packed_params(cu_seqlens.to(device), int(lengths.max())),
        **given,
    )
    return losses_1T[0].float().cpu()


def _no_images(patch_size: int) -> vlm.Images:
    patches = torch.zeros(0, 3, patch_size, patch_size, dtype=torch.uint8)
    return vlm.images_of(patches, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 1)


def log_likelihoods(net: Backbone, documents: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Of each document [n] of token ids: log P(token i | the tokens before it) for i = 1 ... n-1, float64 [n-1].

    Documents, of at least two tokens, are packed end to end and do not see each other. Raises InputError where the
    model gives what is not finite.
    """
    waiting: list[Sequence[int]] = []
    size = 0
    for document in documents:
        if waiting and size + len(document) > FORWARD_TOKENS:
            yield from _forward(net, waiting)
            waiting, size = [], 0
        waiting.append(document)
        size += len(document)
    if waiting:
        yield from _forward(net, waiting)


def _forward(net: Backbone, documents: list[Sequence[int]]) -> Iterator[torch.Tensor]:
    sizes = [len(document) for document in documents]
    if min(sizes) < 2:
        raise ValueError("a document of fewer than two tokens has nothing to predict")
    inputs = torch.tensor([token for document in documents for token in document])
    losses_T = packed_losses(
        net,
        inputs,
        inputs.roll(-1),  # of no meaning at the end of a document, and not read there
        torch.cat([torch.arange(n) for n in sizes]),
        torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
    )
    for losses in losses_T.double().split(sizes):
        check_finite(losses[:-1], "likelihoods")
        yield -losses[:-1]
