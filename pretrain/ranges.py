"""What each number of the schema may be by itself; what they must be together is in `pretrain/rules.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perilune.pretrain.schema import Config


@dataclass(frozen=True)
class _Range:
    least: float
    most: float = math.inf
    below: bool = False  # `most` itself is excluded

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and math.isfinite(value) and not (self.below and value == self.most)

    def in_words(self) -> str:
        if self.most == math.inf:
            return f"be at least {self.least:g}"
        return f"lie between {self.least:g} and {self.most:g}" + (f", {self.most:g} excluded" if self.below else "")


_COUNT, _MAYBE = _Range(1), _Range(0)
_PART, _SMALL, _SIZE = _Range(0, 1), _Range(0, 1), _Range(0, 1e3)
_DECAY = _Range(0, 1, below=True)  # with 1 an average never moves, and AdamW divides by 0

# Counts whose rule depends on other numbers (experts, groups, the degrees of parallel.*) are in the rules.
RANGES = {
    "model": {
        **dict.fromkeys(
            "num_layers hidden_size num_attention_heads kv_lora_rank qk_nope_head_dim v_head_dim "
            "intermediate_size vocab_size n_group max_position_embeddings original_max_position_embeddings".split(),
            _COUNT,
        ),
        **dict.fromkeys("num_nextn_predict_layers n_routed_experts n_shared_experts".split(), _MAYBE),
        "q_lora_rank": _COUNT,
        "qk_rope_head_dim": _Range(2),
        "routed_scaling_factor": _Range(1e-3, 1e3),
        "seq_aux_loss_alpha": _MAYBE,
        "rms_norm_eps": _SMALL,
        "latent_norm_eps": _SMALL,
        "rope_theta": _Range(1, 1e12),
        "rope_scaling_factor": _Range(1, 1e6),
        "beta_fast": _Range(1e-3, 1e6),
        "beta_slow": _Range(1e-3, 1e6),
        "mscale": _SIZE,
        "mscale_all_dim": _SIZE,
        "init_std": _SIZE,
    },
    "vision": {
        "num_layers": _MAYBE,
        "rope_theta": _Range(1, 1e12),
        "layer_norm_eps": _SMALL,
        "init_std": _SIZE,
        "token_share": _PART,
    },
    "contrastive": {"caption_weight": _SIZE},
    "train": {
        **dict.fromkeys("global_batch_size micro_batch_size nonfinite_limit".split(), _COUNT),
        **dict.fromkeys("steps tokens batch_ramp_tokens batch_ramp_start save_every log_every keep threads".split(),
                        _MAYBE),
        "seed": _Range(0, 2**63 - 1),
    },
    "valid": {"every": _MAYBE, "steps": _MAYBE},
    "data": {
        "seq_len": _Range(2),
        "caption_noise": _PART,
        **dict.fromkeys("quarantine_limit workers retry_s cache_gib".split(), _MAYBE),
        "timeout_s": _Range(0.01),
    },
    "optim": {
        "lr": _SIZE,
        **dict.fromkeys("momentum beta1 beta2 ema_decay".split(), _DECAY),
        "eps": _SMALL,
        "weight_decay": _SIZE,
        "clip": _MAYBE,
    },
    "schedule": {
        "warmup_tokens": _MAYBE,
        **dict.fromkeys("min_lr_ratio decay_ratio bias_freeze_ratio mtp_switch_ratio milestones".split(), _PART),
        **dict.fromkeys("bias_update_speed mtp_weight mtp_weight_late".split(), _MAYBE),
        "factors": _SIZE,
    },
}  # fmt: skip


def problems(config: Config, section: str) -> list[str]:
    """A sentence for each number in this section of `config` that lies outside its range."""
    found, node, usual = [], getattr(config, section), getattr(Config(), section)
    for name, allowed in RANGES[section].items():
        value, default = (getattr(of, name) for of in (node, usual))
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(allowed.holds(number) for number in numbers):
            shown, default = (list(one) if isinstance(one, tuple) else one for one in (value, default))
            found.append(f"{section}.{name}={shown} must {allowed.in_words()}; the schema's own value is {default}")
    return found


def all_problems(config: Config) -> list[str]:
    """As `problems`, of every section."""
    return [problem for section in RANGES for problem in problems(config, section)]
