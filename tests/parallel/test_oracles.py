"""Our model in several layouts against transformers' `DeepseekV3ForCausalLM` and `MtpModel`, neither written here.

transformers loads the weights, fuses the experts, and names the gradients as on disk again by its own code. It runs in
fp64, but for norms, softmax and routers, which it always computes in fp32; ours is all fp32. What it can say and we
must match: logits, losses token by token, gradients of every weight, and the experts of every token. What it cannot:
packed documents, loss masks, balance losses, and groups with K/M other than 2.

R rows of S tokens, one document each; V vocabulary, E experts, D the MTP depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
import oracle_ranks
import pytest
import reference
import torch
import torch.nn.functional as F
from transformers import DeepseekV3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from perilune.parallel.workers import Workers
from perilune.pretrain import presets
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.hf import ours
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.schema import Model, Parallel

ROWS, SEQ_LEN, DEPTHS = 4, 32, 2
MTP_WEIGHTS = (0.0, 0.3)
V3 = replace(
    presets.get("tiny").model,
    num_layers=4,
    vocab_size=256,
    num_nextn_predict_layers=DEPTHS,
    rms_norm_eps=1e-3,  # transformers gives the latent norms 1e-6 whatever it is: so large, a mixed-up one shows
    seq_aux_loss_alpha=0.0,
)
MODELS: dict[str, tuple[Model, int]] = {  # shape, and a seed whose weights decide every choice by a margin
    "V3": (V3, 17),
    # Moonlight's shape (no query latent, no groups), and YaRN, which Moonlight does without
    "Moonlight, YaRN": (
        replace(
            V3,
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=3,
            n_shared_experts=2,
            qk_rope_head_dim=16,
            rope_scaling_factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
        ),
        15,
    ),
}


@dataclass(frozen=True)
class Oracle:
    """What transformers says of a model on the tokens [R, S]; lists are by depth, 0 is the main model."""

    folder: Path  # its weights and configuration, under the hub's names
    tokens_RS: torch.Tensor
    logits: list[torch.Tensor]  # [R, S-k, V]
    losses: list[torch.Tensor]  # [R, S-k-1]
    gradients: dict[float, dict[str, torch.Tensor]]  # MTP weight -> name -> of the objective
    chosen: dict[int, torch.Tensor]  # layer -> [R, S-k, E] whether the expert is chosen
    margin: float  # by which the closest choice of an expert or a group is won


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Each model is asked about once."""
    return cache(lambda name: ask(*MODELS[name], tmp_path_factory.mktemp("oracle")))


def ask(model: Model, seed: int, folder: Path) -> Oracle:
    """Random weights into `folder`, and transformers' logits, losses and gradients with them."""
    hf_folders.save(folder, reference.init_weights(model, seed))
    hf_folders.config(model, architectures=["DeepseekV3ForCausalLM"]).save_pretrained(folder)
    main, mtp = load(folder, model)
    tokens_RS = torch.randint(model.vocab_size, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(7))
    chosen, margins = watch_routers(model, main, mtp)

    hidden = main.model(input_ids=tokens_RS).last_hidden_state
    logits = [main.lm_head(hidden)]
    for k in range(1, DEPTHS + 1):
        length = SEQ_LEN - k
        place = torch.arange(length)[None]
        hidden = mtp.forward_layer(k - 1, hidden[:, :length], place, None, input_ids=tokens_RS[:, k:])
        logits.append(mtp.shared_head(hidden))
    losses = [
        F.cross_entropy(logit[:, :-1].transpose(1, 2), tokens_RS[:, k + 1 :], reduction="none")
        for k, logit in enumerate(logits)
    ]

    own = {name: p for name, p in mtp.named_parameters() if name.startswith("layers.")}  # not embedding and head
    gradients = {}
    for weight in MTP_WEIGHTS:
        deeper = sum(loss.sum() for loss in losses[1:])
        objective = (losses[0].sum() + weight / DEPTHS * deeper) / losses[0].numel()
        main.zero_grad()
        mtp.zero_grad()
        objective.backward(retain_graph=True)
        gradients[weight] = {
            **revert_weight_conversion(main, {name: p.grad for name, p in main.named_parameters()}),
            **revert_weight_conversion(mtp, {name: p.grad for name, p in own.items()}),
        }
    return Oracle(
        folder=folder,
        tokens_RS=tokens_RS,
        logits=[logit.detach() for logit in logits],
        losses=[loss.detach() for loss in losses],
        gradients=gradients,
        chosen={layer: map_TE.view(ROWS, -1, map_TE.shape[-1]) for layer, map_TE in chosen.items()},
        margin=min(margins),
    )


