"""Each patch of parallel/cpu.py is still needed: a test here fails once upstream no longer needs its patch."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace

import gloo_ranks
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

from perilune.parallel import cpu
from perilune.parallel.workers import Workers
from perilune.pretrain.parity import fixture

HERE = {
    "maybe_move_tensor_to_cpu",
    "_set_cuda_rng_state",
    "_gather_along_first_dim",
    "_reduce_scatter_along_first_dim",
    "dist_reduce_scatter_func",
    "dist_all_gather_func",
    "fused_apply_mla_rope_for_q",
    "fused_apply_mla_rope_for_kv",
    "linear_with_grad_accumulation_and_async_allreduce",
    "multi_tensor_scale_impl",
    "bias_swiglu_impl",
}


def upstream(name: str) -> ModuleType:
    """A fresh copy of a module of Megatron-core, as it was shipped."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_patch_has_a_test_here() -> None:
    assert {attribute for _, attribute, _, _ in cpu.PATCHES} == HERE
    assert [attribute for _, attribute, _, _ in cpu.WITHOUT_TRANSFORMER_ENGINE] == ["CheckpointWithoutOutput"]


def test_split_sizes_on_the_cpu_stay_tensors() -> None:
    assert torch.is_tensor(maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_random_state_waits_for_a_gpu_that_never_comes() -> None:
    random = upstream("megatron.core.tensor_parallel.random")
    kept = torch.get_rng_state()
    for restore, restored in ((random._set_cuda_rng_state, False), (cpu._set_rng_state, True)):
        torch.rand(1)
        restore(kept)
        assert torch.equal(torch.get_rng_state(), kept) == restored


def test_recomputation_thinks_fp8_is_on() -> None:
    random = upstream("megatron.core.tensor_parallel.random")
    assert random.CheckpointWithoutOutput().fp8
    assert not cpu._CheckpointWithoutOutput().fp8


def test_one_rank_does_not_copy_its_memory_onto_itself() -> None:
    asked: list[int] = []
    collective = cpu._unless_alone(lambda output, input_, *, group: asked.append(group.size()))
    memory, alone, two = torch.zeros(4), SimpleNamespace(size=lambda: 1), SimpleNamespace(size=lambda: 2)
    collective(memory, memory, group=alone)
    assert not asked
    collective(memory, memory, group=two)
    collective(torch.zeros(4), memory, group=alone)
    assert asked == [2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_fused_rope_is_megatrons_unfused_since_its_fused_needs_a_gpu() -> None:
    fused = upstream("megatron.core.fusions.fused_mla_yarn_rope_apply")
    unfused = upstream("megatron.core.models.common.embeddings.rope_utils").apply_rotary_pos_emb
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=True)
    P, R, scale = 6, 4, 1.1
    q, kv, key = torch.randn(5, 2, P + R), torch.randn(5, 2, P + 3), torch.randn(5, 1, R)
    half = torch.randn(5, 1, R // 2)
    angles, cos, sin = half.repeat(1, 1, 2), half.cos() * scale, half.sin() * scale

    def turned(x: torch.Tensor) -> torch.Tensor:
        given = {"config": config, "mscale": scale, "cp_group": object(), "mla_rotary_interleaved": True}
        out: torch.Tensor = unfused(x, angles, **given)
        return out

    with pytest.raises((RuntimeError, TypeError, ValueError)):
        fused.fused_apply_mla_rope_for_q(q, cos, sin, P, R)
    queries = cpu._rope_of_queries(q.clone(), cos, sin, P, R, None, 0, 1)
    keys, values = cpu._rope_of_keys(kv, key, cos, sin, R, P, 3, None, 0, 1)
    theirs = (
        torch.cat((q[..., :P], turned(q[..., P:])), -1),
        torch.cat((kv[..., :P], turned(key).expand(-1, 2, -1)), -1),
    )
    scores, expected = (torch.einsum("qnd,knd->nqk", *pair) for pair in ((queries, keys), theirs))
    torch.testing.assert_close(scores, expected)  # the order of what is turned is another, in queries and keys alike
    torch.testing.assert_close((queries[..., :P], keys[..., :P], values), (q[..., :P], kv[..., :P], kv[..., P:]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_gradients_of_linear_layers_are_added_in_the_matmul_on_gpus_alone() -> None:
    layers = upstream("megatron.core.tensor_parallel.layers")
    assert not layers._grad_accum_fusion_available
    theirs = layers.linear_with_grad_accumulation_and_async_allreduce
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(6, 8), torch.randn(6)
    upstream_grad, group = torch.randn(3, 2, 6), SimpleNamespace(size=lambda: 1)
    for has_bias in (False, True):  # one with a bias is left to Megatron-core
        found = []
        for linear in (cpu._linear, theirs):
            inputs = [one.clone().requires_grad_() for one in (x, weight, bias)][: 2 + has_bias]
            out = linear(*inputs, *([] if has_bias else [None]), False, False, False, None, None, group)
            found.append([out, *torch.autograd.grad(out, inputs, upstream_grad)])
        torch.testing.assert_close(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_model_on_a_cpu_computes_by_these_kernels(workers: Workers) -> None:
    config = fixture.config("base")
    (called,) = workers.run(1, gloo_ranks.kernels_called, config, fixture.batches("base", 1)[0])
    layers = config.model.num_layers + config.model.num_nextn_predict_layers
    assert called["rotate_tails"] == called["keys_and_values"] == called["swiglu"] == layers
    assert called["linear"] >= 5 * layers


def test_swiglu_is_megatrons_unless_it_has_a_bias_which_is_left_to_it() -> None:
    theirs = upstream("megatron.core.fusions.fused_bias_swiglu").bias_swiglu_impl
    h, bias, upstream_grad = torch.randn(3, 2, 8), torch.randn(8), torch.randn(3, 2, 4)
    for more in ((), (bias,)):
        found = []
        for function in (cpu._swiglu, theirs):
            inputs = [one.clone().requires_grad_() for one in (h, *more)]
            out = function(inputs[0], inputs[1] if more else None)
            found.append([out, *torch.autograd.grad(out, inputs, upstream_grad)])
        torch.testing.assert_close(*found)


def test_gradients_are_scaled_in_place_as_megatron_scales_them() -> None:
    theirs, ours = [torch.arange(4.0)], [torch.arange(4.0)]
    upstream("megatron.core.utils").local_multi_tensor_scale(0, None, [theirs, theirs], 0.3)
    before = ours[0].data_ptr()
    cpu._scale(0, torch.zeros(1), [ours, ours], torch.tensor(0.3))
    assert torch.equal(ours[0], theirs[0]) and ours[0].data_ptr() == before


def test_parts_of_unequal_size_over_gloo(workers: Workers) -> None:
    first, second = workers.run(2, gloo_ranks.uneven, True)
    assert first == [[[0, 0], [1, 1], [1, 1]], [[0, 2]], []]
    assert second == [[[0, 0], [1, 1], [1, 1]], [[4, 6], [8, 10]], []]
    with Workers(2) as own:  # a failed collective leaves its mark
        refused = own.run(2, gloo_ranks.uneven, False)
    for found in refused:
        assert "RuntimeError" in found[:2] or "ValueError" in found[:2]
