"""Routing as if all experts were chosen equally often: speed is told with it and without, never mixed."""

from __future__ import annotations

from typing import Any

import torch

from perilune.pretrain.model import Model


def force_balance(net: Model) -> None:
    """Let every router choose experts in turn, whatever its scores: token t takes K t, K t + 1, ... modulo E."""
    for _, router in net.routers():
        own, E, K = router.routing, router.num_experts, router.topk

        def in_turn(logits: torch.Tensor, *rest: Any, own: Any = own, E: int = E, K: int = K, **more: Any) -> Any:
            T = logits.numel() // E
            at_TK = (K * torch.arange(T, device=logits.device)[:, None] + torch.arange(K, device=logits.device)) % E
            turn_TE = torch.full((T, E), -20.0, device=logits.device).scatter_(1, at_TK, 20.0)
            return own(logits + turn_TE.to(logits.dtype).view_as(logits), *rest, **more)

        router.routing = in_turn
