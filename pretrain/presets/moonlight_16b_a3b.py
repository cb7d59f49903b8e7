"""Moonlight-16B-A3B: 15.3B parameters besides embeddings, 2.2B active (arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.deepseek_v3 import deepseek_v3
from perilune.pretrain.schema import Config, Data, Optim, Parallel, Precision, Recompute, Schedule, Train

_SEQ_LEN = 8192


def moonlight_16b_a3b() -> Config:
    """Moonlight's first two stages: warm-up, then one cosine to 5.2T tokens.

    Source: arXiv 2502.16982, sections 2.2 (Muon), 3.3 (schedule), appendix C (what differs from a small DeepSeek-V3);
        sizes, the RoPE base and `rms_norm_eps` from the published config.json. The latent norms keep 1e-6: the
        published modelling code gives them no other.
    Hardware: not published. Here: not yet measured.
    Expected: not yet measured.
    Command: perilune train moonlight_16b_a3b data.path=DIR

    Published, and different here:
    - Batch: 2048 rows, then 4096 after 200B tokens. Here it grows linearly from one to the other over those 200B.
    - Stage 3 (5.2T to 5.7T): 1e-4 in 100 steps, then linear to 0, router bias frozen. Not here: it is a second run.
    - The initial standard deviation, alpha of the sequence-wise loss and whether documents were masked were not
      published: V3's are kept.
    """
    v3 = deepseek_v3()
    model = replace(
        v3.model,
        num_layers=27,
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        intermediate_size=11264,
        first_k_dense_replace=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        num_nextn_predict_layers=0,
        vocab_size=163840,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        max_position_embeddings=_SEQ_LEN,
    )
    return Config(
        preset="moonlight_16b_a3b",
        model=model,
        train=Train(
            tokens=5_200_000_000_000,
            global_batch_size=4096,
            batch_ramp_start=2048,
            batch_ramp_tokens=200_000_000_000,
            save_every=500,
        ),
        data=Data(seq_len=_SEQ_LEN, document_mask=v3.data.document_mask),
        optim=Optim(name="muon", lr=4.2e-4, weight_decay=0.1),
        schedule=Schedule(
            lr="cosine",
            warmup_tokens=33_000_000_000,
            min_lr_ratio=0.1,
            bias_update_speed=1e-3,
            bias_freeze_ratio=1.0,
            mtp_weight=0.0,
            mtp_weight_late=0.0,
        ),
        parallel=Parallel(ep=8),
        recompute=Recompute(),
        precision=Precision(compute="bf16"),
    )
