"""The smallest model that still has every part: for tests, a step in milliseconds."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.proxy_100m import proxy_100m
from perilune.pretrain.schema import Config, Data, Optim, Parallel, Precision, Schedule, Train

_SEQ_LEN = 64
_ROWS = 8
_STEPS = 20


def tiny() -> Config:
    """One dense layer, two of experts, one of MTP; every size divides by 4, so that layouts can be tried.

    Groups as in V3: K/M = 4/2 = 2, so that the paper's group score (the sum of the top K/M) is also the one that
    transformers computes (the sum of the top 2).

    Source: this repository.
    Hardware: anything.
    Expected: not yet measured; it is for tests, not for its loss.
    Command: perilune train tiny data.path=DIR
    """
    proxy = proxy_100m()
    model = replace(
        proxy.model,
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        n_group=4,
        topk_group=2,
        vocab_size=512,
        max_position_embeddings=_SEQ_LEN,
        original_max_position_embeddings=_SEQ_LEN,
    )
    return Config(
        preset="tiny",
        model=model,
        train=Train(steps=_STEPS, global_batch_size=_ROWS, micro_batch_size=1),
        data=Data(seq_len=_SEQ_LEN),
        optim=Optim(lr=3e-3),
        schedule=Schedule(lr="cosine", warmup_tokens=_STEPS // 10 * _ROWS * _SEQ_LEN, min_lr_ratio=0.1),
        parallel=Parallel(),
        precision=Precision(compute="fp32"),
    )
