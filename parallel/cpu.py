"""The one file that patches Megatron-core: a dated list of small patches that let it run without CUDA.

Checked against megatron-core 0.19.2. Nothing of torch is changed for anybody else: each module of Megatron-core gets
its own view of `torch`, in which `device="cuda"` means the CPU and `torch.cuda` is a stand-in whose streams and events
do nothing (a CPU runs in order). What cannot be reached that way is in `PATCHES`, each with its cause and the test
that fails once upstream no longer needs it; and two methods of `torch.Tensor`, which answer all others as before.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings, random
from megatron.core.transformer import mlp

from perilune.kernels.linear import linear
from perilune.kernels.rope import keys_and_values, rotate_neighbours, rotate_tails
from perilune.kernels.swiglu import swiglu

_FACTORIES = (
    "tensor zeros ones empty full arange eye rand randn randint zeros_like ones_like empty_like full_like rand_like "
    "randn_like as_tensor empty_strided"
).split()
# Modules whose `torch` is replaced; those that a run never imports are not forced into memory.
_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.utils",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.tensor_parallel.cross_entropy",
    "megatron.core.tensor_parallel.data",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.module",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_logging",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.moe.shared_experts",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def _on_cpu(device: Any) -> Any:
    kind = device.type if isinstance(device, torch.device) else device
    return torch.device("cpu") if isinstance(kind, str) and kind.startswith("cuda") else device


class _Nothing:
    """A stream or an event of a device that runs in order: every method returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    def __hash__(self) -> int:
        return 0


class _CpuCuda(types.ModuleType):
    """`torch.cuda` as Megatron-core's modules see it on a machine without one."""

    Stream = Event = _Nothing

    def __init__(self) -> None:
        super().__init__("torch.cuda (CPU stand-in)")
        self.random = types.SimpleNamespace(get_rng_state=self.get_rng_state, set_rng_state=self.set_rng_state)
        self.nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None)

    def __getattr__(self, name: str) -> Any:  # what has no stand-in is torch's own (tensor types, exceptions)
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def current_stream(*_: Any) -> _Nothing:
        return _Nothing()

    default_stream = current_stream

    @staticmethod
    def stream(*_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(*_: Any) -> None:
        return None

    empty_cache = set_device = reset_peak_memory_stats = synchronize

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)


class _CpuTorch(types.ModuleType):
    """`torch` as Megatron-core's modules see it: factories put "cuda" tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch (CPU view)")
        self.cuda = _CpuCuda()
        for name in _FACTORIES:
            setattr(self, name, self._remapped(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _remapped(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def build(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # pinning asks for a driver
            return factory(*args, **kwargs)

        return build


def _tensor_type_named_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type()`; Megatron's optimizers compare its answer with the strings 'torch.cuda.FloatTensor' and so on."""
    answer = _TENSOR_TYPE(tensor, *args, **kwargs)
    if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


