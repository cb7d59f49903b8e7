"""What `make demo` trains: a few million parameters, five minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.proxy_100m import proxy_100m
from perilune.pretrain.schema import Config, Data, Parallel, Precision, Schedule, Train, Valid

_SEQ_LEN = 512
_ROWS = 4
_STEPS = 360


def demo() -> Config:
    """The whole path in small, over Python's standard library as text.

    Source: this repository.
    Hardware: two CPU cores, two processes of one thread each, experts split over them.
    Expected: 1.98 bits per byte on the held-out files after 737,280 tokens, five and a half minutes of training
        (two cores of an AMD EPYC, torch 2.15.0, megatron-core 0.19.2, 2026-11-23).
    Command: make demo
        which runs: perilune train demo data.path=DIR --nproc 2
    """
    proxy = proxy_100m()
    model = replace(
        proxy.model,
        num_layers=4,
        hidden_size=192,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=48,
        intermediate_size=512,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.41,
        vocab_size=4096,
        init_std=0.02,  # the recipe's 0.006 is for a hidden size of 7168; here it delays the first steps
    )
    return Config(
        preset="demo",
        model=model,
        train=Train(steps=_STEPS, global_batch_size=_ROWS, micro_batch_size=2, save_every=_STEPS // 2, log_every=10),
        valid=Valid(every=_STEPS, steps=0),
        data=Data(seq_len=_SEQ_LEN),
        optim=replace(proxy.optim, lr=4e-3),
        schedule=Schedule(
            lr="cosine",
            warmup_tokens=_STEPS // 10 * _ROWS * _SEQ_LEN,
            min_lr_ratio=0.1,
            bias_update_speed=1e-2,  # a few hundred steps must move the bias as far as thousands do elsewhere
        ),
        parallel=Parallel(ep=2),
        precision=Precision(compute="fp32"),
    )
