"""The one table between our checkpoints and Hugging Face's: each of their tensors is a block of one of ours.

DeepSeek-V3's hub names (experts one by one, MTP layers after the last layer with copies of embedding and head, as the
published checkpoint's README_WEIGHTS describes them). Read forwards it exports, read backwards it imports; a tensor
that is not in it does not exist. A model with a tower has Kimi-VL's names besides (`kimi_vl`, as vLLM and SGLang read
them), or Kimi-K2.5's, which differ in the projector alone and which transformers loads by itself (`kimi_k25`).

Legend: H hidden, V vocabulary, N heads, E experts, F expert FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perilune.pretrain.schema import Model, Vision

if TYPE_CHECKING:  # an export takes less time than to import torch
    import numpy as np
    import torch

FORMATS = ("deepseek_v3", "kimi_vl", "kimi_k25")
_PROJECTOR = {  # format -> the hub's names of the projector's parts
    "kimi_vl": ("multi_modal_projector.pre_norm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    "kimi_k25": ("mm_projector.pre_norm", "mm_projector.proj.0", "mm_projector.proj.2"),
}


@dataclass(frozen=True)
class Block:
    """`theirs` (of `shape`) is `ours[index]`, with `index` counted in the global tensor `ours` of a checkpoint."""

    theirs: str
    shape: tuple[int, ...]
    ours: str
    index: tuple[int | slice, ...] = ()
    fp32: bool = False  # stored in fp32 whatever the export's dtype
    router: bool = False  # stored in fp32 beside bf16 weights where it comes so, as transformers 5.24 saves it
    copy: bool = False  # a second copy of a tensor that stands elsewhere: written, checked on import, not read
    view: tuple[int, ...] = ()  # shape in ours where it differs: the same numbers in the same order
    heads: int = 0  # of a fused projection: ours has q, k, v head by head, theirs all of q, then all of k, then of v

    @property
    def shape_of_ours(self) -> tuple[int, ...]:
        """Of `ours[index]`."""
        return self.view or self.shape

    def to_theirs[A: (np.ndarray, torch.Tensor)](self, ours: A) -> A:
        """`ours[index]` as theirs has it."""
        if self.heads:
            ours = ours.reshape(self.heads, 3, -1, *ours.shape[1:]).swapaxes(0, 1)
        return ours.reshape(self.shape)

    def to_ours[A: (np.ndarray, torch.Tensor)](self, theirs: A) -> A:
        """The inverse of `to_theirs`."""
        if self.heads:
            theirs = theirs.reshape(3, self.heads, -1, *theirs.shape[1:]).swapaxes(0, 1)
        return theirs.reshape(self.shape_of_ours)

    @property
    def index_in_piece(self) -> tuple[int | slice, ...]:
        """`index` counted in the piece (`Tensor.pieces`) that holds it, which begins at its expert."""
        return tuple(0 if isinstance(at, int) else at for at in self.index)


def format_of(vision: Vision) -> str:
    """The format of a model unless somebody asks for another."""
    return "kimi_vl" if vision.num_layers else "deepseek_v3"


def blocks(m: Model, vision: Vision | None = None, names: str = "kimi_vl") -> Iterator[Block]:
    """Every tensor of a model of this shape, in the order in which files hold them; with a tower by `names`."""
    if vision is None or not vision.num_layers:
        yield from _decoder(m)
        return
    for block in _decoder(m):
        yield replace(block, theirs=f"language_model.{block.theirs}")
    yield from _tower(vision)
    H, merged = vision.hidden_size, vision.merge_size**2 * vision.hidden_size
    norm, first, second = _PROJECTOR[names]
    yield from _pair(norm, "multi_modal_projector.pre_norm", (H,))
    yield from _pair(first, "multi_modal_projector.linear_1", (merged, merged))
    yield from _pair(second, "multi_modal_projector.linear_2", (m.hidden_size, merged))


def at_least(m: Model, vision: Vision | None = None) -> int:
    """Blocks that a model of this shape has and more; without making them, of which a hostile shape has any number."""
    experts = max(0, m.num_layers - m.first_k_dense_replace) + m.num_nextn_predict_layers
    layers = m.num_layers + m.num_nextn_predict_layers + (vision.num_layers if vision else 0)
    return layers + 3 * m.n_routed_experts * experts


def _decoder(m: Model) -> Iterator[Block]:
    H, V = m.hidden_size, m.vocab_size
    yield Block("model.embed_tokens.weight", (V, H), "embedding.word_embeddings.weight")
    for layer in range(m.num_layers):
        expert = layer >= m.first_k_dense_replace
        yield from _layer(m, f"model.layers.{layer}", f"decoder.layers.{layer}", expert)
    for depth in range(m.num_nextn_predict_layers):
        theirs, ours = f"model.layers.{m.num_layers + depth}", f"mtp.layers.{depth}"
        yield Block(f"{theirs}.embed_tokens.weight", (V, H), "embedding.word_embeddings.weight", copy=True)
        yield Block(f"{theirs}.enorm.weight", (H,), f"{ours}.enorm.weight")
        yield Block(f"{theirs}.hnorm.weight", (H,), f"{ours}.hnorm.weight")
        yield Block(f"{theirs}.eh_proj.weight", (H, 2 * H), f"{ours}.eh_proj.weight")
        yield from _layer(m, theirs, f"{ours}.transformer_layer", bool(m.n_routed_experts))
        yield Block(f"{theirs}.shared_head.norm.weight", (H,), f"{ours}.final_layernorm.weight")
        yield Block(f"{theirs}.shared_head.head.weight", (V, H), "output_layer.weight", copy=True)
    yield Block("model.norm.weight", (H,), "decoder.final_layernorm.weight")
    yield Block("lm_head.weight", (V, H), "output_layer.weight")


@dataclass(frozen=True)
class Tensor:
    """A global tensor of a checkpoint: its shape, and the blocks that are it or copies of it."""

    name: str
    shape: tuple[int, ...]
    fp32: bool  # in fp32 whatever the model's dtype
    blocks: tuple[Block, ...]

    @property
    def router(self) -> bool:
        """Whether it may be in fp32 beside bf16 weights."""
        return self.blocks[0].router

    def in_fp32(self) -> Tensor:
        """The same tensor, in fp32 whatever the model's dtype."""
        return replace(self, fp32=True, blocks=tuple(replace(block, fp32=True) for block in self.blocks))

    def pieces(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[Block, ...]]]:
        """(offset, shape, blocks without copies) of the parts in which it is written: expert by expert, else whole."""
        own = [block for block in self.blocks if not block.copy]
        if not isinstance(own[0].index[0] if own[0].index else None, int):
            yield (0,) * len(self.shape), self.shape, tuple(own)
            return
        rest = len(self.shape) - 1
        for e in range(self.shape[0]):
            yield (e, *(0,) * rest), (1, *self.shape[1:]), tuple(b for b in own if b.index[0] == e)


