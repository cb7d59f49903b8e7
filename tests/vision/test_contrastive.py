"""Contrastive objectives: against the papers' formulas on the full matrix, transformers' losses, and over ranks.

A pairs of the whole batch, B of a rank, D feature dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import contrastive_ranks
import pytest
import torch
import torch.nn.functional as F
from contrastive_ranks import Case, Memory
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from perilune.kernels import cross_entropy
from perilune.parallel.workers import Workers
from perilune.vision import contrastive
from perilune.vision.contrastive import SigmoidScale, Temperature, clip, info_nce, siglip

D = 6
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def features(pairs: int, dtype: torch.dtype = torch.float64, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts that resemble one another a little, of lengths other than 1."""
    generator = torch.Generator().manual_seed(pairs)
    shared, own, other = torch.randn(3, pairs, width, generator=generator, dtype=torch.float64)
    return (2 * shared + own).to(dtype), (shared + 3 * other).to(dtype)


def number(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """[A, A] in float64."""
    images, texts = images.double(), texts.double()
    return (images / images.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T


def clip_formula(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    f = (scale * cosines(images, texts)).exp()
    return -((f.diag() / f.sum(1)).log() + (f.diag() / f.sum(0)).log()).sum() / 2


def siglip_formula(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    signs = 2 * torch.eye(len(images), dtype=torch.float64) - 1
    return (1 + (-signs * (scale * cosines(images, texts) + bias)).exp()).log().sum()


def test_info_nce_is_the_share_of_the_positive_among_all_candidates() -> None:
    """Several queries may have one key, and a key none."""
    queries, keys = features(5)[0].requires_grad_(), features(7)[1].requires_grad_()
    positives = torch.tensor([6, 0, 0, 3, 5])
    f = (queries @ keys.T).exp()
    wanted = -(f[torch.arange(5), positives] / f.sum(1)).log().sum()
    loss, count = info_nce(queries, keys, positives)
    assert int(count) == 5
    torch.testing.assert_close(loss, wanted)
    for found, expected in zip(*(torch.autograd.grad(x, (queries, keys)) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "queries, keys, positives, said",
    [
        ((2, 3), (4, 5), [0, 1], "must be"),
        ((2, 3), (4, 3), [0], "must be"),
        ((2,), (4,), [0, 1], "must be"),
        ((2, 3), (4, 3), [0, 4], "from 0 to 4: each must be the row of one of the 4 keys"),
        ((2, 3), (4, 3), [-100, 1], "from -100 to 1"),
        ((1, 3), (0, 3), [0], "of the 0 keys"),
    ],
)
def test_positives_that_are_no_key_are_refused(queries: Any, keys: Any, positives: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        info_nce(torch.ones(queries), torch.ones(keys), torch.tensor(positives))


@pytest.mark.parametrize("pairs", [1, 2, 9])
@pytest.mark.parametrize(
    "ours, formula, weights", [(clip, clip_formula, (4.0,)), (siglip, siglip_formula, (4.0, -1.0))]
)
def test_losses_and_gradients_equal_the_formulas_on_the_full_matrix(
    pairs: int, ours: Callable[..., Any], formula: Callable[..., torch.Tensor], weights: tuple[float, ...]
) -> None:
    given = (*(x.requires_grad_() for x in features(pairs)), *map(number, weights))
    wanted = formula(*given)
    loss, count = ours(*given)
    assert int(count) == pairs and loss.shape == ()
    torch.testing.assert_close(loss, wanted)
    with torch.no_grad():
        assert torch.equal(ours(*given)[0], loss)
    for found, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(wanted, given), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("objective, weights", [(clip, (4.0,)), (siglip, (4.0, -1.0))])
def test_gradients_equal_finite_differences(objective: Callable[..., Any], weights: tuple[float, ...]) -> None:
    given = (*(x.requires_grad_() for x in features(4)), *map(number, weights))
    assert torch.autograd.gradcheck(lambda *some: objective(*some)[0] * 0.7, given)


def test_clip_equals_transformers() -> None:
    images, texts = (x.requires_grad_() for x in features(6, torch.float32, width=8))
    model = CLIPModel(CLIPConfig(text_config=TINY, vision_config=TINY, projection_dim=8))
    model.get_image_features = lambda **_: SimpleNamespace(pooler_output=images)
    model.get_text_features = lambda **_: SimpleNamespace(pooler_output=texts)
    temperature = Temperature()
    assert float(model.logit_scale.detach()) == pytest.approx(float(temperature.log_scale.detach()), abs=1e-4)
    with torch.no_grad():
        model.logit_scale.copy_(temperature.log_scale[0])
    theirs = model(input_ids=None, pixel_values=None, return_loss=True).loss
    loss, count = clip(images, texts, temperature())
    torch.testing.assert_close(loss / count, theirs)
    wanted = torch.autograd.grad(theirs, (images, texts, model.logit_scale))
    found = torch.autograd.grad(loss / count, (images, texts, temperature.log_scale))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.view_as(other), other, atol=1e-6, rtol=1e-5)


def test_siglip_equals_transformers() -> None:
    images, texts = (x.requires_grad_() for x in features(6, torch.float32, width=8))
    model = SiglipModel(SiglipConfig(text_config=TINY, vision_config=TINY))
    model.vision_model.forward = lambda **_: SimpleNamespace(pooler_output=images)
    model.text_model.forward = lambda **_: SimpleNamespace(pooler_output=texts)
    scale = SigmoidScale()
    with torch.no_grad():
        model.logit_scale.copy_(scale.log_scale)
        model.logit_bias.copy_(scale.bias)
    theirs = model(input_ids=None, pixel_values=None, return_loss=True).loss
    loss, count = siglip(images, texts, *scale())
    torch.testing.assert_close(loss / count, theirs)
    wanted = torch.autograd.grad(theirs, (images, texts, model.logit_scale, model.logit_bias))
    found = torch.autograd.grad(loss / count, (images, texts, scale.log_scale, scale.bias))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


SIZES = [(4, 4), (5, 3), (3, 2, 3), (0, 7, 1), (2, 2, 2, 2), (1, 4, 0, 3)]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}
REFUSED = {
    f"rank 1 holds images of [3, {D}] and texts of [2, {D}]": (((3, D), (3, D)), ((3, D), (2, D))),
    f"rank 1 holds images of [3, {D + 1}]": (((3, D), (3, D + 1)), ((3, D), (3, D + 1))),
    "rank 0 holds images of [-1, -1]": (((D,), (3, D)), ((3, D), (3, D))),
}


@pytest.fixture(scope="module")
def over_ranks(workers: Workers) -> dict[Any, list[Any]]:
    """What each rank found, by case; all in one call, for a group of processes takes a while to come up."""
    whole_and_parts = itertools.product([(8,), *SIZES], EXACT)
    cases = {(sizes, dtype): Case(*(x.split(sizes) for x in features(8, dtype))) for sizes, dtype in whole_and_parts}
    more = {
        **{ranks: Case(*(x.split(16) for x in features(16 * ranks, torch.float32, width=64))) for ranks in (2, 4)},
        "no pairs": Case(*(torch.zeros(2, 0, D),) * 2),
        **{said: Case(*([torch.ones(s) for s in shapes] for shapes in both)) for said, both in REFUSED.items()},
    }
    parts = workers.run(4, contrastive_ranks.on_first_ranks, [*cases.values(), *more.values()])
    found = [[part for part in of_case if part is not None] for of_case in zip(*parts, strict=True)]
    return dict(zip([*cases, *more], found, strict=True))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("sizes", SIZES)
def test_any_number_of_ranks_gives_one_ranks_loss_and_gradients(
    sizes: tuple[int, ...], dtype: torch.dtype, over_ranks: dict[Any, list[Any]]
) -> None:
    """Features' gradients stand on the rank that holds them; those of scale and bias add up over the ranks."""
    parts = over_ranks[sizes, dtype]
    assert len(parts) == len(sizes)
    (one,) = over_ranks[(8,), dtype]
    for objective, whole in one.items():
        held = {key: [part[objective][key] for part in parts] for key in whole}
        assert [int(count) for count in held["count"]] == list(sizes)
        for key in ("loss", "log_scale", *(["bias"] if objective == "siglip" else [])):
            error = (torch.stack(held[key]).double().sum(0) - whole[key]).abs() / whole[key].abs()
            assert error < EXACT[dtype], (objective, key, error)
        for key in ("images", "texts"):
            error = (torch.cat(held[key]) - whole[key]).norm() / whole[key].norm()
            assert error < EXACT[dtype], (objective, key, error)


def test_a_group_of_one_rank_is_as_no_group(over_ranks: dict[Any, list[Any]]) -> None:
    (found,) = over_ranks[(8,), torch.float64]
    for objective, wanted in contrastive_ranks.objectives(*features(8), None).items():
        for key, value in wanted.items():
            torch.testing.assert_close(found[objective][key], value)


def test_features_of_all_ranks_are_nowhere_together_in_siglip(over_ranks: dict[Any, list[Any]]) -> None:
    """A rank of four holds no more than one of two: beside its own, chunks of a single rank, and of the one to come."""
    chunk = 16 * 64  # numbers: pairs of each rank, width
    alone = contrastive_ranks.objectives(*features(16, torch.float32, width=64), None)["siglip"]
    for part in over_ranks[2] + over_ranks[4]:
        assert part["siglip"]["largest"] == chunk
        assert part["siglip"]["peak"] <= alone["peak"] + 3 * chunk * 4 + 256  # 256: what shapes take
    assert [part["clip"]["largest"] for part in over_ranks[4]] == [4 * 2 * chunk] * 4


def test_a_batch_without_pairs_counts_nothing(over_ranks: dict[Any, list[Any]]) -> None:
    assert len(over_ranks["no pairs"]) == 2
    for part in over_ranks["no pairs"]:
        for found in part.values():
            assert found["loss"] == found["count"] == 0 and found["log_scale"] == 0


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_pair_up_is_refused_on_every_rank(said: str, over_ranks: dict[Any, list[Any]]) -> None:
    assert [said in part for part in over_ranks[said]] == [True, True]
    with pytest.raises(ValueError, match="row i of both must be one pair"):
        siglip(torch.ones(3, D), torch.ones(2, D), number(1.0), number(0.0))


@pytest.mark.parametrize("what", ["clip", "siglip"])
def test_memory_grows_with_the_pairs_and_not_with_their_square(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", 256)
    monkeypatch.setattr(cross_entropy, "CHUNK", 256)
    most, peaks = [], []
    for pairs in (64, 128, 256):
        images, texts = (x.requires_grad_() for x in features(pairs, torch.float32, width=4))
        with Memory() as seen:
            weights = (number(4.0, torch.float32), number(-1.0, torch.float32))
            loss = siglip(images, texts, *weights)[0] if what == "siglip" else clip(images, texts, weights[0])[0]
            loss.backward()
        most.append(seen.largest)
        peaks.append(seen.peak)
    assert most[2] <= 2 * most[1] <= 4 * most[0] and most[2] < 256 * 256 / 8
    assert peaks[2] <= 2 * peaks[1] <= 4 * peaks[0] and peaks[2] < 256 * 256 * 4 / 2


@pytest.mark.parametrize("block", [1, 3, 8, 20, 1000])
def test_blocks_of_logits_do_not_show(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK", block)
    given = (*(x.requires_grad_() for x in features(7)), number(4.0), number(-1.0))
    wanted = siglip_formula(*given)
    loss, _ = siglip(*given)
    torch.testing.assert_close(loss, wanted)
    for found, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(wanted, given), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["far apart", "all the same", "zero", "huge", "opposed"])
def test_extremes_stay_finite(kind: str) -> None:
    images, texts = features(5, torch.float32)
    match kind:
        case "all the same":
            images = texts = torch.ones(5, D)
        case "zero":
            images = torch.zeros(5, D)
        case "huge":
            images, texts = images * 1e15, texts * 1e-15
        case "opposed":
            texts = -images
    for scale, bias in ((1e-4, 0.0), (1.0, -10.0), (100.0, 10.0), (100.0, -1000.0), (1e4, 1e4)):
        weights = number(scale, torch.float32), number(bias, torch.float32)
        given = [x.clone().requires_grad_() for x in (images, texts)]
        for loss, inputs in (
            (clip(*given, weights[0])[0], (*given, weights[0])),
            (siglip(*given, *weights)[0], (*given, *weights)),
        ):
            assert loss.isfinite() and loss >= 0
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_with_identical_features_nothing_is_told_apart() -> None:
    """Every candidate is as likely: ln A for each; SigLIP's logits are all scale + bias."""
    same = torch.ones(8, D, dtype=torch.float64)
    loss, count = clip(same, same, number(100.0))
    torch.testing.assert_close(loss / count, torch.tensor(math.log(8), dtype=torch.float64))
    loss, _ = siglip(same, same, number(3.0), number(-1.0))
    wanted = 8 * math.log(1 + math.exp(-2)) + 56 * math.log(1 + math.exp(2))
    torch.testing.assert_close(loss, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("objective, weights", [(clip, (100.0,)), (siglip, (100.0, -10.0))])
def test_features_of_16_bits_are_compared_in_fp32(objective: Callable[..., Any], weights: tuple[float, ...]) -> None:
    given = [x.requires_grad_() for x in features(16, torch.bfloat16)]
    scales = [number(w, torch.float32) for w in weights]
    loss, _ = objective(*given, *scales)
    wide, _ = objective(*(x.float() for x in given), *scales)
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, given))


def test_the_temperature_is_clamped_and_finds_its_way_back() -> None:
    images, texts = features(8, torch.float32)
    temperature = Temperature()
    assert float(temperature().detach()) == pytest.approx(1 / 0.07)
    for value, used in ((10.0, 100.0), (math.log(100), 100.0), (-3.0, 1.0), (2.0, math.exp(2.0))):
        with torch.no_grad():
            temperature.log_scale.fill_(value)
        assert float(temperature().detach()) == pytest.approx(used, rel=1e-6)
        assert float(temperature().detach()) <= 100.0 * (1 + 1e-6)
        (found,) = torch.autograd.grad(clip(images, texts, temperature())[0], temperature.log_scale)
        scale = number(used)
        (slope,) = torch.autograd.grad(clip_formula(images, texts, scale), scale)
        assert float(found) == pytest.approx(float(slope) * used, rel=1e-4)
    optimizer = torch.optim.SGD([temperature.log_scale], lr=0.1)
    for push in [-1.0] * 50 + [1.0]:  # up against the bound for long, then down once
        temperature()
        temperature.log_scale.grad = torch.tensor([push])
        optimizer.step()
    assert float(temperature().detach()) == pytest.approx(100 * math.exp(-0.1), rel=1e-5)
    for wrong in (0.5, 101.0):
        with pytest.raises(ValueError, match=f"initial={wrong} must lie between 1 and largest=100"):
            Temperature(initial=wrong)


def test_scales_stay_fp32_in_a_model_of_16_bits() -> None:
    model = torch.nn.ModuleDict({"clip": Temperature(), "siglip": SigmoidScale(), "other": torch.nn.Linear(2, 2)})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.bfloat16()
    after = dict(model.named_parameters())
    assert after["other.weight"].dtype == torch.bfloat16
    for name in ("clip.log_scale", "siglip.log_scale", "siglip.bias"):
        assert torch.equal(after[name], before[name]) and after[name].dtype == torch.float32
    assert [float(x.detach()) for x in SigmoidScale()()] == pytest.approx([10.0, -10.0])


@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_info_nce_bounds_the_mutual_information_of_correlated_gaussians(correlation: float) -> None:
    """I = -d/2 ln(1 - r^2) for d independent pairs of correlation r; the best critic is the density ratio, up to x."""
    d, N, r = 2, 1024, correlation
    information = -d / 2 * math.log(1 - r * r)
    generator = torch.Generator().manual_seed(0)
    best, worse = [], []
    for _ in range(16):
        x, noise = torch.randn(2, N, d, generator=generator)
        y = r * x + math.sqrt(1 - r * r) * noise
        at = torch.arange(N)
        queries = torch.cat((x * r / (1 - r * r), torch.ones(N, 1)), dim=1)
        keys = torch.cat((y, -(y * y).sum(1, keepdim=True) * r * r / (2 * (1 - r * r))), dim=1)
        for held, q, k in ((best, queries, keys), (worse, queries[:, :d], y)):
            loss, count = info_nce(q, k, at)
            held.append(math.log(N) - float(loss / count))
    assert sum(best) / 16 == pytest.approx(information, abs=0.03)
    assert sum(worse) / 16 < sum(best) / 16 - 0.02


def test_info_nce_never_shows_more_information_than_its_candidates_can() -> None:
    x = 50 * F.normalize(features(16)[0])
    loss, count = info_nce(x, 50 * F.normalize(x), torch.arange(16))
    assert math.log(16) - 1e-6 <= math.log(16) - float(loss / count) <= math.log(16)
