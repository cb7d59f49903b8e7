"""Tower and projector in processes that are a group: functions of `parallel.workers.Workers`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import presets, rules
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.parity import fixture
from perilune.pretrain.schema import Parallel, Recompute
from perilune.pretrain.step import StepResult, train_step
from perilune.pretrain.timetable import StepPlan
from perilune.vision.images import normalize
from perilune.vision.vlm import Images, VisionLanguageModel

GRIDS = [(4, 6), (2, 2), (8, 4), (4, 4)]  # the last is the table's own size
TINY = presets.get("tiny_vl")
VISION, TEXT = TINY.vision, TINY.model.hidden_size


@dataclass(frozen=True)
class Made:
    """What one process made of images of GRIDS."""

    patches: torch.Tensor  # [P, 3, 14, 14] uint8
    weights: dict[str, torch.Tensor]
    cells: torch.Tensor  # [M, 4, H]
    grad_cells: torch.Tensor  # of the sum that `gradients` are of
    gradients: dict[str, torch.Tensor]
    features: torch.Tensor  # [M, text hidden]
    alone: list[torch.Tensor]  # the same, each image by itself
    flops: int  # of a forward pass of tower and projector, as torch counts


def _built(parallel: Parallel = Parallel()) -> models.Model:  # noqa: B008 (frozen)
    config = replace(TINY, parallel=parallel)
    mesh = rules.mesh_of(config, torch.distributed.get_world_size())
    meshes.start(mesh, timeout_s=60)
    return models.build(config, mesh)


def make() -> Made:
    model = _built()  # while it lives, its DDP collects gradients
    (net,) = model.bare()
    assert isinstance(net, VisionLanguageModel)
    generator = torch.Generator().manual_seed(0)
    seeing = {name: p for name, p in net.named_parameters() if name.startswith(("vision_", "multi_"))}
    with torch.no_grad():
        for name, parameter in seeing.items():  # off their neutral values, and large enough to matter
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
    sizes = [d * a for d, a in GRIDS]
    patches = torch.randint(0, 256, (sum(sizes), 3, 14, 14), dtype=torch.uint8, generator=generator)
    nowhere = torch.zeros(0, dtype=torch.int64)
    images = Images(patches, torch.tensor(GRIDS), nowhere, nowhere)
    # Torch counts the products of its plain attention, and not of the fused one for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        features = net.features(images)
    cells = net.vision_tower(normalize(patches), images.grids)
    grad_cells = torch.randn(cells.shape, generator=generator)
    tower = {name: parameter for name, parameter in seeing.items() if name.startswith("vision_")}
    for parameter in tower.values():
        parameter.main_grad.zero_()  # type: ignore[attr-defined]
    (cells * grad_cells).sum().backward()
    with torch.no_grad():
        alone = [
            net.features(Images(part, torch.tensor([grid]), nowhere, nowhere))
            for part, grid in zip(patches.split(sizes), GRIDS, strict=True)
        ]
    return Made(
        patches,
        {name: parameter.detach().clone() for name, parameter in seeing.items()},
        cells.detach(),
        grad_cells,
        {name: parameter.main_grad.clone() for name, parameter in tower.items()},  # type: ignore[attr-defined]
        features,
        alone,
        counter.get_total_flops(),
    )


def frozen(parts: tuple[str, ...], parallel: Parallel, recompute: str = "none") -> dict[str, float]:
    """How far a step moves each of this rank's weights and router biases, with these parts frozen."""
    base = fixture.config("vlm")
    train = replace(base.train, freeze=parts)
    config = replace(base, parallel=parallel, recompute=Recompute(recompute), train=train)  # type: ignore[arg-type]
    mesh = rules.mesh_of(config, torch.distributed.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    adam = optimizer.build(config, net)

    def moving() -> dict[str, torch.Tensor]:
        named = [pair for chunk in net.bare() for pair in (*chunk.named_parameters(), *chunk.named_buffers())]
        return {n: p.detach() for n, p in named if isinstance(p, torch.nn.Parameter) or n.endswith("expert_bias")}

    before = {name: tensor.clone() for name, tensor in moving().items()}
    batch = fixture.batches("vlm", 1)[torch.distributed.get_rank() % mesh.dp :: mesh.dp]
    plan = StepPlan(rows=fixture.ROWS, lr=1e-2, mtp_weight=0.0, bias_speed=1e-3)
    result = train_step(net, adam, batch, next_token, plan, clip=0.0)
    assert not result.skipped
    net.settle()
    after = moving()
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def without_images(side: int) -> StepResult:
    """A step on rows without images, of a tower that reads patches of `side` pixels."""
    base = fixture.config("vlm")
    config = replace(base, vision=replace(base.vision, patch_size=side))
    mesh = rules.mesh_of(config, torch.distributed.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    plan = StepPlan(rows=fixture.ROWS, lr=1e-3, mtp_weight=0.0, bias_speed=0.0)
    batch = fixture.batches("no-mtp", 4)
    return train_step(net, optimizer.build(config, net), batch, next_token, plan, clip=1.0)


def trained_flops(cases: list[tuple[str, ...]]) -> list[int]:
    """FLOPs that torch counts of tower and projector, forward and backward on images of GRIDS, with parts frozen."""
    sizes = sum(d * a for d, a in GRIDS)
    nowhere = torch.zeros(0, dtype=torch.int64)
    images = Images(torch.zeros((sizes, 3, 14, 14), dtype=torch.uint8), torch.tensor(GRIDS), nowhere, nowhere)
    mesh = rules.mesh_of(TINY, 1)
    meshes.start(mesh, timeout_s=60)
    found = []
    for parts in cases:
        config = replace(TINY, train=replace(TINY.train, freeze=parts))
        (net,) = models.build(config, mesh).bare()
        assert isinstance(net, VisionLanguageModel)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            features = net.features(images)
            if features.requires_grad:
                features.sum().backward()
        found.append(counter.get_total_flops())
    return found


@dataclass(frozen=True)
class Steps:
    """Some steps on text and images."""

    losses: list[float]
    weights: set[torch.dtype]
    masters: set[torch.dtype]
    mastered: float  # share of weights that have a master of their own
    largest_update: dict[str, float]  # of each part


def steps(compute: str) -> Steps:
    """Two on the batch of the parity fixture, in this type."""
    base = fixture.config("vlm")
    config = replace(base, precision=replace(base.precision, compute=compute))
    mesh = rules.mesh_of(config, torch.distributed.get_world_size())
    meshes.start(mesh, timeout_s=60)
    net = models.build(config, mesh)
    adam = optimizer.build(config, net)
    plan = StepPlan(rows=fixture.ROWS, lr=1e-3, mtp_weight=0.0, bias_speed=0.0)
    (chunk,) = net.bare()
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    results = [train_step(net, adam, fixture.batches("vlm", 2), next_token, plan, clip=1.0) for _ in range(2)]
    assert not any(result.skipped for result in results)
    moved: dict[str, float] = {}
    for name, p in chunk.named_parameters():
        part, away = name.partition(".")[0], float((p.detach() - before[name]).abs().max())
        moved[part] = max(away, moved.get(part, 0.0))
    masters = [
        (weight, master)
        for one in adam.chained_optimizers
        for weights, wide in zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True)
        for weight, master in zip(weights, wide, strict=True)
    ]
    assert all(torch.equal(master.to(weight.dtype).view_as(weight), weight) for weight, master in masters)
    return Steps(
        [result.loss for result in results],
        {p.dtype for n, p in chunk.named_parameters() if "router" not in n},
        {master.dtype for _, master in masters},
        sum(master.numel() for _, master in masters) / sum(p.numel() for p in chunk.parameters()),
        moved,
    )
