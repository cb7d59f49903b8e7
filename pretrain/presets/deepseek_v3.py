"""DeepSeek-V3: 671B parameters, 37B active (arXiv 2412.19437)."""

from __future__ import annotations

from perilune.pretrain.schedule import tokens_after
from perilune.pretrain.schema import Config, Data, Model, Optim, Parallel, Precision, Recompute, Schedule, Train

_TOKENS = 14_800_000_000_000
_SEQ_LEN = 4096


def deepseek_v3() -> Config:
    """The pretraining of DeepSeek-V3, as near as one configuration can say it.

    Source: arXiv 2412.19437, section 4.2 (model, optimizer, schedule), 3.1-3.3 (parallelism, FP8, recompute); epsilon
        of the norms, the RoPE base and `routed_scaling_factor` from the published config.json and inference code.
    Hardware: 2048 H800 (published): pp=16, ep=64, data-parallel with ZeRO-1, no tensor parallelism.
    Expected: 2.664M H800 hours for 14.8T tokens (published, table 1). Here: not yet measured.
    Command: perilune train deepseek_v3 data.path=DIR

    Published, and different here:
    - Warm-up: 2000 steps; here the tokens that those steps consume while the batch grows.
    - Schedule and stages: DualPipe, whose map from layers to stages was not published. Here 1F1B and the layout of
      NVIDIA's Megatron-Bridge recipe: four layers a stage, one layer with MTP and the loss on the last.
    - AdamW's epsilon was not published: 1e-8 here. Moments were BF16; here FP32.
    - Recompute: RMSNorms, MLA up-projections and SwiGLU, as published.
    - YaRN comes after pretraining (section 4.3: 1000 steps each at 32K and 128K, lr 7.3e-6): plain RoPE here.
    - No attention mask between packed documents in pretraining (section 4.1), hence `document_mask=False`.
    """
    model = Model(
        num_layers=61,
        hidden_size=7168,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        seq_aux_loss_alpha=1e-4,
        num_nextn_predict_layers=1,
        vocab_size=129280,
        rms_norm_eps=1e-6,
        latent_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=_SEQ_LEN,
        init_std=0.006,
        tie_word_embeddings=False,
    )
    train = Train(
        tokens=_TOKENS,
        global_batch_size=15360,
        batch_ramp_start=3072,
        batch_ramp_tokens=469_000_000_000,
        micro_batch_size=1,
        save_every=500,
    )
    return Config(
        preset="deepseek_v3",
        model=model,
        train=train,
        data=Data(seq_len=_SEQ_LEN, document_mask=False),
        optim=Optim(name="adamw", lr=2.2e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0),
        schedule=Schedule(
            # 2.2e-4 until 10T tokens, a cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B
            lr="multistep",
            warmup_tokens=tokens_after(train, _SEQ_LEN, steps=2000),
            milestones=(10 / 14.8, 14.3 / 14.8, 14.633 / 14.8),
            factors=(1.0, 0.1, 7.3e-6 / 2.2e-4),
            moves=("step", "cosine", "step"),
            bias_update_speed=1e-3,
            bias_freeze_ratio=14.3 / 14.8,
            mtp_weight=0.3,
            mtp_weight_late=0.1,
            mtp_switch_ratio=10 / 14.8,
        ),
        parallel=Parallel(pp=16, ep=64, layout="Et*4|(tttt|)*14tmL"),
        recompute=Recompute(granularity="selective", modules=("layernorm", "mla_up_proj", "moe_act")),
        precision=Precision(compute="bf16", fp8="blockwise"),
    )
