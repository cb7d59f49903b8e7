"""MoonViT: images at their own resolution, packed patch after patch (Kimi-VL, arXiv 2504.07491, section 2.1).

Patches of all images of a micro-batch stand end to end, each image row by row, none padded. Positions are told twice:
a learned table, interpolated to each image's grid, and 2-D RoPE. Attention is bidirectional and ends with the image.
The blocks are Megatron-core's own layers by spec, split over tensor-parallel ranks without sequence parallelism, for
the number of patches divides by nothing; what is not split gets the same gradient on each of those ranks.

P patches, I images, M = P / 4 merged cells, H hidden, N heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from perilune.kernels.attention import image_attention
from perilune.kernels.rope import rotate_neighbours
from perilune.parallel import recompute
from perilune.parallel.mesh import Mesh
from perilune.parallel.precision import spec_provider


@dataclass(frozen=True)
class VisionConfig:
    """Everything that shapes tower and projector; `vision` has the fields of `pretrain.schema.Vision`."""

    vision: Any
    text_hidden: int  # of the decoder
    mesh: Mesh
    dtype: torch.dtype = torch.float32
    recompute_granularity: str = "none"  # full: each block keeps its input alone
    recompute_modules: tuple[str, ...] = ()  # of selective: the decoder's too, of which some are the tower's
    contrastive: Any = None  # the fields of `pretrain.schema.Contrastive`; None: images are compared with nothing
    vocab_size: int = 0  # of the texts that they are compared with


def transformer_config(config: VisionConfig, sizes: Any = None) -> TransformerConfig:
    """Megatron-core's config of the tower, a model of one pipeline stage, or of such blocks of other `sizes`."""
    sizes = sizes or config.vision
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        ffn_hidden_size=sizes.intermediate_size,
        normalization="LayerNorm",
        layernorm_epsilon=config.vision.layer_norm_eps,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        add_qkv_bias=True,
        rotary_interleaved=True,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_layer_freq=[0] * sizes.num_layers,  # no experts; as a list, it makes a checkpoint name each layer
        perform_initialization=False,  # moe/init.py draws the weights
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=config.dtype,
        bf16=config.dtype is torch.bfloat16,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=config.mesh.tp,
        sequence_parallel=False,
        **recompute.settings(config.recompute_granularity, recompute.of_tower(config.recompute_modules)),
    )


@dataclass
class PackedImages(PackedSeqParams):
    """Where images end among the patches, on its way through Megatron-core's attention, to which they are one sequence.

    (Told that tokens are packed, it would hand its RoPE a tensor without a batch, which adjacent pairs do not take.)
    """

    images: torch.Tensor = None  # type: ignore[assignment]  # [I + 1] int32 boundaries
    longest: int = 0  # patches of the largest image
    turns: torch.Tensor | None = None  # [P, 1, D / 2] complex, of RoPE; None: queries and keys are turned already


class ImageAttention(torch.nn.Module):
    """RoPE and attention inside each image; takes Megatron-core's arguments for a core attention.

    (Megatron-core's own RoPE, before the core, takes sines and cosines anew in every layer, of queries and of keys.)
    """

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        del args, kwargs
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self, q_P1ND: torch.Tensor, k_P1ND: torch.Tensor, v_P1ND: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Returns [P, 1, N * D]."""
        packed: PackedImages = kwargs["packed_seq_params"]
        q, k, v = (x.squeeze(1) for x in (q_P1ND, k_P1ND, v_P1ND))
        if packed.turns is not None:
            q, k = (rotate_neighbours(x, packed.turns) for x in (q, k))
        out_PND = image_attention(q, k, v, packed.images, packed.longest, self.softmax_scale)
        return out_PND.flatten(1).unsqueeze(1)


class PatchEmbedding(torch.nn.Module):
    """Pixels of a patch to its vector, plus the learned position of its place in the image."""

    def __init__(self, vision: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = (vision.pos_emb_height, vision.pos_emb_width)
        # The hub's convolution whose stride is its kernel, [H, 3, 14, 14] flattened, and its table, [64, 64, H].
        self.proj = torch.nn.Linear(3 * vision.patch_size**2, vision.hidden_size, dtype=dtype)
        self.pos_emb = torch.nn.Embedding(self.size[0] * self.size[1], vision.hidden_size, dtype=dtype)

    def forward(self, patches: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """[P, 3, 14, 14] to [P, H]."""
        table = self.pos_emb.weight.view(*self.size, -1)
        positions = [_interpolated(table, down, across) for down, across in grids]
        embedded: torch.Tensor = self.proj(patches.flatten(1))
        return embedded + torch.cat(positions)


def _interpolated(table_YXH: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """[down * across, H]: bicubic, as of images (corners not aligned), one axis after the other."""
    rows, columns = table_YXH.shape[:2]
    if (down, across) != (rows, columns):
        vertical, horizontal = (w.to(table_YXH.device) for w in (_bicubic(rows, down), _bicubic(columns, across)))
        wide = torch.einsum("dy,yxh->dxh", vertical, table_YXH.float())
        table_YXH = torch.einsum("ax,dxh->dah", horizontal, wide).to(table_YXH.dtype)
    return table_YXH.reshape(down * across, -1)


@lru_cache(maxsize=512)
def _bicubic(size: int, target: int) -> torch.Tensor:
    """[target, size]: how much each of `size` points counts for each of `target` ones, as PyTorch interpolates."""
    unit = torch.eye(size)[None, :, :, None]  # a channel for each point
    return F.interpolate(unit, size=(target, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.contiguous()


@lru_cache(maxsize=64)
def turns(down: int, across: int, dim: int, theta: float) -> torch.Tensor:
    """[down * across, dim / 2] complex, 2-D RoPE's: frequency i turns pair 2i by the column, pair 2i + 1 by the row."""
    frequencies = theta ** (-torch.arange(0, dim, 4, dtype=torch.float64) / dim)
    y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    angles = torch.stack((x, y), -1).reshape(-1, 1, 2) * frequencies[:, None]  # [P, dim / 4, (x, y)]
    return torch.polar(torch.ones((), dtype=torch.float64), angles).to(torch.complex64).flatten(1)


