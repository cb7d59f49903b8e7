"""Our model, by Megatron-core and in several layouts, against the plain PyTorch reference written from the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from megatron.core.transformer.moe import moe_utils

from perilune.moe import backbone
from perilune.parallel.mesh import Mesh
from perilune.parallel.workers import Workers
from perilune.pretrain import model as models
from perilune.pretrain import presets
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.parity import probe
from perilune.pretrain.schema import Config, Kernels, Model, Parallel, Precision

TINY = presets.get("tiny")
SEQ_LEN = TINY.data.seq_len
ALPHA = 0.05  # far above the recipe's, so that a wrong auxiliary loss shows in the gradients
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {  # changed model keys, document mask
    "groups": ({}, True),
    "no document mask": ({}, False),
    "three depths": ({"num_nextn_predict_layers": 3}, True),
    "no MTP": ({"num_nextn_predict_layers": 0}, True),
    "no q latent, one group": ({"q_lora_rank": None, "n_group": 1, "topk_group": 1}, True),
    "group score of one": ({"topk_group": 4, "n_shared_experts": 2}, True),
    "dense only": ({"n_routed_experts": 0, "first_k_dense_replace": 3}, True),
    "all layers experts": ({"first_k_dense_replace": 0, "n_shared_experts": 0}, True),
    "eps apart": ({"rms_norm_eps": 1e-2, "latent_norm_eps": 1e-3}, True),
    "YaRN": ({"rope_scaling_factor": 4.0, "original_max_position_embeddings": 16}, True),
}


def rows_of(count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Packed rows with one to five documents, some of their tails masked."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        cuts = np.sort(rng.choice(np.arange(1, SEQ_LEN), size=index % 5, replace=False))
        bounds = np.array([0, *cuts, SEQ_LEN], np.int32)
        mask = np.ones(SEQ_LEN, np.uint8)
        mask[bounds[-2] + (SEQ_LEN - bounds[-2]) // 2 :] = index % 2  # every other row loses the tail of its last text
        rows.append(Row(f"{index}", rng.integers(0, vocabulary, SEQ_LEN).astype(np.uint16), bounds, mask))
    return rows


def micro_batches(model: Model, size: int, document_mask: bool = True) -> list[PackedBatch]:
    rows = rows_of(8, model.vocab_size)
    return [
        collate(rows[i : i + size], model.num_nextn_predict_layers, document_mask) for i in range(0, len(rows), size)
    ]


def expected(model: Model, weights: dict[str, torch.Tensor], document_mask: bool, mtp_weight: float) -> Any:
    """The reference in fp64 on the whole global batch as one pack, with the gradients of its objective."""
    (batch,) = micro_batches(model, 8, document_mask)
    exact = {name: value.double().requires_grad_(value.dtype.is_floating_point) for name, value in weights.items()}
    out = reference.forward(model, exact, replace(batch, loss_mask=batch.loss_mask.double()), mtp_weight)
    out.objective.backward()
    return out, {name: value.grad for name, value in exact.items()}


def compare(
    config: Config, workers: Workers, world: int, micro: int, document_mask: bool = True, favoured: int = 0
) -> None:
    model = config.model
    weights = reference.init_weights(model, seed=1)
    for name in weights:
        if name.endswith("e_score_correction_bias"):
            weights[name][:favoured] += 10
    out, gradients = expected(model, weights, document_mask, 0.3)
    batch = micro_batches(model, micro, document_mask)
    got = workers.run(world, probe.gradients, config, weights, batch, 0.3)

    torch.testing.assert_close(got[0]["sums"][0], out.loss_sums.detach(), rtol=1e-6, atol=1e-4)
    assert got[0]["sums"][1].tolist() == out.loss_counts.tolist()
    assert all(torch.equal(one["sums"], got[0]["sums"]) for one in got)
    if model.n_routed_experts:
        assert got[0]["balance"] == pytest.approx(float(out.aux_losses.detach().sum(1).mean()), rel=1e-5)
        for layer, load in out.loads.items():
            assert got[0]["load"][layer].tolist() == load.tolist()
    ours = probe.named(config, [one["gradients"] for one in got], part=True)
    worst = {
        name: float((ours[name] - gradient).norm() / gradient.norm())
        for name, gradient in gradients.items()
        if gradient is not None and gradient.norm() > 0
    }
    assert worst.keys() <= ours.keys() and len(worst) > 30
    assert all(not ours[name].any() for name in ours.keys() - worst.keys())  # experts without a token
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] < 1e-5, f"{name}: {worst[name]:.2e}"
    if model.n_routed_experts:
        _check_biases(config, got, weights, out)


def _check_biases(config: Config, got: list[Any], weights: dict[str, torch.Tensor], out: Any) -> None:
    """b moves by gamma against the sign of the load's excess (V3 section 2.1.2)."""
    after = probe.named(config, [one["biases"] for one in got], part=True)
    for layer, load in out.loads.items():
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        want = weights[name] + 1e-3 * torch.sign(load.double().mean() - load.double()).float()
        torch.testing.assert_close(after[name], want, rtol=0, atol=1e-7)


