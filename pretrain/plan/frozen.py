"""FLOPs of training where parts of the model are frozen (`train.freeze`).

A matmul with a weight is done three times: forward, for the gradient of its input, for that of its weight. A frozen
weight has no gradient, and its input's is wanted only where something trainable lies before it. Attention's products
of two activations cost two more times as much as soon as anything is to have a gradient there. Images go through tower
and projector into the language model. As elsewhere, the gradient of what goes into the first trainable matmul is
counted, though nobody computes it (patches have none).
"""

from __future__ import annotations

from dataclasses import dataclass

from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.vision_counts import ImageFlops, image_flops
from perilune.pretrain.schema import Config


@dataclass(frozen=True)
class TrainingFlops:
    """Forward and backward, nothing recomputed."""

    token: float  # of the language model, in a row of `data.seq_len`
    image: ImageFlops  # of tower and projector; its `forward` gives the whole training of an image


def training_flops(config: Config) -> TrainingFlops:
    """Of a run with its frozen parts; what images are compared with (`contrastive`) is not in it."""
    frozen, vision, text = config.train.freeze, config.vision, config.model.hidden_size
    tower, projector = "vision_tower" not in frozen, "multi_modal_projector" not in frozen
    decoder = flops_per_token(config.model, config.data.seq_len)
    seen = tower or projector if vision.num_layers else False
    matmuls, products = _times("language_model" not in frozen, seen)
    token = matmuls * (decoder.forward - decoder.attention_scores) + products * decoder.attention_scores
    images = image_flops(vision, text)
    of_tower, of_attention = _times(tower, False)
    of_projector, _ = _times(projector, tower)
    # A cell's two matmuls, shared by its patches.
    patch = 2.0 * vision.hidden_size * (vision.merge_size**2 * vision.hidden_size + text) if vision.num_layers else 0.0
    return TrainingFlops(
        token, ImageFlops(of_tower * (images.patch - patch) + of_projector * patch, of_attention * images.square)
    )


def _times(trains: bool, before: bool) -> tuple[int, int]:
    """How many forwards the training of a part is: of its matmuls with weights, and of products of activations."""
    if trains:
        return 3, 3
    return (2, 3) if before else (1, 1)
