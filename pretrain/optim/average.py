"""An exponential moving average of the weights, kept beside an optimizer's moments and masters.

    E <- d E + (1 - d) W        after every update that was not skipped, d = `optim.ema_decay`

W is what the optimizer moves: the fp32 master of a 16-bit weight, else the weight; with ZeRO-1 a range of either. E is
in fp32 and of the same elements. It begins as the weights before its first update, not as zero, so it is an average of
weights from the start, and nothing has to be corrected for.

DeepSeek-V3 keeps one to see early how the model will be once the learning rate has decayed (arXiv 2412.19437, section
3.2.3). There it lies in the host's memory and is updated beside the next step; here it lies where the moments lie.

It is no entry of the inner optimizer's state: torch's AdamW takes a parameter that has any for one that has moments,
and Transformer Engine's refuses names that it does not know.
"""

from __future__ import annotations

from typing import Any

import torch


class Average:
    """Of all parameters of `part`, one of the optimizers in Megatron-core's chain; 0 <= `decay` < 1."""

    def __init__(self, part: Any, decay: float) -> None:
        self.of: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its average, in its shape; empty until it begins
        self._part, self._decay = part, decay

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._part.param_groups for parameter in group["params"]]

    def begin(self) -> None:
        """Begin as the weights, as they are now, unless it has begun."""
        if not self.of:
            self.of = {p: p.detach().to(torch.float32, copy=True) for p in self.parameters}

    def forget(self) -> None:
        """Let it begin again."""
        self.of = {}

    @torch.no_grad()
    def follow(self) -> None:
        """Take the weights, as they are now, into the average, which must have begun."""
        if parameters := self.parameters:
            torch._foreach_lerp_([self.of[p] for p in parameters], parameters, 1 - self._decay)


def average_of(part: Any) -> Average | None:
    """The average that `part`, one of the optimizers in Megatron-core's chain, keeps."""
    return getattr(part, "average", None)
