"""What `make demo-vlm` trains: a small Kimi-VL, stage after stage, on letters that it draws itself."""

from __future__ import annotations

from dataclasses import replace

from perilune.pretrain.presets.demo import demo
from perilune.pretrain.schema import Config, Contrastive, Data, Model, Parallel, Schedule, Train, Valid, Vision

STAGES = ("text", "vit", "align", "joint", "cooldown", "long")

_SEQ_LEN = 256
_ROWS = 8
_STEPS = {"text": 100, "vit": 600, "align": 60, "joint": 620, "cooldown": 20, "long": 20}

_NOISE = 0.5  # without it the decoder learns from the letter that it has read which marks training shows with it
_TOWER = Vision(
    num_layers=4,
    hidden_size=96,
    num_attention_heads=4,
    intermediate_size=384,
    pos_emb_height=6,
    pos_emb_width=6,
    init_std=0.1,  # about 1 / sqrt(hidden_size): with 0.02 it learned nothing from 60,000 images
)
_COMPARING = Contrastive(
    loss="siglip", feature_dim=96, num_layers=2, hidden_size=96, num_attention_heads=4, intermediate_size=192
)


def demo_vlm(stage: str = "joint") -> Config:
    """The stages of `kimi_vl_a3b` in small.

    Source: this repository.
    Hardware: two CPU cores, two processes of one thread each.
    Expected: of combinations of letter and mark that no training image shows, 64% named exactly, in 8.7 minutes (two
        cores of an Intel Xeon with AVX-512, torch 2.14.1, 2026-11-27); 89% with 900 and 900 steps (docs/vision.md).
    Command: make demo-vlm
    """
    text = demo()
    model = replace(
        text.model,
        num_layers=3,
        hidden_size=128,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_nextn_predict_layers=0,
        vocab_size=1024,
        max_position_embeddings=_SEQ_LEN,
        original_max_position_embeddings=_SEQ_LEN,
        rope_theta=50000.0,
        init_std=0.05,
    )
    steps = _STEPS[stage]
    tokens = _ROWS * _SEQ_LEN
    whole = Config(
        preset="demo_vlm",
        stage=stage,
        model=model,
        vision=_TOWER,
        train=Train(steps=steps, global_batch_size=_ROWS, micro_batch_size=_ROWS // 2, log_every=50),
        valid=Valid(every=steps, steps=0),
        data=Data(seq_len=_SEQ_LEN, caption_noise=_NOISE),
        optim=replace(text.optim, name="muon", lr=2e-3),  # as Kimi-VL; beside AdamW: docs/vision.md
        schedule=Schedule(lr="cosine", warmup_tokens=steps // 10 * tokens, min_lr_ratio=0.1, bias_update_speed=1e-2),
        parallel=Parallel(),
        precision=text.precision,
    )
    match stage:
        case "text":
            text_valid = replace(whole.valid, steps=32)  # the standard library holds out more than the run reads
            return replace(whole, vision=Vision(), data=Data(seq_len=_SEQ_LEN), valid=text_valid)
        case "vit":
            return replace(
                whole,
                model=_caption_decoder(model),
                contrastive=_COMPARING,
            )
        case "align":
            return replace(whole, train=replace(whole.train, freeze=("language_model",)))
        case "cooldown":
            return replace(whole, optim=replace(whole.optim, lr=0.1 * whole.optim.lr))
        case "long":
            return replace(
                whole,
                model=replace(model, max_position_embeddings=4 * _SEQ_LEN, rope_theta=800_000.0),
                train=replace(whole.train, global_batch_size=1, micro_batch_size=1),
                data=replace(whole.data, seq_len=4 * _SEQ_LEN),
                optim=replace(whole.optim, lr=0.1 * whole.optim.lr),
                parallel=Parallel(cp=2),
            )
    return whole


def _caption_decoder(model: Model) -> Model:
    """Two dense layers, which no later stage takes over."""
    return replace(model, num_layers=2, first_k_dense_replace=2, n_routed_experts=0)
