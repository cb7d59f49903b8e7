"""Kimi-VL-A3B: Moonlight with MoonViT-SO-400M before it, 16.4B parameters (arXiv 2504.07491)."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.moonlight_16b_a3b import moonlight_16b_a3b
from perilune.pretrain.schema import Config, Contrastive, Data, Model, Train, Vision

STAGES = ("vit", "align", "joint", "cooldown", "long_32k", "long_128k")


def kimi_vl_a3b(stage: str = "joint") -> Config:
    """Kimi-VL's six runs, each after the one before; the text run that `align` and `joint` go on from is Moonlight's.

    Source: arXiv 2504.07491, section 2.1 (model), 2.3 and table 1 (stages, tokens, sequence lengths, what trains, RoPE
        base); the tower's sizes from ports of the published modelling code and the published tensors' sizes; the
        decoder is Moonlight's at 5.2T tokens.
    Hardware: not published. Here: not yet measured.
    Expected: not yet measured.
    Command: perilune train kimi_vl_a3b stage=vit data.path=PAIRS --run vit
        perilune train kimi_vl_a3b stage=align data.path=PAIRS --run align --after vit --after TEXT_RUN
        perilune train kimi_vl_a3b stage=joint 'data.blend={...}' --run joint --after TEXT_RUN --after align
        and so on: cooldown, long_32k (rows of 32,768 tokens), long_128k (131,072), each --after the one before

    Published, and different here:
    - Muon for all parts, as here; which weights of the tower it leaves to AdamW was not (`pretrain/optim/matrices.py`).
    - The encoders of the vision stage began as SigLIP-SO-400M's, its decoder as a small language model: here all are
      drawn. Images grow while it runs; here they are as they were packed. The decoder's sizes were not published: 12
      dense layers of 1024 are a guess.
    - Learning rates were not published but for the joint stage's, which goes on along the text run's cosine: here its
      end is held, the cooldown falls from it to a tenth, and the long stages stay there. Vision and alignment
      stages: Moonlight's peak, with a cosine.
    - The part of text starts at all of it and falls, by how much was not published: write it as a schedule of
      `data.blend`.
    - The tokens of the long stages are published as one sum, 0.3T: half for each.
    - Batch sizes and degrees of parallelism were not published: Moonlight's are kept, in tokens. The vision stage wants
      as many ranks as its batch has micro-batches, and documents masked, so that no text knows another.
    """
    moonlight = moonlight_16b_a3b()
    whole = replace(
        moonlight,
        preset="kimi_vl_a3b",
        stage=stage,
        vision=Vision(num_layers=27),
        train=Train(tokens=1_400_000_000_000, global_batch_size=4096, save_every=500),
        schedule=replace(moonlight.schedule, lr="constant", warmup_tokens=0),
        optim=replace(moonlight.optim, lr=0.1 * moonlight.optim.lr),
    )
    low = replace(whole, optim=replace(whole.optim, lr=0.01 * moonlight.optim.lr))
    fresh = replace(moonlight.schedule, lr="cosine", warmup_tokens=2_000_000_000)
    match stage:
        case "vit":
            return replace(
                whole,
                model=_caption_decoder(moonlight.model),
                contrastive=Contrastive(loss="siglip"),
                # Every image meets every text of the batch: one micro-batch on each of 512 ranks.
                train=replace(whole.train, tokens=2_000_000_000_000, micro_batch_size=8),
                data=replace(whole.data, document_mask=True),
                schedule=fresh,
                optim=moonlight.optim,
                parallel=replace(moonlight.parallel, ep=1),
            )
        case "align":
            return replace(
                whole,
                train=replace(whole.train, tokens=100_000_000_000, freeze=("language_model",)),
                schedule=fresh,
                optim=moonlight.optim,
            )
        case "cooldown":
            return replace(
                whole,
                train=replace(whole.train, tokens=600_000_000_000),
                schedule=replace(whole.schedule, lr="cosine", min_lr_ratio=0.1),
            )
        case "long_32k":
            return _long(low, 32_768)
        case "long_128k":
            return _long(low, 131_072)
    return whole


def _caption_decoder(model: Model) -> Model:
    """A small dense decoder that the vision stage's captions train, and that no later stage takes over."""
    return replace(
        model,
        num_layers=12,
        hidden_size=1024,
        num_attention_heads=8,
        kv_lora_rank=256,
        intermediate_size=4096,
        first_k_dense_replace=12,
        n_routed_experts=0,
    )


def _long(config: Config, seq_len: int) -> Config:
    """A context four times as long, with a RoPE base of 800,000 in place of 50,000 (section 2.3)."""
    fewer = config.data.seq_len / seq_len
    return replace(
        config,
        model=replace(config.model, max_position_embeddings=seq_len, rope_theta=800_000.0),
        train=replace(
            config.train,
            tokens=150_000_000_000,
            global_batch_size=int(config.train.global_batch_size * fewer),
        ),
        data=Data(seq_len=seq_len, document_mask=config.data.document_mask),
        parallel=replace(config.parallel, cp=seq_len // 8192),
    )
