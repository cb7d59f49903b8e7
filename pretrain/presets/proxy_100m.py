"""A DeepSeek-V3 in small: 108M parameters with every part that the large one has."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.deepseek_v3 import deepseek_v3
from perilune.pretrain.schema import Config, Data, Parallel, Precision, Recompute, Schedule, Train

_SEQ_LEN = 1024
_TOKENS = 2_000_000_000


def proxy_100m() -> Config:
    """V3's shape at a size for comparing recipes: MLA with both latents, a dense first layer, groups, MTP.

    Source: this repository; proportions after arXiv 2412.19437. Peak learning rate and batch after DeepSeek LLM's
        fits (arXiv 2401.02954, section 3.1), eta = 0.3118 C^-0.1250 and B = 0.2920 C^0.3271 tokens, with C the
        training FLOPs of the active parameters besides the vocabulary. Assumption: the fits are of dense models.
        `routed_scaling_factor` by Moonlight's rule (arXiv 2502.16982, appendix C): the mean of 1/|p| over 4 of 32
        renormalised sigmoids of Gaussians.
    Hardware: one GPU, or a CPU with patience. Not yet measured.
    Expected: not yet measured.
    Command: perilune train proxy_100m data.path=DIR
    """
    v3 = deepseek_v3()
    model = replace(
        v3.model,
        num_layers=8,
        hidden_size=512,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1536,
        first_k_dense_replace=1,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        vocab_size=8192,
        init_std=0.02,
    )
    return Config(
        preset="proxy_100m",
        model=model,
        train=Train(tokens=_TOKENS, global_batch_size=128, micro_batch_size=1, save_every=500),
        data=Data(seq_len=_SEQ_LEN),
        optim=replace(v3.optim, lr=2e-3),
        schedule=Schedule(lr="cosine", warmup_tokens=_TOKENS // 50, min_lr_ratio=0.1),
        parallel=Parallel(),
        recompute=Recompute(),
        precision=Precision(compute="bf16"),
    )
