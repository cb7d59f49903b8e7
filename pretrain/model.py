"""From a run's config to this rank's model: the backbone's pieces, in the compute type, behind Megatron-core's DDP."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer

from perilune.moe import backbone
from perilune.moe.init import draw_weights
from perilune.moe.router import Router, StepScale
from perilune.parallel import context, precision
from perilune.parallel import mesh as meshes
from perilune.parallel.mesh import Mesh
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.pairs import pairs_of
from perilune.pretrain.plan.stages import layout_of
from perilune.pretrain.rules import PARTS, part_of
from perilune.pretrain.schema import Config, Contrastive
from perilune.vision import vlm
from perilune.vision.moonvit import PatchEmbedding, VisionConfig

SEEING = PARTS[:3]  # every other part of a chunk is the language model


def backbone_config(config: Config, mesh: Mesh) -> backbone.BackboneConfig:
    """The part of a run's config that shapes the decoder."""
    return backbone.BackboneConfig(
        model=config.model,
        mesh=mesh,
        dtype=precision.dtype(config.precision.compute),
        dispatcher=config.parallel.dispatcher,
        fp8=config.precision.fp8,
        layout=layout_of(config.model, config.parallel, config.vision),
        recompute_granularity=config.recompute.granularity,
        recompute_modules=config.recompute.modules,
        kernels=asdict(config.kernels),
    )


def vision_config(config: Config, mesh: Mesh) -> VisionConfig:
    """The part of a run's config that shapes tower, projector and what images are compared with."""
    return VisionConfig(
        vision=config.vision,
        text_hidden=config.model.hidden_size,
        mesh=mesh,
        dtype=precision.dtype(config.precision.compute),
        recompute_granularity=config.recompute.granularity,
        recompute_modules=config.recompute.modules,
        contrastive=config.contrastive if config.contrastive.loss != "none" else None,
        vocab_size=config.model.vocab_size,
    )


def build_chunks(config: Config, mesh: Mesh) -> list[backbone.Backbone]:
    """This rank's chunks, bare, with weights not yet drawn: decoders, the first of all with a tower if there is one."""
    shape = backbone_config(config, mesh)
    stages = range(mesh.vpp) if mesh.vpp > 1 else [None]
    if config.vision.num_layers:
        return [vlm.build(shape, vision_config(config, mesh), vp_stage=stage) for stage in stages]
    return [backbone.build(shape, vp_stage=stage) for stage in stages]


