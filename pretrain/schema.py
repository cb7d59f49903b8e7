"""The keys of a run: frozen dataclasses, which are the truth that YAML files and the command line only override.

Every field is a contract (`perilune train PRESET model.num_layers=4`). Words are the papers' and Megatron's; a unit
stands behind each number that has one. `pretrain/config.py` merges and types overrides; `pretrain/rules.py` refuses
what does not fit together or is not built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V3-style decoder: MLA, then dense SwiGLU for the first layers and MoE for the rest, MTP on top.

    Names are those of DeepSeek-V3's config.json (arXiv 2412.19437) where it has one.
    """

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    q_lora_rank: int | None = 64  # None: queries are projected directly (Moonlight)
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 256  # FFN size of the dense layers
    first_k_dense_replace: int = 1  # the first layers that are dense
    n_routed_experts: int = 8  # 0: no expert layer at all (then first_k_dense_replace == num_layers)
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    seq_aux_loss_alpha: float = 1e-4  # alpha of V3 eq. 17; 0 switches the sequence-wise loss off
    num_nextn_predict_layers: int = 1  # D, the depth of multi-token prediction
    vocab_size: int = 512
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # of the norms on the q and kv latents
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    rope_scaling_factor: float = 1.0  # > 1: YaRN (V3 section 4.3)
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    init_std: float = 0.006
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Vision:
    """MoonViT, which reads images at their own resolution, and the projector to the decoder (arXiv 2504.07491, 2.1)."""

    num_layers: int = 0  # 0: a language model alone
    hidden_size: int = 1152
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    patch_size: int = 14  # pixels
    merge_size: int = 2  # patches a side that become one token
    pos_emb_height: int = 64  # of the learned positions, which are interpolated to each image's grid
    pos_emb_width: int = 64
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02  # of tower, projector and what compares images; the decoder's is model.init_std
    token_share: float = 0.5  # part of a row's tokens that are images', for the balance of pipeline stages alone


@dataclass(frozen=True)
class Contrastive:
    """Images beside their texts, for the vision stage (arXiv 2504.07491, section 2.3), beside the captions' loss.

    The sizes are those of the text encoder, which is bidirectional, has the tower's kind of layers and is no part of
    later stages.
    """

    loss: Literal["none", "siglip", "clip"] = "none"
    caption_weight: float = 2.0  # of the captions' next-token loss, a mean over tokens, beside this one, over pairs
    feature_dim: int = 1152  # of what images and texts are compared by
    num_layers: int = 27
    hidden_size: int = 1152
    num_attention_heads: int = 16
    intermediate_size: int = 4304


@dataclass(frozen=True)
class Train:
    """How long and how much at once. One of `steps` and `tokens` rules; the other is 0 and follows from it."""

    steps: int = 0
    tokens: int = 0
    global_batch_size: int = 8  # rows (of data.seq_len tokens) an optimizer step
    micro_batch_size: int = 1  # rows a forward pass on one data-parallel rank
    batch_ramp_tokens: int = 0  # tokens over which the batch grows linearly; 0: no ramp
    batch_ramp_start: int = 0  # rows at the first step of the ramp
    seed: int = 1
    save_every: int = 0  # steps; 0: only at the end
    log_every: int = 1  # steps between progress lines (metrics.jsonl has every step)
    keep: int = 2  # newest checkpoints kept; 0: all
    async_save: bool = True  # checkpoints are written while training goes on
    nonfinite_limit: int = 10  # skipped steps in a row after which the run stops
    threads: int = 0  # CPU threads a process; 0: cores // processes
    freeze: tuple[str, ...] = ()  # of vision_tower, multi_modal_projector, contrastive, language_model


@dataclass(frozen=True)
class Valid:
    path: str | None = None  # a packed dataset; None: the `valid` folder beside data.path if it is there
    every: int = 0  # steps; 0: never
    steps: int = 0  # batches of train.global_batch_size rows; 0: the whole set


