"""Retrieval and zero-shot classification: against a plain sort, torch's top-k, and cases to be seen by eye."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_ranks import Memory

from perilune.vision import contrastive
from perilune.vision.retrieval import Retrieval, class_features, places, retrieval, zero_shot


def directions(*degrees: float) -> torch.Tensor:
    """[len, 2] of various lengths: cosines are those of the differences."""
    radians = [math.radians(degree) for degree in degrees]
    return torch.tensor([[math.cos(a) * (i + 1), math.sin(a) * (i + 1)] for i, a in enumerate(radians)])


def by_sorting(queries: torch.Tensor, keys: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor) -> list[int]:
    """Each query's keys in a list, the better before, the wrong before the right where they are equal."""
    cosines = F.cosine_similarity(queries.double()[:, None], keys.double()[None], dim=-1).round(decimals=9)
    found = []
    for row, wanted in zip(cosines.tolist(), query_ids.tolist(), strict=True):
        order = sorted((-cosine, key == wanted) for cosine, key in zip(row, key_ids.tolist(), strict=True))
        found.append(1 + [right for _, right in order].index(True))
    return found


def random_captions(images: int, texts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, texts that resemble them a little, and whose they are: each image has one at least, in no order."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat((torch.arange(images), torch.randint(images, (texts - images,), generator=generator)))
    owners = owners[torch.randperm(texts, generator=generator)]
    pictures = torch.randn(images, 8, generator=generator)
    return pictures, pictures[owners] + 1.5 * torch.randn(texts, 8, generator=generator), owners


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize("images, texts", [(1, 1), (13, 13), (13, 40)])
def test_places_equal_a_plain_sort(images: int, texts: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", block)
    pictures, captions, owners = random_captions(images, texts, seed=texts)
    captions[::3] = captions[0].clone()  # the same words for several images
    ids = torch.arange(images)
    assert places(pictures, captions, ids, owners).tolist() == by_sorting(pictures, captions, ids, owners)
    assert places(captions, pictures, owners, ids).tolist() == by_sorting(captions, pictures, owners, ids)


def test_recall_equals_torchs_top_k() -> None:
    pictures, captions, owners = random_captions(30, 90, seed=1)
    cosines = F.normalize(pictures) @ F.normalize(captions).T
    found = retrieval(pictures, captions, owners)
    assert list(found.image_to_text) == list(found.text_to_image) == [1, 5, 10]
    for k in (1, 5, 10):
        texts = owners[cosines.topk(k, dim=1).indices]
        assert found.image_to_text[k] == pytest.approx(
            float((texts == torch.arange(30)[:, None]).any(1).double().mean())
        )
        images = cosines.T.topk(k, dim=1).indices
        assert found.text_to_image[k] == pytest.approx(float((images == owners[:, None]).any(1).double().mean()))
    assert 0 < found.image_to_text[1] < found.image_to_text[10] and found.text_to_image[1] < found.text_to_image[10]


def test_retrieval_by_eye() -> None:
    """Image 0 at 0 degrees has texts at 10 and 170, image 1 at 90 degrees has one at 30."""
    images, texts = directions(0, 90), directions(10, 170, 30)
    found = retrieval(images, texts, torch.tensor([0, 0, 1]), at=(1, 2))
    # Image 1 lies 80, 80 and 60 from the texts, its own nearest; these lie 10|80, 170|80 and 30|60 from the images.
    assert found == Retrieval(image_to_text={1: 1.0, 2: 1.0}, text_to_image={1: 1 / 3, 2: 1.0})


@pytest.mark.parametrize("size", [2, 7, 16, 33, 100])
def test_features_that_tell_nothing_apart_find_nothing(size: int) -> None:
    """Neither where rounding has left some of them a little better than others."""
    generator = torch.Generator().manual_seed(size)
    for width in (3, 64, 1152):
        same = torch.randn(width, generator=generator) * (1 + 1e-7 * torch.randn(size, width, generator=generator))
        found = places(same, same, torch.arange(size), torch.arange(size))
        assert found.tolist() == [size] * size
    twice = torch.arange(size) // 2
    assert places(same, same, twice, twice)[0] == size - 1  # the other right one is not in its way


def test_what_is_not_a_number_finds_nothing() -> None:
    images, texts = directions(0, 60, 120), directions(0, 60, 120)
    images[1] = math.nan
    assert places(images, texts, torch.arange(3), torch.arange(3)).tolist() == [1, 3, 1]
    assert places(texts, images, torch.arange(3), torch.arange(3)).tolist() == [2, 3, 2]


def test_zero_shot_by_eye() -> None:
    """Classes at 0, 90 and 180 degrees; the last image, at 100, is of class 0: third best."""
    classes = directions(0, 90, 180)
    images, labels = directions(-20, 80, 200, 100), torch.tensor([0, 1, 2, 0])
    assert zero_shot(images, classes, labels, at=(1, 2, 3)) == {1: 0.75, 2: 0.75, 3: 1.0}
    assert zero_shot(images, classes, labels) == {1: 0.75}


def test_a_class_is_the_mean_of_its_prompts_directions() -> None:
    """Whatever their lengths."""
    prompts = directions(0, 200, 60, 220)
    found = class_features(prompts, torch.tensor([1, 0, 1, 0]), 2)
    torch.testing.assert_close(found, F.normalize(directions(210, 30)))
    for named, classes in (([0, 0, 2, 2], 3), ([0, 1, 2, 2], 2)):
        with pytest.raises(ValueError, match=f"each of the {classes} from 0 on needs one"):
            class_features(prompts, torch.tensor(named), classes)


def test_what_cannot_be_found_is_refused() -> None:
    images, texts = directions(0, 90), directions(0, 90, 45)
    with pytest.raises(ValueError, match=r"1 of 2 queries have no right answer among 3 keys.*query 1 with id 1"):
        retrieval(images, texts, torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match=r"1 of 3 queries .* query 2 with id 5"):
        retrieval(images, texts, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="must be"):
        retrieval(images, texts, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="0 queries"):
        zero_shot(images[:0], texts, torch.zeros(0, dtype=torch.int64))


def test_cosines_are_never_held_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", 400)
    pictures, captions, owners = random_captions(200, 400, seed=0)
    with Memory() as seen:
        retrieval(pictures, captions, owners)
    assert seen.largest == captions.numel()