def _tensor_stays(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda()` called by Megatron-core leaves the tensor where it is; anyone else gets torch's own error."""
    if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
        return tensor
    return _TENSOR_CUDA(tensor, *args, **kwargs)


class _Ints(list[int]):
    """A list where Megatron-core expects a numpy array of split sizes."""

    def tolist(self) -> list[int]:
        return self


def _split_sizes_as_ints(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu` converts only what was on a GPU, but gloo's all-to-all wants ints."""
    del record_stream
    return _Ints(tensor.tolist()) if as_numpy and torch.is_tensor(tensor) else tensor


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(new_state)


def _gather_uneven(
    input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """All-gather along dim 0 of parts of unequal size: padded to the largest, and cut afterwards."""
    if output_split_sizes is None or group.size() == 1:
        return _GATHER(input_, group, output_split_sizes, use_global_buffer)
    largest = max(output_split_sizes)
    whole = input_.new_empty(group.size() * largest, *input_.shape[1:])
    dist.all_gather_into_tensor(whole, _padded(input_, largest), group=group)
    parts = zip(whole.split(largest) if largest else [whole] * group.size(), output_split_sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def _reduce_scatter_uneven(
    input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """Reduce-scatter along dim 0 into parts of unequal size: padded to the largest, and cut afterwards."""
    if input_split_sizes is None or group.size() == 1:
        return _REDUCE_SCATTER(input_, group, input_split_sizes, use_global_buffer)
    largest = max(input_split_sizes)
    parts = torch.cat([_padded(part, largest) for part in input_.split(input_split_sizes)])
    mine = input_.new_empty(largest, *input_.shape[1:])
    dist.reduce_scatter_tensor(mine, parts, group=group)
    return mine[: input_split_sizes[group.rank()]]


def _rope_of_queries(
    t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, qk_head_dim: int, emb_dim: int, *cut: Any
) -> torch.Tensor:
    """MLA's queries by `kernels/rope.py`: tokens carry their own angles, and none is cut by documents."""
    del qk_head_dim, emb_dim, cut
    return rotate_tails(t, torch.complex(cos, sin))


def _rope_of_keys(
    kv: torch.Tensor, k_pos_emb: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, emb_dim: int, k_dim: int, *cut: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of its keys and values."""
    del emb_dim, cut
    return keys_and_values(kv, rotate_neighbours(k_pos_emb, torch.complex(cos, sin)), k_dim)


def _linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: Any = None,
    wgrad_deferral_limit: int | None = 0,
    tp_group: Any = None,
    gtp_remat_size: int = 1,
) -> torch.Tensor:
    """A linear layer by `kernels/linear.py` where nothing of it is another rank's."""
    alone = not allreduce_dgrad and not sequence_parallel and gtp_remat_size == 1
    if alone and bias is None and grad_output_buffer is None:
        return linear(input, weight)
    return _LINEAR(
        input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, grad_output_buffer,
        wgrad_deferral_limit, tp_group, gtp_remat_size,
    )  # fmt: skip


def _swiglu(
    input: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> torch.Tensor:
    """SwiGLU of dense layers and shared experts by `kernels/swiglu.py`."""
    if bias is None and not fp8_input_store and not cpu_offload_input:
        return swiglu(input)
    return _SWIGLU(input, bias, fp8_input_store, cpu_offload_input)  # type: ignore[no-any-return]


def _scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Any, scale: Any) -> None:
    """`local_multi_tensor_scale` without a copy between."""
    del chunk_size, noop_flag
    for source, out in zip(tensor_lists[0], tensor_lists[1], strict=True):
        torch.mul(source, scale, out=out)


_linear.warned = True  # type: ignore[attr-defined]  # its warning about CUDA_DEVICE_MAX_CONNECTIONS, kept at its name


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((part, part.new_zeros(rows - part.shape[0], *part.shape[1:])))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """`collective(output, input, ...)`, which does nothing where one rank would copy memory onto itself."""

    def call(output: torch.Tensor, input_: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1 and output.data_ptr() == input_.data_ptr():
            return None
        return collective(output, input_, *args, group=group, **kwargs)

    return call


_GATHER, _REDUCE_SCATTER = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
_LINEAR = layers.linear_with_grad_accumulation_and_async_allreduce
_SWIGLU = mlp.bias_swiglu_impl
_TENSOR_TYPE = torch.Tensor.type
_TENSOR_CUDA = torch.Tensor.cuda


class _CheckpointWithoutOutput(random.CheckpointWithoutOutput):
    """Recomputation that asks Transformer Engine for its FP8 state only where FP8 is on."""

    def __init__(self, fp8: Any = None) -> None:
        super().__init__(fp8 or None)


Patch = tuple[str, str, Any, str]
# (module, attribute, replacement, why; tests/parallel/test_cpu.py fails once upstream no longer needs it, but for those
# that only save time)
PATCHES: tuple[Patch, ...] = (
    (
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _split_sizes_as_ints,
        "2026-11: split sizes that are already on the CPU stay tensors; all_to_all_single wants ints",
    ),
    (
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "2026-11: waits for CUDA to start, which never comes, so a recomputed dropout would draw anew",
    ),
    (
        "megatron.core.tensor_parallel.mappings",
        "_gather_along_first_dim",
        _gather_uneven,
        "2026-11: gloo has no all-gather of unequal parts, which EP with ETP needs",
    ),
    (
        "megatron.core.tensor_parallel.mappings",
        "_reduce_scatter_along_first_dim",
        _reduce_scatter_uneven,
        "2026-11: gloo has no reduce-scatter of unequal parts; the backward of the above",
    ),
    (
        "megatron.core.distributed.param_and_grad_buffer",
        "dist_reduce_scatter_func",
        _unless_alone(dist.reduce_scatter_tensor),
        "2026-11: gloo copies all gradients of a group of one rank out and in again",
    ),
    (
        "megatron.core.distributed.param_and_grad_buffer",
        "dist_all_gather_func",
        _unless_alone(dist.all_gather_into_tensor),
        "2026-11: the same of all parameters",
    ),
    (
        "megatron.core.tensor_parallel.layers",
        "linear_with_grad_accumulation_and_async_allreduce",
        _linear,
        "2026-11: gradients are added to DDP's buffer in the matmul on GPUs alone; bf16 is slow on many CPUs",
    ),
    (
        "megatron.core.transformer.mlp",
        "bias_swiglu_impl",
        _swiglu,
        "2026-11: its SwiGLU is fused where it is compiled, which a CPU does without (parallel/late_compile.py)",
    ),
    (
        "megatron.core.optimizer.clip_grads",
        "multi_tensor_scale_impl",
        _scale,
        "2026-11: clipping writes every gradient twice: a product, and its copy",
    ),
    *(
        (
            "megatron.core.transformer.multi_latent_attention",
            name,
            ours,
            "2026-11: its RoPE that copies little is for GPUs alone, and no submodule of the layer spec stands for it",
        )
        for name, ours in (
            ("fused_apply_mla_rope_for_q", _rope_of_queries),
            ("fused_apply_mla_rope_for_kv", _rope_of_keys),
        )
    ),
)
# The same where Transformer Engine is missing, on whatever device.
WITHOUT_TRANSFORMER_ENGINE: tuple[Patch, ...] = (
    (
        "megatron.core.tensor_parallel",
        "CheckpointWithoutOutput",
        _CheckpointWithoutOutput,
        "2026-11: the default fp8=False counts as 'on' (it is compared with None), and norms are recomputed with it",
    ),
)


def install() -> None:
    """Let Megatron-core run on this machine: on its CPU, or without Transformer Engine. Safe to call again."""
    if importlib.util.find_spec("transformer_engine_torch") is None:
        for name, attribute, replacement, _ in WITHOUT_TRANSFORMER_ENGINE:
            setattr(importlib.import_module(name), attribute, replacement)
    if torch.cuda.is_available():
        return
    view = _CpuTorch()
    for name in _MODULES:
        module = importlib.import_module(name)
        if isinstance(getattr(module, "torch", None), _CpuTorch):
            return  # installed before
        module.torch = view  # type: ignore[attr-defined]
    for name, attribute, replacement, _ in PATCHES:
        setattr(importlib.import_module(name), attribute, replacement)
    torch.Tensor.type = _tensor_type_named_cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = _tensor_stays  # type: ignore[method-assign,assignment]
