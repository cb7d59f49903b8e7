"""Images beside texts, by the features of a model that was trained to compare them: retrieval and zero-shot classes.

The pairs are the dataset's images with their captions (`evaluate/captions.py`). Equal captions are one text that
belongs to several images: any of them is a right answer to it.

N images, M texts, C classes, P prompts, D feature dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perilune.parallel import mesh as meshes
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate.asked import Class
from perilune.pretrain.evaluate.captions import AT_ONCE, Caption, picture_of
from perilune.pretrain.evaluate.likelihood import FORWARD_TOKENS, check_finite
from perilune.pretrain.evaluate.load import Loaded
from perilune.pretrain.evaluate.prompts import Picture, shown
from perilune.vision.image_header import ImageRule
from perilune.vision.images import cut
from perilune.vision.retrieval import class_features, places
from perilune.vision.vlm import VisionLanguageModel

AT = (1, 5, 10)


@dataclass(frozen=True)
class Features:
    """Of a dataset: each image's feature, each text's, and which text is the image's."""

    images_ND: torch.Tensor
    texts_MD: torch.Tensor
    text_of_N: torch.Tensor  # int64
    texts: tuple[str, ...]  # M of them


def comparing(loaded: Loaded) -> VisionLanguageModel | None:
    """The model, if it was trained to compare images with texts."""
    net = loaded.net
    return net if isinstance(net, VisionLanguageModel) and hasattr(net, "contrastive") else None


def features(
    loaded: Loaded,
    dataset: PackedDataset,
    captions: Sequence[Caption],
    rule: ImageRule,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Of the images and texts of `captions`, at least one; a text has the tokens that it has where it first stands.

    Raises DamageError for an image that is not as it was packed, InputError for features that are not finite.
    """
    number: dict[str, int] = {}
    tokens: list[list[int]] = []
    pictures = []
    images: list[torch.Tensor] = []
    for done, caption in enumerate(captions, start=1):
        row = dataset[caption.row]
        image = picture_of(dataset, row, caption.row, caption.image, rule)
        pictures.append(Picture(cut(image, rule), rule.grid(*image.size)))
        if caption.text not in number:
            number[caption.text] = len(tokens)
            tokens.append(row.tokens[caption.start : caption.end].tolist())
        held = sum(len(picture.patches) for picture in pictures)
        if len(pictures) == AT_ONCE or held >= rule.merge_size**2 * FORWARD_TOKENS or done == len(captions):
            images.append(_image_features(loaded, pictures))
            pictures = []
            progress(done, len(captions))
    text_of_N = torch.tensor([number[caption.text] for caption in captions])
    found = Features(torch.cat(images), text_features(loaded, tokens), text_of_N, tuple(number))
    check_finite(found.images_ND, "features of images")
    check_finite(found.texts_MD, "features of texts")
    return found


@torch.no_grad()
def _image_features(loaded: Loaded, pictures: Sequence[Picture]) -> torch.Tensor:
    net = comparing(loaded)
    assert net is not None
    return net.image_features(shown(pictures, [], 1).to(meshes.device())).float().cpu()


@torch.no_grad()
def text_features(loaded: Loaded, texts: Iterable[Sequence[int]]) -> torch.Tensor:
    """[texts, D] float32 of texts of one token or more."""
    net = comparing(loaded)
    assert net is not None
    device, found = meshes.device(), []
    for group in _groups(texts):
        ends = torch.tensor([0, *map(len, group)]).cumsum(0).to(torch.int32)
        flat = torch.tensor([token for text in group for token in text])
        found.append(net.text_features(flat.to(device), ends.to(device)).float().cpu())
    return torch.cat(found)


def _groups(texts: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > FORWARD_TOKENS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def retrieval(found: Features) -> dict[str, Any]:
    """Recall@k both ways, plain JSON: the part of queries with a right answer among the first k."""
    text_M = torch.arange(len(found.texts))
    ways = {
        "image_to_text": places(found.images_ND, found.texts_MD, found.text_of_N, text_M),
        "text_to_image": places(found.texts_MD, found.images_ND, text_M, found.text_of_N),
    }
    recalls = {name: {str(k): _within(places_Q, k) for k in AT} for name, places_Q in ways.items()}
    return {"images": len(found.images_ND), "texts": len(found.texts), **recalls}


def zero_shot(loaded: Loaded, found: Features, classes: Sequence[Class] = ()) -> dict[str, Any]:
    """Top-1 and top-5 accuracy of images among `classes`, or without any among the distinct captions; plain JSON.

    Images whose caption is no class's label are left out. Raises InputError where that leaves none.
    """
    labels = [one.label for one in classes] or list(found.texts)
    class_of = {label: number for number, label in enumerate(labels)}
    label_N = torch.tensor([class_of.get(found.texts[text], -1) for text in found.text_of_N.tolist()])
    kept_N = label_N >= 0
    if not bool(kept_N.any()):
        raise InputError(
            f"--classes: none of the {len(label_N)} images has one of the {len(labels)} labels as its caption, such as "
            f"{found.texts[0][:60]!r}"
        )
    if classes:
        text = loaded.need_text()
        prompts = [(number, prompt) for number, one in enumerate(classes) for prompt in one.prompts]
        encoded = text.tokenizer.encode_batch([prompt for _, prompt in prompts])
        prompts_PD = text_features(loaded, ([*ids.tolist(), text.tokenizer.eos_id] for ids in encoded))
        class_P = torch.tensor([number for number, _ in prompts])
    else:
        prompts_PD, class_P = found.texts_MD, torch.arange(len(labels))
    classes_CD = class_features(prompts_PD, class_P, len(labels))
    places_N = places(found.images_ND[kept_N], classes_CD, label_N[kept_N], torch.arange(len(labels)))
    return {
        "classes": len(labels),
        "images": int(kept_N.sum()),
        "left_out": int((~kept_N).sum()),
        "accuracy": {str(k): _within(places_N, k) for k in AT[:2]},
    }


def _within(places_Q: torch.Tensor, k: int) -> float:
    return float((places_Q <= k).double().mean())
