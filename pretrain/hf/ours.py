"""Our model on given tokens, from the tensors of a Hugging Face folder, in a process that is a group of one.

Functions of `parallel.workers.Workers`; what takes seconds to import is imported when they run.

T tokens, V vocabulary, D the MTP depth.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perilune.pretrain.hf.table import Tensor, tensors
from perilune.pretrain.hf.verify_images import Answer, Prompt
from perilune.pretrain.hf.weights import WeightFolder
from perilune.pretrain.schema import Config, Model, Precision, Vision


def logits(folder: str, model: Model, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [1+D, T, V] of each row (a document of token ids) by our model in fp32, its weights from `folder`."""
    from perilune.moe import backbone
    from perilune.parallel import mesh as meshes
    from perilune.pretrain import model as models
    from perilune.pretrain import rules

    config = replace(Config(), model=model, precision=Precision(compute="fp32"))
    mesh = rules.mesh_of(config, 1)
    meshes.start(mesh)
    net = backbone.build(models.backbone_config(config, mesh)).to(meshes.device())
    with WeightFolder(Path(folder)) as weights, torch.no_grad():
        fill(net, tensors(model), weights)
    net.eval()
    return [forward(net, model, row) for row in rows]


def answer(folder: str, model: Model, vision: Vision, names: str, asked: Prompt) -> Answer:
    """What our model with a tower makes of a prompt with images, in fp32, its weights from `folder`."""
    from perilune.moe.backbone import packed_params
    from perilune.parallel import mesh as meshes
    from perilune.pretrain import model as models
    from perilune.pretrain import rules
    from perilune.vision import vlm
    from perilune.vision.images import normalize

    config = replace(Config(), model=model, vision=vision, precision=Precision(compute="fp32"))
    mesh = rules.mesh_of(config, 1)
    meshes.start(mesh)
    (net,) = models.build_chunks(config, mesh)
    assert isinstance(net, vlm.VisionLanguageModel)
    device, length = meshes.device(), len(asked.ids)
    net.to(device).eval()
    with WeightFolder(Path(folder)) as weights, torch.no_grad():
        fill(net, tensors(model, vision, names), weights)
        net.scale.tokens_per_row = length
        images = vlm.images_of(asked.patches, asked.grids, torch.tensor(asked.index), length).to(device)
        logits = net(
            input_ids=torch.tensor([asked.ids], device=device),
            position_ids=torch.arange(length, device=device)[None],
            images=images,
            attention_mask=None,
            labels=None,
            packed_seq_params=packed_params(torch.tensor([0, length], dtype=torch.int32, device=device), length),
        )
        cells = net.vision_tower(normalize(images.patches), images.grids)
    return Answer(logits[0].float().cpu(), cells.float().cpu())


def fill(net: torch.nn.Module, table: dict[str, Tensor], weights: WeightFolder) -> None:
    """Every parameter and persistent buffer of the one-process model `net` from `weights`."""
    state = net.state_dict(keep_vars=True)
    left = dict(table)
    for name, entry in net.sharded_state_dict().items():  # type: ignore[operator]
        if name.endswith("_extra_state"):
            continue
        tensor = left.pop(entry.key)
        for block in tensor.blocks:
            if not block.copy:
                state[name][block.index].copy_(block.to_ours(weights.read(block.theirs)))
    if left:
        raise RuntimeError(f"the model has no place for {sorted(left)[:3]}")


def forward(net: Any, model: Model, row: list[int]) -> torch.Tensor:
    """Logits [1+D, T, V] of `row`; at depth k the last k positions have no input and mean nothing."""
    from perilune.moe.backbone import packed_params
    from perilune.parallel import mesh as meshes

    device, length = meshes.device(), len(row)
    net.scale.tokens_per_row = length
    inputs = torch.tensor([row[k:] + [0] * k for k in range(1 + model.num_nextn_predict_layers)], device=device)
    with torch.no_grad():
        out = net(
            input_ids=inputs,
            position_ids=torch.arange(length, device=device)[None],
            attention_mask=None,
            labels=None,
            packed_seq_params=packed_params(torch.tensor([0, length], dtype=torch.int32, device=device), length),
        )
    return out.float().cpu()