def config_of(changes: dict[str, Any], **parallel: Any) -> Config:
    return replace(
        TINY,
        model=replace(TINY.model, seq_aux_loss_alpha=ALPHA, **changes),
        parallel=Parallel(zero1=False, **parallel),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_routing_and_gradients_equal_the_reference(variant: str, workers: Workers) -> None:
    changes, document_mask = VARIANTS[variant]
    compare(config_of(changes), workers, world=1, micro=2, document_mask=document_mask)


@pytest.mark.parametrize(
    ("world", "micro", "parallel"),
    [
        (2, 1, {"pp": 2, "layout": "Ettt|tmmL"}),
        (2, 1, {"tp": 2}),
        (2, 2, {"cp": 2, "ep": 2}),
        (4, 1, {"tp": 2, "pp": 2, "ep": 2}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_layouts_equal_the_reference(world: int, micro: int, parallel: dict[str, Any], workers: Workers) -> None:
    """A few of them: the parity matrix compares all with one rank, and one rank is compared above."""
    changes = {"num_nextn_predict_layers": 2, "num_layers": 4}
    compare(config_of(changes, **parallel), workers, world=world, micro=micro)


def test_a_rank_whose_experts_get_no_token_takes_part_in_every_message(workers: Workers) -> None:
    compare(config_of({}, ep=2), workers, world=2, micro=2, favoured=8)


def test_counts_and_biases_are_exact_in_bf16(workers: Workers) -> None:
    """Hundreds of tokens an expert: more than bf16 counts one by one."""
    config = config_of({"n_routed_experts": 4, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1})
    config = replace(config, precision=Precision(compute="bf16"))
    weights = reference.init_weights(config.model, seed=1)
    (got,) = workers.run(1, probe.gradients, config, weights, micro_batches(config.model, 8), 0.3)
    loads = [load for load in got["load"] if load.any()]
    assert len(loads) > 2 and all(load.sum() == 8 * SEQ_LEN * 3 and load.max() > 300 for load in loads)
    after = probe.named(config, [got["biases"]], part=True)
    for layer, load in enumerate(got["load"]):
        if load.any():
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            want = weights[name] + 1e-3 * torch.sign(load.mean() - load).float()
            torch.testing.assert_close(after[name], want, rtol=0, atol=1e-7)


def test_megatron_core_is_told_of_the_kernels_that_it_chooses_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the parts of Transformer Engine that the permutation needs; here something stands for them."""
    chosen = Kernels(permute="transformer_engine", router="transformer_engine")
    shapes = [models.backbone_config(replace(TINY, kernels=kernels), Mesh(1)) for kernels in (Kernels(), chosen)]
    with pytest.raises(ValueError, match="Please install TE"):
        backbone.transformer_config(shapes[1])
    for name in vars(moe_utils):
        if name.startswith("fused_"):
            monkeypatch.setattr(moe_utils, name, print)
    made = [backbone.transformer_config(shape) for shape in shapes]
    assert [one.moe_permute_fusion for one in made] == [one.moe_router_fusion for one in made] == [False, True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shapes.append(replace(shapes[0], kernels={"swiglu": "compiled"}))
    assert [backbone.transformer_config(shape).bias_activation_fusion for shape in shapes] == [False, False, True]


def test_the_fixture_has_unequal_counts_and_no_ties() -> None:
    """Otherwise a wrong normaliser, or a different order of equal scores, could pass."""
    model = TINY.model
    batches = micro_batches(model, 2)
    counts = [batch.loss_mask.sum(-1).tolist() for batch in batches]
    assert len({tuple(count) for count in counts}) == len(counts)
    assert not math.isclose(counts[0][0] / counts[0][1], counts[1][0] / counts[1][1], rel_tol=1e-3)
