"""What tests/test_played_gpu.py runs in processes whose GPU the CPU plays, and in others; functions of `Workers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core.parallel_state
import rope_like_triton
import torch
import torch.distributed as dist
from megatron.core.transformer import multi_latent_attention
from played_gpu import WrongPlace

from perilune.kernels import experts
from perilune.parallel import mesh as meshes
from perilune.pretrain.evaluate import likelihood
from perilune.pretrain.evaluate.generate import generate
from perilune.pretrain.evaluate.load import open_model
from perilune.pretrain.parity import probe
from perilune.pretrain.run import run
from perilune.pretrain.schema import Config, Kernels


def trained_with(kernels: Kernels, config: Config, *rest: Any) -> probe.Trained:
    """`probe.train` with these kernels, which must be what computes; in the place of Triton's stand
    rope_like_triton.py's.
    """
    queries, keys = rope_like_triton.queries, rope_like_triton.keys_and_values
    rope_like_triton.calls.clear()
    with (
        patch.object(multi_latent_attention, "fused_apply_mla_rope_for_q", queries),
        patch.object(multi_latent_attention, "fused_apply_mla_rope_for_kv", keys),
        patch.object(experts, "_compiled", wraps=experts._compiled) as compiled,
    ):
        found = probe.train(replace(config, kernels=kernels), *rest)
    assert bool(rope_like_triton.calls) == (kernels.rope == "triton")
    assert compiled.called == (kernels.swiglu == "compiled")
    return found


def training(configs: list[Config], run_dir: Path) -> None:
    """Runs one after another in one folder, each from the checkpoint of the one before."""
    for config in configs:
        run(config, run_dir, 1)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a run leaves its own


def asked(run_dir: Path, rows: list[list[int]]) -> tuple[list[list[float]], list[list[int]]]:
    """Log-likelihoods of rows by the model of a run, and the three tokens by which it continues each."""
    meshes.start(meshes.Mesh(1))
    net = open_model(run_dir).net
    likely = [found.tolist() for found in likelihood.log_likelihoods(net, rows)]
    return likely, [found.tokens for found in generate(net, rows, 3)]


def refused() -> dict[str, str]:
    """What a GPU would say of tensors in different places: '' of what it allows."""
    here, there = torch.ones(4, 4), torch.ones(4, 4, device="cuda")
    index, number = torch.arange(2), torch.tensor(2.0)
    group = dist.new_group(backend="gloo")
    actions: dict[str, Callable[[], object]] = {
        "product": lambda: here @ there,
        "sum": lambda: there + here,
        "sum into": lambda: torch.zeros(()).add_(there.sum()),
        "backward": lambda: _Mixing.apply(there.clone().requires_grad_()).sum().backward(),
        "a kernel's own memory": lambda: _Forgetting.apply(there.clone().requires_grad_()).sum().backward(),
        "rows by a GPU's numbers": lambda: here[index.cuda()],
        "select by a CPU's numbers": lambda: there.index_select(0, index),
        "cat with a number": lambda: torch.stack([there.sum(), number]),
        "numpy": lambda: there.numpy(),
        "NCCL": lambda: dist.all_reduce(here),
        "gloo": lambda: dist.all_reduce(there, group=group),
        "rows by a CPU's numbers": lambda: there[index],
        "a number of the CPU's": lambda: there * number,
        "there and back": lambda: there.cpu() + here + there.to("cpu") + there.to(here),
        "made there": lambda: there + there.new_zeros(4) + torch.zeros_like(there) + torch.eye(4, device=there.device),
        "copied": lambda: there.copy_(here),
        "NCCL on the GPU": lambda: dist.all_reduce(there),
    }
    found = {}
    for name, action in actions.items():
        try:
            action()
            found[name] = ""
        except WrongPlace as error:
            found[name] = str(error)
    found["modules"] = "" if megatron.core.parallel_state.torch is torch else "Megatron-core sees another torch"
    return found


class _Mixing(torch.autograd.Function):
    """Its backward uses a tensor that was left on the CPU."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.full((4, 4), 2.0)


class _Forgetting(_Mixing):
    """Its backward makes memory without saying where."""

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return torch.mul(grad, 2, out=torch.empty(4, 4))