@dataclass(frozen=True)
class Data:
    """Datasets are folders, or prefixes of s3://, gs://, https:// or file:// (fsspec).

    A weight of `blend` is a number, or a schedule {tokens consumed: the weight from there on} as in
    `{web: {0: 0.9, 1000000000: 0.5}, code: 0.1}`; before its first entry it is 0. Weights need not sum to 1.
    """

    path: str | None = None  # a packed dataset
    blend: dict[str, float | dict[int, float]] = field(default_factory=dict)  # several: dataset -> weight
    seq_len: int = 256  # tokens a row; equals the packed dataset's
    document_mask: bool = True  # RoPE, attention and MTP stop at document boundaries
    caption_noise: float = 0.0  # part of the texts beside images that is misread (`data/caption_noise.py`): 0 to 1
    on_damage: Literal["stop", "quarantine"] = "stop"  # quarantine: the next whole row of the dataset takes its place
    quarantine_limit: int = 16  # rows replaced in a run; one more stops it
    workers: int = 1  # processes that read ahead, each a global batch; 0: read in the training process
    timeout_s: float = 60.0  # of one request to a remote store
    retry_s: float = 300.0  # for which requests that fail are repeated, with growing pauses
    cache_dir: str | None = None  # of rows from remote stores; None: ~/.cache/perilune/rows
    cache_gib: float = 16.0  # the cache's limit; 0: no cache


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "muon"] = "adamw"  # muon: for matrices, and AdamW for the rest (arXiv 2502.16982)
    lr: float = 3e-4  # the peak
    momentum: float = 0.95  # Muon's, Nesterov's kind; betas and eps are AdamW's
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0: no clipping
    ema_decay: float = 0.0  # d of the average of the weights, E <- d E + (1 - d) W (optim/average.py); 0: none is kept


@dataclass(frozen=True)
class Schedule:
    """Learning rate, router-bias speed and MTP weight, all by the tokens consumed."""

    lr: Literal["cosine", "multistep", "wsd", "constant"] = "cosine"
    warmup_tokens: int = 0  # linear from 0
    min_lr_ratio: float = 0.1  # cosine's and wsd's end, as a part of the peak
    decay_ratio: float = 0.2  # wsd: the last part of training that decays
    milestones: tuple[float, ...] = (0.8, 0.9)  # multistep: parts of training (DeepSeek LLM, arXiv 2401.02954)
    factors: tuple[float, ...] = (0.316, 0.1)  # multistep: parts of the peak from each milestone on
    moves: tuple[str, ...] = ()  # multistep: step, linear, cosine or sqrt to each factor; none: a step at each
    bias_update_speed: float = 1e-3  # gamma of V3 section 2.1.2
    bias_freeze_ratio: float = 0.966  # part of training after which gamma is 0 (V3: 14.3T of 14.8T tokens)
    mtp_weight: float = 0.3  # lambda of V3 section 2.2
    mtp_weight_late: float = 0.1
    mtp_switch_ratio: float = 0.676  # part of training after which the late weight rules (V3: 10T of 14.8T)


@dataclass(frozen=True)
class Parallel:
    """Degrees of the axes; data parallelism is what remains of the processes. Sequence parallel goes with tp > 1."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    layout: str | None = None  # Megatron's pipeline layout string; None: balanced
    dispatcher: Literal["alltoall", "allgather", "flex", "hybridep"] = "alltoall"  # flex: DeepEP
    zero1: bool = True  # optimizer state sharded over data-parallel ranks
    # Communication beside computation. Off: what it gains is not known for a GPU (tests/bench/overlap.py measures it on
    # two gloo ranks of a CPU), and it costs memory for the buckets in flight. The results are the same.
    overlap_grad_reduce: bool = False  # gradients are reduced, bucket by bucket, while backward goes on
    overlap_param_gather: bool = False  # updated weights are gathered while the next forward goes on; needs zero1
    overlap_ep: bool = False  # tokens travel between expert ranks while another micro-batch computes: not built
    cuda_graphs: bool = False  # not built


@dataclass(frozen=True)
class Recompute:
    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Precision:
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    fp8: Literal["off", "emulated", "blockwise", "current", "mxfp8"] = "off"


@dataclass(frozen=True)
class Kernels:
    """Libraries' kernels on a GPU, in the place of those that are chosen there (auto; docs/performance.md names them).

    The results are the same but for rounding. Off until they are measured beside what is chosen.
    """

    attention: Literal["auto", "varlen_attn"] = "auto"  # PyTorch's, of packed rows in the decoder
    swiglu: Literal["auto", "compiled"] = "auto"  # Megatron-core's, of experts and dense layers
    permute: Literal["auto", "transformer_engine"] = "auto"  # into the experts' order and back
    router: Literal["auto", "transformer_engine"] = "auto"  # the choice of experts
    rope: Literal["auto", "triton"] = "auto"  # Megatron-core's of MLA


@dataclass(frozen=True)
class Config:
    """A whole run. `preset` and `stage` name where it started from."""

    preset: str = "tiny"
    stage: str = ""  # of a preset that has several, as stage=align; empty: the preset has one alone
    model: Model = field(default_factory=Model)
    vision: Vision = field(default_factory=Vision)
    contrastive: Contrastive = field(default_factory=Contrastive)
    train: Train = field(default_factory=Train)
    valid: Valid = field(default_factory=Valid)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = field(default_factory=Parallel)
    recompute: Recompute = field(default_factory=Recompute)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