def load(folder: Path, model: Model) -> tuple[Any, Any]:
    """transformers' main model and its MTP layers, from the files; every tensor of the files finds its place."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the main model reports the tensors that it leaves to MTP
    logging.disable_progress_bar()
    try:
        main, info = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        after = tuple(f"model.layers.{model.num_layers + k}." for k in range(DEPTHS))
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
        assert all(name.startswith(after) for name in info["unexpected_keys"])
        # MTP's layers are looked for under these names; the class names layer 61 only.
        main._keys_to_ignore_on_load_unexpected = [name.replace(".", r"\.") for name in after]
        mtp = MtpModel.from_pretrained(main)
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    return main.eval(), mtp.eval()


def watch_routers(model: Model, main: Any, mtp: Any) -> tuple[dict[int, torch.Tensor], list[float]]:
    """What the routers will have chosen, layer -> [T, E], and by which margins."""
    chosen: dict[int, torch.Tensor] = {}
    margins: list[float] = []
    blocks = [*main.model.layers, *(layer.mtp_block for layer in mtp.layers)]
    for layer, block in enumerate(blocks):
        if layer < model.first_k_dense_replace:
            continue

        def keep(gate: Any, arguments: Any, result: Any, layer: int = layer) -> None:
            logits_TE, _, chosen_TK = result
            chosen[layer] = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
            margins.append(fixture.margin(logits_TE.detach().sigmoid(), gate.e_score_correction_bias, model))

        block.mlp.gate.register_forward_hook(keep)
    return chosen, margins


@pytest.mark.parametrize("name", MODELS)
def test_no_tie_decides_and_every_weight_counts(name: str, oracle: Callable[[str], Oracle]) -> None:
    """So that a difference in routing is an error, and each gradient is compared with one that is not zero."""
    one, (model, _) = oracle(name), MODELS[name]
    assert one.margin > fixture.MARGIN
    weights = {key for key in reference.tensor_shapes(model) if not key.endswith("e_score_correction_bias")}
    deeper = tuple(f"model.layers.{model.num_layers + k}." for k in range(DEPTHS))
    for mtp_weight, gradients in one.gradients.items():
        assert gradients.keys() == weights
        idle = {key for key, gradient in gradients.items() if not gradient.any()}
        assert idle == (set() if mtp_weight else {key for key in weights if key.startswith(deeper)})
    for key in ("model.embed_tokens.weight", "lm_head.weight"):  # MTP's part in what it shares is no rounding
        assert distance(one.gradients[0.3][key], one.gradients[0.0][key]) > 0.05


@pytest.mark.parametrize(
    ("name", "world", "micro", "parallel"),
    [
        # the largest first: four processes at once start sooner than one after the other
        ("V3", 4, 1, {"tp": 2, "ep": 2, "etp": 2}),
        ("V3", 4, 1, {"tp": 2, "pp": 2, "ep": 2}),
        ("V3", 1, 2, {}),
        ("V3", 2, 2, {"tp": 2}),
        ("V3", 2, 4, {"tp": 2, "etp": 2}),
        ("V3", 2, 1, {"pp": 2}),
        ("V3", 2, 1, {"ep": 2}),
        ("V3", 2, 2, {"tp": 2, "ep": 2}),
        ("Moonlight, YaRN", 1, 4, {}),
        ("Moonlight, YaRN", 2, 2, {"tp": 2}),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_losses_routing_and_gradients(
    name: str,
    world: int,
    micro: int,
    parallel: dict[str, Any],
    oracle: Callable[[str], Oracle],
    workers: Workers,
) -> None:
    """On one rank and in each layout, of the main loss alone and of the whole objective."""
    one = oracle(name)
    base = presets.get("tiny")
    config = replace(base, model=MODELS[name][0], parallel=Parallel(zero1=False, **parallel))
    file = str(one.folder / "model.safetensors")
    ranks = workers.run(world, oracle_ranks.run, config, file, batches(one.tokens_RS, micro), MTP_WEIGHTS)
    for index, weight in enumerate(MTP_WEIGHTS):
        seen = [rank[index] for rank in ranks]
        check_losses(one, seen)
        check_routing(one, seen)
        for order in (seen, seen[::-1]):  # of a tensor that several ranks hold, the first and the last count
            gradients = probe.named(config, [rank.gradients for rank in order], part=True)
            check_gradients(one.gradients[weight], gradients)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_one_rank(name: str, oracle: Callable[[str], Oracle], workers: Workers) -> None:
    one = oracle(name)
    (got,) = workers.run(1, ours.logits, str(one.folder), MODELS[name][0], one.tokens_RS.tolist())
    for row, logits_DTV in enumerate(got):
        for k, theirs in enumerate(one.logits):
            assert theirs.std() > 0.5  # else equal logits would say little
            difference = (logits_DTV[k, : SEQ_LEN - k] - theirs[row]).abs().max()
            assert difference < 1e-5 * theirs.abs().max(), (row, k)


def batches(tokens_RS: torch.Tensor, micro: int) -> list[Any]:
    """The tokens in micro-batches of `micro` rows, each row one document without a loss mask."""
    bounds, mask = np.array([0, SEQ_LEN], np.int32), np.ones(SEQ_LEN, np.uint8)
    rows = [Row(f"{i}", row.numpy().astype(np.uint16), bounds, mask) for i, row in enumerate(tokens_RS)]
    return [collate(rows[i : i + micro], DEPTHS, document_mask=True) for i in range(0, ROWS, micro)]


def check_losses(one: Oracle, seen: list[oracle_ranks.Seen]) -> None:
    """Of every token and depth where there is a label, and their sums and counts on every rank."""
    got = torch.full((1 + DEPTHS, ROWS * SEQ_LEN), float("nan"))
    for rank in seen:
        if rank.losses is not None:
            got[:, rank.loss_tokens] = torch.from_numpy(rank.losses)
    for k, theirs in enumerate(one.losses):
        mine = got[k].view(ROWS, SEQ_LEN)[:, : SEQ_LEN - k - 1]
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for rank in seen:
        np.testing.assert_allclose(rank.sums[0], [float(loss.sum()) for loss in one.losses], rtol=1e-6)
        assert rank.sums[1].tolist() == [loss.numel() for loss in one.losses]


def check_routing(one: Oracle, seen: list[oracle_ranks.Seen]) -> None:
    """The same experts for every token of every layer; MTP's tokens without an input are nobody's."""
    assert {layer for rank in seen for layer in rank.routed} == one.chosen.keys()
    for layer, theirs in one.chosen.items():
        got = torch.full((ROWS * SEQ_LEN, theirs.shape[-1]), -1)
        for rank in seen:
            if layer in rank.routed:
                got[rank.routed_tokens] = torch.from_numpy(rank.routed[layer]).long()
        differ = (got.view(ROWS, SEQ_LEN, -1)[:, : theirs.shape[1]] != theirs).any(-1)
        assert not differ.any(), f"layer {layer}, row and token {differ.nonzero().tolist()[:5]}"


def check_gradients(theirs: dict[str, torch.Tensor], mine: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    idle = {name for name, gradient in theirs.items() if not gradient.any()}
    assert not [name for name in idle if mine[name].any()]
    worst = {name: distance(mine[name], theirs[name]) for name in theirs.keys() - idle}
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] < 1e-5, f"{name}: {worst[name]:.2e}"


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference, of the second's norm."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())
