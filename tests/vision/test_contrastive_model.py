"""The vision stage's model and step: pairs from a batch, features by segment, and both losses in every layout.

In fp32 unless said otherwise; B pairs, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pairs_ranks
import pytest
import torch

from perilune.parallel.workers import Workers
from perilune.pretrain import presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.data.shard import Row, RowImage
from perilune.pretrain.errors import InputError
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.plan import vision_counts
from perilune.pretrain.schema import Config, Vision
from perilune.vision.pooling import AttentionPool

LOSSES = ("siglip", "clip")
# Of a gradient's norm. What all images' features have alike says almost nothing of which text is whose: its gradient is
# a fortieth of its terms, so that their rounding shows 40 times.
CLOSE = 1e-4


def row(key: str, bounds: list[int], images: list[tuple[int, int]], unloved: list[tuple[int, int]]) -> Row:
    """16 tokens, each its place; `images` are (first placeholder, tokens), `unloved` ranges that bear no loss."""
    mask = np.ones(16, np.uint8)
    for start, end in [*unloved, *((at - 1, at + n + 1) for at, n in images)]:  # a mark before and after an image
        mask[start:end] = 0
    held = tuple(RowImage(b"", "png", at, n, (2, 2 * n)) for at, n in images)
    return Row(key, np.arange(16, dtype=np.uint16), np.array(bounds, np.int32), mask, images=held)


def test_an_image_s_text_is_what_follows_and_counts() -> None:
    rows = [
        # A text between two images; the second has one up to the document's end; the next document none at all.
        row("a", [0, 12, 16], [(1, 1), (7, 2)], []),
        # Nothing but the end mark follows: no text. Then two images in a row, of which the second has a text.
        row("b", [0, 5, 16], [(1, 2), (6, 1), (9, 1)], []),
        # A text that counts nothing, and one of which a part counts.
        row("c", [0, 8, 16], [(1, 1), (9, 1)], [(0, 8), (12, 14)]),
    ]
    assert rows[1].loss_mask[4] == 1  # the end mark
    pairs = pairs_of(collate(rows, 0, True))
    assert pairs.images_B.tolist() == [0, 1, 4, 6]
    texts = [part.tolist() for part in pairs.tokens_X.split(pairs.cu_seqlens.diff().tolist())]
    assert texts == [[3, 4, 5], [10, 11], [11, 12, 13, 14, 15], [11, 14, 15]]


def test_without_pairs_there_are_none() -> None:
    pairs = pairs_of(collate([row("a", [0, 16], [], [])], 0, True))
    assert len(pairs) == 0 and pairs.tokens_X.numel() == 0 and pairs.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_that_of_each_segment_by_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    H, N, D = 12, 3, 5
    pool = AttentionPool(H, N, D, 1e-5, torch.float32)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    pool.to(dtype)
    lengths = [1, 7, 3]
    x = (3 * torch.randn(sum(lengths), H)).to(dtype).requires_grad_()
    found = pool(x, torch.tensor([0, 1, 8, 11], dtype=torch.int32))
    wanted = []
    for part in x.float().split(lengths):
        weights = (part @ pool.query.float().T / H**0.5).softmax(0)  # [tokens, heads]
        values = torch.nn.functional.linear(part, pool.value.weight.float(), pool.value.bias.float()).view(
            -1, N, H // N
        )
        mean = torch.cat([weights[:, n] @ values[:, n] for n in range(N)])
        normed = torch.nn.functional.layer_norm(mean, (H,), pool.norm.weight.float(), pool.norm.bias.float(), 1e-5)
        wanted.append(pool.projection.weight.float() @ normed)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(found.float(), torch.stack(wanted), **close)
    gradients = [torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)[0].float()
                 for out in (found, torch.stack(wanted))]  # fmt: skip
    torch.testing.assert_close(
        *gradients, **({"atol": 1e-3, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 9.0, "rtol": 0.1})
    )


@pytest.fixture(scope="module")
def weights(workers: Workers) -> dict[str, dict[str, torch.Tensor]]:
    """Of each loss's model, every one off its neutral value."""
    found = {}
    for loss in LOSSES:
        config = pairs_ranks.config(loss)
        pieces = workers.run(1, probe.draw, config, fixture.batches("vlm", fixture.ROWS)[0])
        found[loss] = probe.named(config, pieces)
    return found


