"""What does not fit together, or is not built yet, is refused before a process starts: one sentence with the values."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from functools import partial
from importlib import metadata

from packaging.version import Version

from perilune.parallel import recompute
from perilune.parallel.mesh import FLEX_BACKENDS, LayoutError, Mesh
from perilune.pretrain import ranges, schedule
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.stages import stages_of
from perilune.pretrain.schema import Config, Kernels
from perilune.pretrain.timetable import Timetable


def check(config: Config, world: int) -> None:
    """Raise InputError for the first thing in `config` that does not fit `world` processes, or is not built."""
    check_fits(config, world)
    for problem in (*_not_built(config), *_kernels(config)):
        raise InputError(problem)


def check_fits(config: Config, world: int) -> None:
    """Raise InputError for the first number in `config` that does not fit the others or `world` processes."""
    mesh = mesh_of(config, world)
    # One after the other: each may count on what those before it have let pass.
    of_numbers = (_model, ranges.all_problems, _vision, _batch)
    of_processes = (partial(_layout, mesh=mesh), partial(_contrastive, mesh=mesh), partial(_length, mesh=mesh))
    for rule in (*of_numbers, *of_processes):
        for problem in rule(config):
            raise InputError(problem)


def check_model(config: Config) -> None:
    """Raise InputError for the first number of the decoder that does not fit the others."""
    for problem in _model(config):
        raise InputError(problem)


def check_machine(config: Config, gpus: int) -> None:
    """Raise InputError for what this machine, with `gpus` GPUs, lacks to run `config`."""
    fp8 = config.precision.fp8
    if fp8 != "off" and not gpus:
        raise InputError(f"precision.fp8={fp8} needs a GPU, and there is none here; use precision.fp8=off")
    if fp8 != "off" and importlib.util.find_spec("transformer_engine_torch") is None:
        raise InputError(
            f"precision.fp8={fp8} needs Transformer Engine: pip install --no-build-isolation -e '.[gpu]', or use "
            "precision.fp8=off"
        )
    dispatcher = config.parallel.dispatcher
    if dispatcher in FLEX_BACKENDS and not (gpus and importlib.util.find_spec("deep_ep") is not None):
        raise InputError(
            f"parallel.dispatcher={dispatcher} needs a GPU ({gpus} here) and deep_ep, built from its source "
            "(github.com/deepseek-ai/DeepEP); use parallel.dispatcher=alltoall"
        )
    for problem in _kernels_here(config.kernels, gpus):
        raise InputError(problem)


def _kernels(config: Config) -> list[str]:
    """What the kernels that were chosen do not take, on whatever machine."""
    m, problems = config.model, []
    if config.kernels.attention == "varlen_attn":
        asked, instead = "kernels.attention=varlen_attn", "use kernels.attention=auto"
        if config.precision.compute != "bf16":
            problems.append(f"{asked} needs precision.compute=bf16, not {config.precision.compute}; {instead}")
        size = m.qk_nope_head_dim + m.qk_rope_head_dim
        if size % 8 or size > 256:
            problems.append(
                f"{asked} takes heads of a multiple of 8 up to 256, and model.qk_nope_head_dim={m.qk_nope_head_dim} + "
                f"model.qk_rope_head_dim={m.qk_rope_head_dim} make {size}; {instead}"
            )
    if config.kernels.rope == "triton":
        heads = f"model.num_attention_heads/parallel.tp={m.num_attention_heads}/{config.parallel.tp}"
        sizes = {
            "model.qk_nope_head_dim": m.qk_nope_head_dim,
            "model.qk_rope_head_dim": m.qk_rope_head_dim,
            "model.v_head_dim": m.v_head_dim,
            heads: m.num_attention_heads // config.parallel.tp,  # with others it writes beyond the last block of heads
        }
        problems += [
            f"kernels.rope=triton takes sizes that are powers of two, not {name}"
            f"{'' if name == heads else f'={size}'}; use kernels.rope=auto"
            for name, size in sizes.items()
            if size & (size - 1)
        ]
    return problems


# Transformer Engine's first release that has it, as Megatron-core asks for it.
_SINCE = {"permute": "2.1", "router": "2.6"}


def _kernels_here(kernels: Kernels, gpus: int) -> list[str]:
    """What this machine lacks for the kernels that were chosen."""
    problems = []
    for name, chosen in asdict(kernels).items():
        if chosen == "auto":
            continue
        asked, instead = f"kernels.{name}={chosen}", f"use kernels.{name}=auto"
        if not gpus:
            problems.append(f"{asked} is a GPU's, and there is none here; {instead}")
        elif chosen == "triton" and importlib.util.find_spec("triton") is None:
            problems.append(f"{asked} needs Triton, which comes with torch for CUDA, and here is none; {instead}")
        elif chosen == "transformer_engine" and (found := _transformer_engine()) < Version(_SINCE[name]):
            here = found if found.release > (0,) else "none"
            problems.append(
                f"{asked} needs Transformer Engine {_SINCE[name]} or newer, and here is {here}: pip install "
                f"--no-build-isolation -e '.[gpu]', or {instead}"
            )
    return problems


def _transformer_engine() -> Version:
    """The release that is installed whole; 0 where none is."""
    if importlib.util.find_spec("transformer_engine_torch") is None:
        return Version("0")
    return Version(metadata.version("transformer_engine"))


def mesh_of(config: Config, world: int) -> Mesh:
    """The mesh that `config.parallel` asks for on `world` processes; InputError with every degree if it cannot be."""
    p = config.parallel
    try:
        return Mesh(world=world, tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp)
    except LayoutError as error:
        raise InputError(str(error)) from error


def _not_built(config: Config) -> list[str]:
    p, precision = config.parallel, config.precision
    problems = []
    if precision.compute == "fp16":
        problems.append(
            "precision.compute=fp16 is not supported: on CPU it is hundreds of times slower than bf16, and it needs "
            "loss scaling that is not built; use precision.compute=bf16"
        )
    if precision.fp8 == "emulated":
        problems.append("precision.fp8=emulated is not built yet; use precision.fp8=off")
    elif precision.fp8 != "off" and precision.compute != "bf16":
        problems.append(f"precision.fp8={precision.fp8} needs precision.compute=bf16, not {precision.compute}")
    if p.dispatcher in FLEX_BACKENDS and p.ep * p.etp == 1:
        problems.append(
            f"parallel.dispatcher={p.dispatcher} sends tokens between expert-parallel ranks, and parallel.ep*etp = 1; "
            "use alltoall"
        )
    if p.overlap_param_gather and not (p.zero1 and p.overlap_grad_reduce):
        problems.append(
            f"parallel.overlap_param_gather=true needs parallel.zero1=true (it is {_yaml(p.zero1)}) and "
            f"parallel.overlap_grad_reduce=true (it is {_yaml(p.overlap_grad_reduce)})"
        )
    if p.overlap_ep:
        problems.append(
            "parallel.overlap_ep=true is not built: Megatron-core's schedule of two micro-batches at once knows "
            "neither packed rows nor the losses of MTP's depths; set it to false"
        )
    if p.cuda_graphs:
        problems.append(
            "parallel.cuda_graphs=true is not built: a graph replays fixed shapes, and documents and the experts' "
            "tokens are others in every step; set it to false"
        )
    if config.model.tie_word_embeddings:
        problems.append("model.tie_word_embeddings=true is not built; DeepSeek-V3 unties them: set it to false")
    if not config.model.norm_topk_prob:
        problems.append("model.norm_topk_prob=false is not built; V3's router normalises its weights: set it to true")
    return problems


def _yaml(value: bool) -> str:
    return "true" if value else "false"


def _batch(config: Config) -> list[str]:
    problems = []
    if wrong := schedule.milestones_problem(config.schedule):
        problems.append(wrong)
    longest = config.model.max_position_embeddings
    if config.data.seq_len > longest:
        problems.append(
            f"data.seq_len={config.data.seq_len} is beyond model.max_position_embeddings={longest}; set "
            f"model.max_position_embeddings={config.data.seq_len}, or data.seq_len={longest} with data packed so"
        )
    return problems


def _length(config: Config, mesh: Mesh) -> list[str]:
    """Every rank begins with this plan, and would raise what it raises here."""
    Timetable(config, mesh.dp).at(0)
    return []


def _model(config: Config) -> list[str]:
    m = config.model
    problems = ranges.problems(config, "model")
    if m.qk_rope_head_dim % 2:
        problems.append(f"model.qk_rope_head_dim={m.qk_rope_head_dim} must be even: RoPE turns pairs")
    if not 0 <= m.first_k_dense_replace <= m.num_layers:
        problems.append(
            f"model.first_k_dense_replace={m.first_k_dense_replace} must be between 0 and model.num_layers="
            f"{m.num_layers}"
        )
    if not m.n_routed_experts:
        if m.first_k_dense_replace != m.num_layers:
            problems.append(
                f"model.n_routed_experts=0 makes a dense model: set model.first_k_dense_replace={m.num_layers} "
                f"(it is {m.first_k_dense_replace})"
            )
        return problems
    if m.first_k_dense_replace == m.num_layers:
        problems.append(
            f"all {m.num_layers} layers are dense (model.first_k_dense_replace) but model.n_routed_experts="
            f"{m.n_routed_experts}: set it to 0"
        )
    if m.moe_intermediate_size < 1:
        problems.append(f"model.moe_intermediate_size={m.moe_intermediate_size} must be at least 1")
    K, M, G, E = m.num_experts_per_tok, m.topk_group, m.n_group, m.n_routed_experts
    if G < 1 or E % G:
        problems.append(f"model.n_routed_experts={E} does not divide into model.n_group={G} equal groups")
    elif not 1 <= M <= G:
        problems.append(f"model.topk_group={M} must be between 1 and model.n_group={G}")
    elif not 1 <= K <= M * (E // G):
        problems.append(
            f"model.num_experts_per_tok={K} must be between 1 and the experts of {M} groups of {E // G}: {M * (E // G)}"
        )
    elif G > 1 and (K % M or K // M > E // G):
        problems.append(
            f"a group's score is the sum of its best K/M = {K}/{M} experts (V3 section 2.1.2): "
            f"model.num_experts_per_tok must be a multiple of model.topk_group, at most {M * (E // G)}"
        )
    return problems


PARTS = ("vision_tower", "multi_modal_projector", "contrastive", "language_model")  # what train.freeze names


def part_of(name: str) -> str:
    """The part of the model to which a parameter or tensor `name` belongs: one of PARTS."""
    owner = name.partition(".")[0]
    return owner if owner in PARTS[:-1] else PARTS[-1]


def _vision(config: Config) -> list[str]:
    v, frozen = config.vision, config.train.freeze
    lacks = {*(PARTS[:2] if not v.num_layers else ()), *(PARTS[2:3] if config.contrastive.loss == "none" else ())}
    parts = [name for name in PARTS if name not in lacks]
    problems = [
        f"train.freeze names {name!r}; this model has {', '.join(parts)}" for name in frozen if name not in parts
    ]
    if set(frozen) >= set(parts):
        problems.append(f"train.freeze={list(frozen)} leaves nothing to train")
    if not v.num_layers:
        return problems
    for name in "hidden_size num_attention_heads intermediate_size patch_size pos_emb_height pos_emb_width".split():
        if getattr(v, name) < 1:
            problems.append(f"vision.{name}={getattr(v, name)} must be at least 1")
    if problems:
        return problems
    if v.merge_size != 2:
        problems.append(f"vision.merge_size={v.merge_size} is not built: MoonViT merges 2 x 2 patches")
    if v.hidden_size % (4 * v.num_attention_heads):
        problems.append(
            f"vision.hidden_size={v.hidden_size} must be a multiple of 4 x vision.num_attention_heads="
            f"{v.num_attention_heads}: each head turns pairs across and pairs down"
        )
    tp = config.parallel.tp
    for name in ("num_attention_heads", "intermediate_size", "hidden_size"):
        if getattr(v, name) % tp:
            problems.append(f"vision.{name}={getattr(v, name)} does not divide by parallel.tp={tp}")
    if config.model.num_nextn_predict_layers:
        problems.append(
            f"model.num_nextn_predict_layers={config.model.num_nextn_predict_layers} with vision.num_layers="
            f"{v.num_layers} is not built: MTP would embed placeholders, and Kimi-VL has none; set it to 0"
        )
    return problems


def _contrastive(config: Config, mesh: Mesh) -> list[str]:
    """Beyond what holds of the tower: all pairs of a step are compared at once, on ranks that hold whole images."""
    c, p, t = config.contrastive, config.parallel, config.train
    if c.loss == "none":
        return []
    asked = f"contrastive.loss={c.loss}"
    if not config.vision.num_layers:
        return [f"{asked} compares images with texts, and vision.num_layers=0: there is no tower; use none"]
    problems = []
    for name in "feature_dim num_layers hidden_size num_attention_heads intermediate_size".split():
        if getattr(c, name) < 1:
            problems.append(f"contrastive.{name}={getattr(c, name)} must be at least 1")
    if problems:
        return problems
    if c.hidden_size % (2 * c.num_attention_heads):
        problems.append(
            f"contrastive.hidden_size={c.hidden_size} must be a multiple of 2 x contrastive.num_attention_heads="
            f"{c.num_attention_heads}: each head turns pairs"
        )
    for name in ("num_attention_heads", "intermediate_size", "hidden_size"):
        if getattr(c, name) % p.tp:
            problems.append(f"contrastive.{name}={getattr(c, name)} does not divide by parallel.tp={p.tp}")
    for axis, degree in (("pp", p.pp), ("cp", p.cp)):
        if degree > 1:
            problems.append(
                f"{asked} with parallel.{axis}={degree} is not built: each rank compares its images with texts where "
                f"it has both whole; set parallel.{axis}=1 and leave the processes to data parallelism"
            )
    if config.precision.compute == "bf16" and not p.zero1:
        problems.append(
            f"{asked} has fp32 weights among those of precision.compute=bf16, which Megatron-core's optimizer cannot "
            "save with parallel.zero1=false; set it to true"
        )
    if not config.data.document_mask:
        problems.append(
            f"{asked} takes the text that follows an image in its document, and data.document_mask=false makes one "
            "document of a row; set it to true"
        )
    at_once = mesh.dp * t.micro_batch_size
    if not problems and t.global_batch_size != at_once:
        problems.append(
            f"{asked} compares every image with every text of a step, so a step is one micro-batch on each rank: "
            f"train.global_batch_size={t.global_batch_size} must be {mesh.dp} data-parallel ranks x "
            f"train.micro_batch_size={t.micro_batch_size} = {at_once}; set train.global_batch_size={at_once}"
            + (
                f" or train.micro_batch_size={t.global_batch_size // mesh.dp}"
                if t.global_batch_size % mesh.dp == 0
                else ""
            )
        )
    return problems


def _layout(config: Config, mesh: Mesh) -> list[str]:
    m, p = config.model, config.parallel
    stages_of(m, p, config.vision)  # raises InputError where layers and stages do not fit
    problems = []
    if wrong := recompute.problem(config.recompute.granularity, config.recompute.modules):
        problems.append(wrong)
    lacks = {
        "moe": ("n_routed_experts", m.n_routed_experts),
        "moe_act": ("n_routed_experts", m.n_routed_experts),
        "shared_experts": ("n_shared_experts", m.n_routed_experts and m.n_shared_experts),
        "mlp": ("first_k_dense_replace", m.first_k_dense_replace),
        "mtp": ("num_nextn_predict_layers", m.num_nextn_predict_layers),
    }
    for name in config.recompute.modules:
        if name in lacks and not lacks[name][1]:
            problems.append(
                f"recompute.modules names {name}, which the model lacks (model.{lacks[name][0]}=0); leave it out"
            )
    per_pass = mesh.dp * config.train.micro_batch_size * p.pp
    if p.vpp > 1 and config.train.global_batch_size % per_pass:
        problems.append(
            f"parallel.vpp={p.vpp} needs a number of micro-batches that is a multiple of parallel.pp={p.pp}: it is "
            f"train.global_batch_size={config.train.global_batch_size} / ({mesh.dp} data-parallel ranks x "
            f"train.micro_batch_size={config.train.micro_batch_size}); batches near it that fit are "
            + " and ".join(str(n) for n in _multiples_near(config.train.global_batch_size, per_pass))
        )
    shared = m.n_shared_experts * m.moe_intermediate_size
    for axis, degree, sizes in (
        (
            "tp",
            p.tp,
            {
                "num_attention_heads": m.num_attention_heads,
                "vocab_size": m.vocab_size,
                "hidden_size": m.hidden_size,
                "intermediate_size": m.intermediate_size,
                "q_lora_rank": m.q_lora_rank or 0,
                "kv_lora_rank + model.qk_rope_head_dim": m.kv_lora_rank + m.qk_rope_head_dim,
                "n_shared_experts * model.moe_intermediate_size": shared,
            },
        ),
        ("etp", p.etp, {"moe_intermediate_size": m.moe_intermediate_size}),
        ("ep", p.ep, {"n_routed_experts": m.n_routed_experts}),
    ):
        most = min((size for size in sizes.values() if size), default=1)
        fits = [n for n in range(1, min(2 * degree - 1, most) + 1) if not any(size % n for size in sizes.values())]
        for name, size in sizes.items():
            if size % degree:
                problems.append(
                    f"model.{name}={size} does not divide by parallel.{axis}={degree}; of the degrees near it "
                    f"{fits[-3:]} divide all that {axis} splits"
                )
    if p.ep > 1 and not m.n_routed_experts:
        problems.append(f"parallel.ep={p.ep} needs experts, and model.n_routed_experts=0; use parallel.ep=1")
    S = config.data.seq_len
    if p.cp > 1 and S % (2 * p.cp):
        problems.append(
            f"parallel.cp={p.cp} cuts each row into 2 x {p.cp} equal chunks, and data.seq_len={S} does not divide; "
            "near it are " + " and ".join(str(n) for n in _multiples_near(S, 2 * p.cp))
        )
    tokens = config.train.micro_batch_size * S // p.cp
    if p.tp > 1 and tokens % p.tp:
        problems.append(
            f"sequence parallel splits train.micro_batch_size*data.seq_len/cp = {config.train.micro_batch_size}*{S}/"
            f"{p.cp} = {tokens} tokens over parallel.tp={p.tp}, which does not divide them; of the degrees near it "
            f"{[n for n in range(1, min(2 * p.tp - 1, tokens) + 1) if tokens % n == 0][-3:]} do"
        )
    at_once = mesh.dp * config.train.micro_batch_size
    if config.train.global_batch_size % at_once:
        problems.append(
            f"train.global_batch_size={config.train.global_batch_size} rows does not divide by {mesh.dp} data-parallel "
            f"ranks x train.micro_batch_size={config.train.micro_batch_size} = {at_once} ({mesh.describe()}); near it"
            " are " + " and ".join(str(n) for n in _multiples_near(config.train.global_batch_size, at_once))
        )
    return problems


def _multiples_near(number: int, of: int) -> list[int]:
    """The multiples of `of` below and above `number`, from `of` on."""
    return sorted({max(of, number // of * of), (number // of + 1) * of})
