"""What the processes of tests/parallel/test_oracles.py do; each function runs on every rank of a group.

T tokens of the global batch, in the order of its rows; E experts, D the MTP depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file

from perilune.parallel import mesh as meshes
from perilune.pretrain import model as models
from perilune.pretrain import rules, step
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.objective import next_token
from perilune.pretrain.parity import probe
from perilune.pretrain.schema import Config


@dataclass(frozen=True)
class Seen:
    """One rank's view of a global batch."""

    sums: np.ndarray  # [2, 1+D] sums and counts of the losses
    gradients: list[probe.Piece]
    loss_tokens: np.ndarray  # which tokens `losses` are of
    losses: np.ndarray | None  # [1+D, tokens]; None on a pipeline stage without the loss
    routed_tokens: np.ndarray  # which tokens this rank's routers saw
    routed: dict[int, np.ndarray]  # layer -> [tokens, E] whether the expert is chosen


def run(config: Config, weights: str, batches: list[PackedBatch], mtp_weights: tuple[float, ...]) -> list[Seen]:
    """The global batch once for each MTP weight, from the tensors of the file `weights` under Hugging Face's names.

    `config.parallel.zero1` must be False, so that every data-parallel rank holds whole gradients.
    """
    mesh = rules.mesh_of(config, dist.get_world_size())
    meshes.start(mesh, timeout_s=60)
    model = models.build(config, mesh)
    probe.load(config, model, load_file(weights))
    routed: dict[int, list[torch.Tensor]] = {}
    losses: list[torch.Tensor] = []

    def keep(router: Any, arguments: Any, result: tuple[torch.Tensor, torch.Tensor], *, layer: int) -> None:
        routed[layer].append(result[1].cpu())

    def objective(losses_DT: torch.Tensor, batch: PackedBatch, mtp_weight: float) -> Any:
        losses.append(losses_DT.detach().cpu())
        return next_token(losses_DT, batch, mtp_weight)

    for layer, router in model.routers():
        router.register_forward_hook(partial(keep, layer=layer))
    rank = parallel_state.get_data_parallel_rank()
    tokens_MT = torch.arange(sum(b.inputs.shape[1] for b in batches)).view(len(batches), -1)[rank :: mesh.dp]
    mine_MT = tokens_MT.chunk(mesh.tp, dim=1)[parallel_state.get_tensor_model_parallel_rank()]  # sequence parallel
    seen = []
    for mtp_weight in mtp_weights:
        losses.clear()
        routed.update({layer: [] for layer, _ in model.routers()})
        sums, *_ = step.forward_backward(model, batches[rank :: mesh.dp], objective, mtp_weight, bias_speed=0.0)
        seen.append(
            Seen(
                sums=sums.numpy(),
                gradients=probe.pieces(model, lambda tensor: getattr(tensor, "main_grad", None)),
                loss_tokens=tokens_MT.flatten().numpy(),
                losses=torch.cat(losses, dim=1).numpy() if losses else None,
                routed_tokens=mine_MT.flatten().numpy(),
                routed={layer: torch.cat(maps).numpy() for layer, maps in routed.items()},
            )
        )
    return seen