@dataclass
class Model:
    """This rank's chunks of the decoder (one, or vpp of them), each behind Megatron-core's DDP."""

    chunks: list[DistributedDataParallel]
    contrastive: Contrastive | None = None  # None: images are compared with nothing

    @property
    def megatron_config(self) -> Any:
        """Megatron-core's config, which its schedules and optimizer read."""
        return self.chunks[0].config

    def bare(self) -> list[backbone.Backbone]:
        """The chunks without DDP and mixed-precision wrappers."""
        return [_bare(chunk) for chunk in self.chunks]

    def routers(self) -> list[tuple[int, Router]]:
        """(layer index from 0, router) of this rank's expert layers; MTP's follow after the last layer."""
        found = []
        for chunk in self.bare():
            for module in chunk.modules():
                if isinstance(module, Router):
                    after = self.megatron_config.num_layers if module.is_mtp_layer else 0
                    found.append((int(module.layer_number or 1) - 1 + after, module))
        return found

    def scales(self) -> list[StepScale]:
        """What the routers of each chunk know of the global batch."""
        return [chunk.scale for chunk in self.bare()]

    def settle(self) -> None:
        """Wait for weights that are still to be gathered after an update, before they are read other than by a step."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.train(mode)


def build(config: Config, mesh: Mesh) -> Model:
    """This rank's model with weights drawn from `train.seed`, on this rank's device."""
    shape = backbone_config(config, mesh)
    parts: list[torch.nn.Module] = list(build_chunks(config, mesh))
    for part in parts:
        _freeze(part, config.train.freeze)
        part.to(meshes.device())
        draw_weights(part, config.train.seed, lambda name: _std(config, name))
        for parameter in part.parameters():  # Megatron-core's layers carry marks that its DDP asks for
            parameter.allreduce = getattr(parameter, "allreduce", True)  # type: ignore[attr-defined]
    megatron = backbone.transformer_config(shape)
    if shape.dtype is torch.bfloat16:
        parts = [Float16Module(megatron, part) for part in parts]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.zero1,
        check_for_nan_in_grad=False,  # a bad gradient skips the step on every rank (pretrain/step.py), not one process
        bucket_size=None,
    )
    # It would say at every start that it computes the layout of its buffers itself.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    chunks = [
        DistributedDataParallel(parts[0].config, ddp, part, disable_bucketing=index > 0)
        for index, part in enumerate(parts)
    ]
    if ddp.overlap_grad_reduce:  # only the last micro-batch's backward starts the reduction
        no_sync = [chunk.no_sync for chunk in chunks]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if ddp.overlap_param_gather:
        for chunk in chunks:
            _wait_for_weights_read_from_outside(chunk)
    return Model(chunks, config.contrastive if config.contrastive.loss != "none" else None)


def _std(config: Config, name: str) -> float:
    """Of the weight `name` when it is drawn: tower and decoder differ in width, and so in what suits them."""
    return config.vision.init_std if part_of(name) in SEEING else config.model.init_std


def _freeze(part: torch.nn.Module, frozen: tuple[str, ...]) -> None:
    """Let the parameters of the parts named want no gradient, and their routers' biases stay (`train.freeze`)."""
    for name, parameter in part.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad = False
    for name, module in part.named_modules():
        if isinstance(module, Router) and part_of(name) in frozen:
            module.frozen_expert_bias = True  # Megatron-core's, by which it leaves a bias alone


def _bare(chunk: DistributedDataParallel) -> backbone.Backbone:
    module = chunk.module
    return module.module if isinstance(module, Float16Module) else module


def images_for(chunk: DistributedDataParallel, batch: PackedBatch) -> dict[str, Any]:
    """What a chunk's forward is given besides tokens: images, where it is the first of a model with a tower.

    And where images are compared with texts, the pairs.

    `batch` is the whole micro-batch, on the CPU.
    """
    bare = _bare(chunk)
    if not (isinstance(bare, vlm.VisionLanguageModel) and bare.pre_process):
        return {}
    tokens, held = batch.inputs.shape[1], None
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        rank = parallel_state.get_context_parallel_rank()
        held = context.cut(batch.rows, batch.seq_len, batch.cu_seqlens, rank, size).index_Q
    tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    side = bare.vision_tower.vision.patch_size  # which a batch without images does not know
    patches = batch.patches if len(batch.grids) else batch.patches.new_empty(0, 3, side, side)
    images = vlm.images_of(patches, batch.grids, batch.image_index, tokens, held, tp)
    given: dict[str, Any] = {"images": images.to(meshes.device())}
    if hasattr(bare, "contrastive"):
        given["pairs"] = pairs_of(batch).to(meshes.device())
    return given


def _wait_for_weights_read_from_outside(chunk: DistributedDataParallel) -> None:
    """Let expert layers wait for their experts' weights, the loss for the head's, and patches for their positions'.

    They may read them without calling the module that holds them, and Megatron-core's DDP waits where a module is
    called for the weights that are its own.
    """

    def wait(holder: torch.nn.Module) -> None:
        for parameter in holder.parameters():
            if parameter.requires_grad:  # else DDP knows nothing of it
                chunk.param_to_bucket_group[parameter].finish_param_sync()

    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(lambda layer, arguments: wait(layer.experts))
        elif isinstance(module, PatchEmbedding):
            module.register_forward_pre_hook(lambda embed, arguments: wait(embed.pos_emb))
        elif isinstance(module, backbone.TokenLoss):
            module.register_forward_pre_hook(lambda loss, arguments: wait(arguments[0]))
