"""A model that compares images with texts, in processes that are a group: functions of `parallel.workers.Workers`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perilune.moe.backbone import packed_params
from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules, step
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.parity import fixture, probe
from perilune.pretrain.rules import part_of
from perilune.pretrain.schema import Config, Contrastive, Parallel, Precision
from perilune.pretrain.timetable import StepPlan
from perilune.vision.contrastive import siglip
from perilune.vision.vlm import VisionLanguageModel

SIZES = Contrastive(feature_dim=24, num_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64)


def config(loss: Any, dp: int = 1, tp: int = 1, zero1: bool = False) -> Config:
    """The parity fixture's model without experts, whose choices are not what is compared here."""
    base = fixture.config("vlm")
    layers = base.model.num_layers
    return replace(
        base,
        model=replace(base.model, n_routed_experts=0, first_k_dense_replace=layers),
        contrastive=replace(SIZES, loss=loss),
        train=replace(base.train, micro_batch_size=fixture.ROWS // dp),
        parallel=Parallel(tp=tp, zero1=zero1),
    )


@dataclass(frozen=True)
class Formula:
    """One rank's step beside the formula on the features of the whole batch, both differentiated."""

    step_loss: float  # the contrastive one, a mean over pairs
    loss: float
    away: dict[str, float]  # of each gradient, of the formula's norm
    apart: float  # the furthest that the features of a text in its pack are from those of it alone
    first_of: dict[
        str, float
    ]  # how far the first token's features go if others of its text are changed or change places
    flops: int  # of one forward of all that is contrastive, with SigLIP's loss, as torch counts
    texts: list[int]  # tokens of each
    patches: list[int]  # of each image


def formula(of: Config, weights: dict[str, torch.Tensor], batch: PackedBatch) -> Formula:
    """CLIP's figure 3 or SigLIP's algorithm 1 in plain PyTorch, plus 2 captions."""
    model = _built(of)
    probe.load(of, model, weights)
    found = step.forward_backward(model, [batch], next_token, 0.0, 0.0)
    (net,) = model.bare()
    assert isinstance(net, VisionLanguageModel)
    named = dict(net.named_parameters())
    from_step = {name: parameter.main_grad.clone() for name, parameter in named.items()}  # type: ignore[attr-defined]
    for parameter in named.values():  # else the head's gradient goes there, and autograd is given none
        del parameter.main_grad  # type: ignore[attr-defined]
    pairs, images = pairs_of(batch), models.images_for(model.chunks[0], batch)["images"]
    x = F.normalize(net.image_features(images)[pairs.images_B])
    y = F.normalize(net.text_features(pairs.tokens_X, pairs.cu_seqlens))
    if of.contrastive.loss == "clip":
        logits = x @ y.T * net.contrastive.scale()
        mine = torch.arange(len(x))
        loss = (F.cross_entropy(logits, mine) + F.cross_entropy(logits.T, mine)) / 2
    else:
        scale, bias = net.contrastive.scale()
        logits = x @ y.T * scale + bias
        loss = -F.logsigmoid(logits * (2 * torch.eye(len(x)) - 1)).sum() / len(x)
    losses = net(
        input_ids=batch.inputs, position_ids=batch.positions[None], attention_mask=None, labels=batch.labels,
        packed_seq_params=packed_params(batch.cu_seqlens, batch.max_seqlen), images=images,
    )  # fmt: skip
    captions = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    gradients = torch.autograd.grad(loss + 2 * captions, list(named.values()))
    away = {
        name: float((from_step[name] - gradient).norm() / gradient.norm().clamp(min=1e-6))
        for name, gradient in zip(named, gradients, strict=True)
    }
    cells = net.vision_tower(torch.zeros_like(images.patches, dtype=torch.float32), images.grids).detach()
    texts = pairs.tokens_X.split(pairs.cu_seqlens.diff().tolist())
    with torch.no_grad():
        singly = [net.text_features(text, torch.tensor([0, len(text)], dtype=torch.int32)) for text in texts]
        apart = float((torch.cat(singly) - net.text_features(pairs.tokens_X, pairs.cu_seqlens)).abs().max())
        text, bounds = torch.arange(5), torch.tensor([0, 5, 8], dtype=torch.int32)
        others = {
            "the last": text.index_fill(0, torch.tensor([4]), 9), "two": text[[0, 2, 1, 3, 4]], "another text": text
        }  # fmt: skip
        firsts = {
            name: net.contrastive.text_encoder(
                torch.cat((some, torch.full((3,), 1 + (name == "another text")))), bounds, 5
            )[0]
            for name, some in {"none": text, **others}.items()
        }
        first_of = {name: float((firsts[name] - firsts["none"]).abs().max()) for name in others}
    number = torch.tensor(1.0)
    # Torch counts the products of its plain attention, and not of the fused one for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        x = net.contrastive.images(cells, images.grids)[pairs.images_B]
        siglip(x, net.contrastive.texts(pairs.tokens_X, pairs.cu_seqlens), number, number)
    lengths, patches = pairs.cu_seqlens.diff().tolist(), images.grids.prod(-1).tolist()
    mean = float(found.pairs[0] / found.pairs[1])
    return Formula(mean, float(loss.detach()), away, apart, first_of, counter.get_total_flops(), lengths, patches)


def alone(of: Config, weights: dict[str, torch.Tensor], batches: list[PackedBatch]) -> dict[str, Any]:
    """`probe.gradients` with an error: each rank compares its own images with its own texts only."""
    with mock.patch("perilune.vision.pairs.siglip", lambda *features_and_scale: siglip(*features_and_scale[:4], None)):
        return probe.gradients(of, weights, batches, 0.0)


@dataclass(frozen=True)
class Trained:
    losses: list[tuple[float, float | None]]  # captions', contrastive, of each step
    moved: dict[str, float]  # the furthest that a weight of each part moved
    scale: float  # that the last step computed with
    dtypes: dict[str, torch.dtype]  # of the scale's parameters
    validation: step.Validation  # of the same batch, at the end


def train(loss: Any, steps: int, frozen: tuple[str, ...] = (), compute: Any = "fp32") -> Trained:
    """Some steps on the same batch, over the data-parallel ranks of this group."""
    of = config(loss, dp=dist.get_world_size(), zero1=True)
    of = replace(of, train=replace(of.train, freeze=frozen), precision=Precision(compute=compute))
    of = replace(of, model=replace(of.model, init_std=0.05), vision=replace(of.vision, init_std=0.05))
    of = replace(of, optim=replace(of.optim, lr=3e-3, eps=1e-8, clip=1.0))
    model = _built(of)
    adam = optimizer.build(of, model)
    (net,) = model.bare()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    (mine,) = fixture.batches("vlm", of.train.micro_batch_size)[
        parallel_state.get_data_parallel_rank() :: dist.get_world_size()
    ]
    plan = StepPlan(rows=fixture.ROWS, lr=of.optim.lr, mtp_weight=0.0, bias_speed=0.0)
    results = [step.train_step(model, adam, [mine], next_token, plan, clip=of.optim.clip) for _ in range(steps)]
    model.settle()
    moved: dict[str, float] = {}
    for name, parameter in net.named_parameters():
        change = float((parameter.detach() - before[name]).abs().max())
        moved[part_of(name)] = max(moved.get(part_of(name), 0.0), change)
    scale = results[-1].contrastive_scale
    assert scale is not None
    return Trained(
        [(result.loss, result.contrastive_loss) for result in results],
        moved,
        scale,
        {name: parameter.dtype for name, parameter in net.named_parameters() if ".scale." in name},
        step.evaluate(model, iter([(mine, 1)]), next_token),
    )


def decayed(loss: Any, name: Any, zero1: bool, compute: Any) -> dict[str, float]:
    """What is left of each weight, beside what was, after an update by gradients of nothing: decay alone."""
    of = config(loss, dp=dist.get_world_size(), zero1=zero1)
    of = replace(of, optim=replace(of.optim, name=name, weight_decay=0.5), precision=Precision(compute=compute))
    model = _built(of)
    adam = optimizer.build(of, model)
    (net,) = model.bare()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for group in adam.param_groups:
        group["lr"] = 1.0
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    adam.prepare_grads()
    optimizer.update(adam)
    return {
        name: float(parameter.detach().double().norm() / before[name].double().norm())
        for name, parameter in net.named_parameters()
        if float(before[name].norm())
    }


def pushed(zero1: bool, compute: Any) -> list[float]:
    """The logarithm of CLIP's scale after each of some updates by one, upwards, with a forward before each."""
    of = config("clip", dp=dist.get_world_size(), zero1=zero1)
    of = replace(of, precision=Precision(compute=compute))
    model = _built(of)
    adam = optimizer.build(of, model)
    (net,) = model.bare()
    for group in adam.param_groups:
        group["lr"] = 1.0
    found = []
    for _ in range(5):
        net.contrastive.scale()
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        net.contrastive.scale.log_scale.main_grad.fill_(-1.0)
        adam.prepare_grads()
        optimizer.update(adam)
        found.append(float(net.contrastive.scale.log_scale.detach()))
    return found


def _built(of: Config) -> models.Model:
    mesh = rules.mesh_of(of, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    return models.build(of, mesh)