class MoonViT(MegatronModule):
    """The tower. Under the hub's names: `patch_embed`, and `encoder` with Megatron-core's layers."""

    def __init__(self, config: VisionConfig) -> None:
        mc = transformer_config(config)
        super().__init__(config=mc)
        self.vision = config.vision
        self.patch_embed = PatchEmbedding(config.vision, config.dtype)
        self.encoder = TransformerBlock(mc, block(mc.num_layers), pre_process=True, post_process=True)
        self.encoder.to(config.dtype)  # torch's LayerNorm, as Megatron-core wraps it, is fp32 whatever `params_dtype`

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Features [M, 4, H] of normalized `patches` [P, 3, 14, 14]; `grids` [I, 2] are patches (down, across).

        The last axis but one holds the 2 x 2 patches of a cell, row by row, as the projector concatenates them.
        Raises ValueError for grids that are not of these patches, or that 2 x 2 cells do not fill.
        """
        sizes = [(int(down), int(across)) for down, across in grids.tolist()]
        if patches.shape[0] != sum(down * across for down, across in sizes):
            raise ValueError(
                f"{patches.shape[0]} patches for images of {sizes} patches (down, across): "
                "give the patches of each image, all of them and no others"
            )
        if odd := [size for size in sizes if size[0] % 2 or size[1] % 2 or not min(size)]:
            raise ValueError(
                f"images of {odd} patches (down, across) are not whole 2 x 2 cells: fill them up to even sides"
            )
        hidden_P1H = self.patch_embed(patches, sizes)[:, None]
        dim = self.vision.hidden_size // self.vision.num_attention_heads
        turned = torch.cat([turns(*size, dim, self.vision.rope_theta) for size in sizes]).to(hidden_P1H.device)
        lengths = [down * across for down, across in sizes]
        bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=hidden_P1H.device)
        packed = PackedImages(qkv_format="sbhd", images=bounds, longest=max(lengths), turns=turned[:, None])
        hidden_P1H = self.encoder(hidden_P1H, attention_mask=None, packed_seq_params=packed)
        return merged(hidden_P1H.squeeze(1), sizes)


def merged(hidden_PH: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
    """[P, H] of images row by row to [M, 4, H]: 2 x 2 neighbours together."""
    cells = []
    for part, (down, across) in zip(hidden_PH.split([d * a for d, a in grids]), grids, strict=True):
        cells.append(part.view(down // 2, 2, across // 2, 2, -1).transpose(1, 2).reshape(-1, 4, hidden_PH.shape[-1]))
    return torch.cat(cells)


class FeedForward(MLP):
    """Megatron-core's, which adds the bias of its output itself.

    (Megatron-core hands the bias out, to be added later. Handed out of a recomputed function a weight becomes this
    function's result, and so part of its own backward, which never ends.)
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """As `MLP`'s, without a bias left to add."""
        out, bias = super().forward(hidden_states, *args, **kwargs)
        return out if bias is None else out + bias, None


def backend() -> Any:
    """Whose linear layers and norms the vision side has: Transformer Engine's or Megatron-core's local ones."""
    return spec_provider(WrappedTorchNorm, ImageAttention, torch.nn.Identity)


def block(layers: int) -> TransformerBlockSubmodules:
    """The spec of so many layers, and of a norm after them."""
    modules = backend()
    column, row, norm = modules.column_parallel_linear(), modules.row_parallel_linear(), modules.layer_norm()
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=ImageAttention, linear_proj=row),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=partial(FeedForward.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