def gradients(workers: Workers, config: Config, weights: dict[str, torch.Tensor], world: int, run: Any = None) -> Any:
    batches = fixture.batches("vlm", config.train.micro_batch_size)
    arguments = (config, weights, batches, *(() if run else (0.0,)))
    ranks = workers.run(world, run or probe.gradients, *arguments)
    assert all(torch.equal(rank["pairs"], ranks[0]["pairs"]) for rank in ranks)
    return ranks[0]["sums"], ranks[0]["pairs"], probe.named(config, [rank["gradients"] for rank in ranks])


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert found.keys() == wanted.keys()
    away = {n: float((found[n] - g).norm() / g.norm()) for n, g in wanted.items() if float(g.norm()) > 1e-6}
    assert len(away) > 100 and any("contrastive.scale" in name for name in away)
    return max((distance, name) for name, distance in away.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout_gives_one_rank_s_losses_and_gradients(
    loss: str, workers: Workers, weights: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Of four data-parallel ranks the third has no image."""
    assert not fixture.batches("vlm", 2)[2].images
    one = gradients(workers, pairs_ranks.config(loss), weights[loss], 1)
    assert int(one[1][1]) > 3
    for dp, tp in ((2, 1), (4, 1), (1, 2)):
        sums, pairs, found = gradients(workers, pairs_ranks.config(loss, dp, tp), weights[loss], dp * tp)
        torch.testing.assert_close(sums, one[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(pairs, one[1], rtol=1e-6, atol=0)
        assert furthest(found, one[2])[0] < CLOSE, (dp, tp, furthest(found, one[2]))
    if loss == "siglip":
        _, pairs, found = gradients(workers, pairs_ranks.config(loss, 2), weights[loss], 2, pairs_ranks.alone)
        assert furthest(found, one[2])[0] > 1e-2 and abs(float(pairs[0] / one[1][0]) - 1) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_the_step_is_the_formula_on_the_features_plus_two_captions(
    loss: str, workers: Workers, weights: dict[str, dict[str, torch.Tensor]]
) -> None:
    config = pairs_ranks.config(loss)
    (found,) = workers.run(1, pairs_ranks.formula, config, weights[loss], fixture.batches("vlm", fixture.ROWS)[0])
    assert found.step_loss == pytest.approx(found.loss, rel=1e-6)
    # Softmax forgets a key's bias, so that its gradient is rounding.
    assert max((away, name) for name, away in found.away.items() if "qkv.bias" not in name) < (CLOSE, "")
    assert any(name.startswith("contrastive.text_encoder") for name in found.away)
    assert found.apart < 1e-5
    assert found.first_of["the last"] > 1e-2 and found.first_of["two"] > 1e-2  # it sees what follows, and where
    assert found.first_of["another text"] == 0
    if loss == "siglip":
        flops = vision_counts.contrastive_flops(config.contrastive, config.vision)
        assert found.flops == pytest.approx(flops.forward(found.texts, found.patches, len(found.texts) ** 2), rel=1e-6)


def test_steps_lower_both_losses(workers: Workers) -> None:
    for loss in LOSSES:
        ranks = workers.run(2, pairs_ranks.train, loss, 12)
        assert ranks[0].losses == ranks[1].losses
        first, last = ranks[0].losses[0], ranks[0].losses[-1]
        assert last[0] < 0.8 * first[0] and last[1] < 0.8 * first[1], ranks[0].losses
        assert ranks[0].validation.contrastive_loss < last[1] + 0.05
        assert set(ranks[0].moved) == set(rules.PARTS) and min(ranks[0].moved.values()) > 0


def test_in_bf16_the_scale_stays_fp32_and_learns(workers: Workers) -> None:
    (found,) = workers.run(1, pairs_ranks.train, "siglip", 3, (), "bf16")
    assert set(found.dtypes.values()) == {torch.float32} and len(found.dtypes) == 2
    assert 9.9 < found.scale < 10.1 and found.scale != 10.0
    assert found.losses[-1][1] < found.losses[0][1]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_scale_and_the_bias_do_not_decay_and_all_else_does(loss: str, workers: Workers) -> None:
    """CLIP's section 2.5 leaves gains and biases out; SigLIP's published bias, -16.5, lies beyond a decay of 0.1."""
    for world, name, zero1, compute in ((1, "adamw", False, "fp32"), (2, "muon", True, "bf16")):
        left = workers.run(world, pairs_ranks.decayed, loss, name, zero1, compute)[0]
        scales = {key: part for key, part in left.items() if ".scale." in key}
        assert scales == dict.fromkeys(scales, 1.0) and len(scales) == (2 if loss == "siglip" else 1)
        assert all(part == pytest.approx(0.5, rel=1e-3) for key, part in left.items() if key not in scales)


def test_the_scale_does_not_run_on_behind_its_bound(workers: Workers) -> None:
    """On whichever rank ZeRO-1 has it, and where other weights are 16-bit."""
    for world, zero1, compute in ((1, False, "bf16"), (2, True, "fp32"), (2, True, "bf16")):
        for rank in workers.run(world, pairs_ranks.pushed, zero1, compute):
            first = math.log(1 / 0.07)
            beyond = math.log(100) + 1  # by the last update alone, which the next forward takes back
            assert rank == pytest.approx([first + 1, first + 2, beyond, beyond, beyond], abs=1e-4)


@pytest.mark.parametrize("parts", [("contrastive",), ("language_model", "multi_modal_projector")])
def test_frozen_parts_stay(parts: tuple[str, ...], workers: Workers) -> None:
    (found,) = workers.run(1, pairs_ranks.train, "clip", 1, parts)
    assert {part for part, change in found.moved.items() if change == 0} == set(parts)


GOOD = replace(pairs_ranks.config("siglip"), optim=presets.get("tiny").optim)


@pytest.mark.parametrize(
    "section, change, world, said",
    [
        ("vision", Vision(), 1, "vision.num_layers=0: there is no tower"),
        ("train", {"micro_batch_size": 2}, 2, "8 must be 2 data-parallel ranks x train.micro_batch_size=2 = 4; set "
         "train.global_batch_size=4 or train.micro_batch_size=4"),
        ("parallel", {"pp": 2}, 2, "parallel.pp=2 is not built"),
        ("parallel", {"cp": 2}, 2, "parallel.cp=2 is not built"),
        ("data", {"document_mask": False}, 1, "set it to true"),
        ("precision", {"compute": "bf16"}, 1, "cannot save with parallel.zero1=false; set it to true"),
        ("contrastive", {"hidden_size": 36, "num_attention_heads": 4}, 1, "=36 must be a multiple of 2 x"),
        ("contrastive", {"num_attention_heads": 1}, 2, "num_attention_heads=1 does not divide by parallel.tp=2"),
        ("contrastive", {"feature_dim": 0}, 1, "contrastive.feature_dim=0 must be at least 1"),
        ("contrastive", {"caption_weight": -1.0}, 1, "caption_weight=-1.0 must lie between"),
        ("contrastive", {"loss": "none"}, 1, None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(section: str, change: Any, world: int, said: str | None) -> None:
    value = replace(getattr(GOOD, section), **change) if isinstance(change, dict) else change
    config = replace(GOOD, **{section: value})
    if said and "tp=2" in said:
        config = replace(config, parallel=replace(config.parallel, tp=2))
    rules.check(GOOD, 1)
    if said is None:
        rules.check(replace(config, train=replace(config.train, micro_batch_size=2)), world)
        with pytest.raises(InputError, match="this model has vision_tower, multi_modal_projector, language_model"):
            rules.check(replace(config, train=replace(config.train, freeze=("contrastive",))), world)
        return
    with pytest.raises(InputError) as refused:
        rules.check(config, world)
    assert said in str(refused.value)