def tensors(m: Model, vision: Vision | None = None, names: str = "kimi_vl") -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint of this model, in the order in which `blocks` first mentions them."""
    grouped: dict[str, list[Block]] = {}
    for block in blocks(m, vision, names):
        grouped.setdefault(block.ours, []).append(block)
    found = {}
    for name, group in grouped.items():
        shape = tuple(max(ends) for ends in zip(*(_ends(block) for block in group), strict=True))
        found[name] = Tensor(name, shape, group[0].fp32, tuple(group))
    return found


def _ends(block: Block) -> list[int]:
    """Where the block ends in each dim of its global tensor."""
    own, ends = list(block.shape_of_ours), []
    for at in block.index:
        if isinstance(at, int):
            ends.append(at + 1)
        else:
            ends.append(at.stop)
            own.pop(0)
    return ends + own


def _tower(v: Vision) -> Iterator[Block]:
    """MoonViT's (names: facts of the published checkpoint's header)."""
    H, F, side = v.hidden_size, v.intermediate_size, v.patch_size
    patches, tower = "vision_tower.patch_embed", "vision_tower.encoder"
    yield Block(f"{patches}.proj.weight", (H, 3, side, side), f"{patches}.proj.weight", view=(H, 3 * side**2))
    yield Block(f"{patches}.proj.bias", (H,), f"{patches}.proj.bias")
    table = (v.pos_emb_height, v.pos_emb_width, H)
    yield Block(f"{patches}.pos_emb.weight", table, f"{patches}.pos_emb.weight", view=(table[0] * table[1], H))
    for layer in range(v.num_layers):
        theirs, ours = f"{tower}.blocks.{layer}", f"{tower}.layers.{layer}"
        yield from _pair(f"{theirs}.norm0", f"{ours}.input_layernorm", (H,))
        yield from _pair(f"{theirs}.norm1", f"{ours}.pre_mlp_layernorm", (H,))
        yield from _pair(f"{theirs}.wqkv", f"{ours}.self_attention.linear_qkv", (3 * H, H), v.num_attention_heads)
        yield from _pair(f"{theirs}.wo", f"{ours}.self_attention.linear_proj", (H, H))
        yield from _pair(f"{theirs}.mlp.fc0", f"{ours}.mlp.linear_fc1", (F, H))
        yield from _pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.linear_fc2", (H, F))
    yield from _pair(f"{tower}.final_layernorm", f"{tower}.final_layernorm", (H,))


def _pair(theirs: str, ours: str, shape: tuple[int, ...], heads: int = 0) -> Iterator[Block]:
    """Weight and bias."""
    yield Block(f"{theirs}.weight", shape, f"{ours}.weight", heads=heads)
    yield Block(f"{theirs}.bias", shape[:1], f"{ours}.bias", heads=heads)


def _layer(m: Model, theirs: str, ours: str, expert: bool) -> Iterator[Block]:
    H, N = m.hidden_size, m.num_attention_heads
    qk, kv = m.qk_nope_head_dim + m.qk_rope_head_dim, m.qk_nope_head_dim + m.v_head_dim
    yield Block(f"{theirs}.input_layernorm.weight", (H,), f"{ours}.input_layernorm.weight")
    a, b = f"{theirs}.self_attn", f"{ours}.self_attention"
    if m.q_lora_rank is None:
        yield Block(f"{a}.q_proj.weight", (N * qk, H), f"{b}.linear_q_proj.weight")
    else:
        yield Block(f"{a}.q_a_proj.weight", (m.q_lora_rank, H), f"{b}.linear_q_down_proj.weight")
        yield Block(f"{a}.q_a_layernorm.weight", (m.q_lora_rank,), f"{b}.q_layernorm.weight")
        yield Block(f"{a}.q_b_proj.weight", (N * qk, m.q_lora_rank), f"{b}.linear_q_up_proj.weight")
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    yield Block(f"{a}.kv_a_proj_with_mqa.weight", (latent, H), f"{b}.linear_kv_down_proj.weight")
    yield Block(f"{a}.kv_a_layernorm.weight", (m.kv_lora_rank,), f"{b}.kv_layernorm.weight")
    yield Block(f"{a}.kv_b_proj.weight", (N * kv, m.kv_lora_rank), f"{b}.linear_kv_up_proj.weight")
    yield Block(f"{a}.o_proj.weight", (H, N * m.v_head_dim), f"{b}.linear_proj.weight")
    yield Block(f"{theirs}.post_attention_layernorm.weight", (H,), f"{ours}.pre_mlp_layernorm.weight")
    if not expert:
        yield from _swiglu(f"{theirs}.mlp", f"{ours}.mlp", H, m.intermediate_size)
        return
    a, b, F = f"{theirs}.mlp", f"{ours}.mlp", m.moe_intermediate_size
    yield Block(f"{a}.gate.weight", (m.n_routed_experts, H), f"{b}.router.weight", router=True)
    yield Block(f"{a}.gate.e_score_correction_bias", (m.n_routed_experts,), f"{b}.router.expert_bias", fp32=True)
    for e in range(m.n_routed_experts):
        w1, w2 = f"{b}.experts.experts.linear_fc1.weight", f"{b}.experts.experts.linear_fc2.weight"
        yield Block(f"{a}.experts.{e}.gate_proj.weight", (F, H), w1, (e, slice(0, F)))
        yield Block(f"{a}.experts.{e}.up_proj.weight", (F, H), w1, (e, slice(F, 2 * F)))
        yield Block(f"{a}.experts.{e}.down_proj.weight", (H, F), w2, (e,))
    if m.n_shared_experts:
        yield from _swiglu(f"{a}.shared_experts", f"{b}.shared_experts", H, m.n_shared_experts * F)


def _swiglu(theirs: str, ours: str, H: int, F: int) -> Iterator[Block]:
    yield Block(f"{theirs}.gate_proj.weight", (F, H), f"{ours}.linear_fc1.weight", (slice(0, F),))
    yield Block(f"{theirs}.up_proj.weight", (F, H), f"{ours}.linear_fc1.weight", (slice(F, 2 * F),))
    yield Block(f"{theirs}.down_proj.weight", (H, F), f"{ours}.linear_fc2.weight")
