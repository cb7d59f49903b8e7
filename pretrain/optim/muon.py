"""Muon for the matrices, AdamW for the rest (Moonlight, arXiv 2502.16982), inside of Megatron-core's own optimizers.

Of a matrix W [A, B] with gradient g, learning rate eta and decay lambda (eq. 1 and 4, with Nesterov's momentum):

    M <- mu M + g        O = NewtonSchulz(mu M + g)        W <- W - eta (0.2 sqrt(max(A, B)) O + lambda W)

so that a matrix's update has a root mean square near 0.2, as AdamW's do, and both take one eta and lambda. AdamW's part
decays whole too, gains of norms included, as in Moonlight's published code.

Where it stands. Megatron-core's optimizers reduce gradients into flat buffers, own the fp32 masters, clip by the global
norm and gather the weights; of the optimizer inside they ask `step` and a state for each parameter, which with ZeRO-1
is a range of a flattened weight. So this is such an inner optimizer, as in the paper's algorithm 1: momentum is kept
where the gradient and the master are, in the shape of the range, and only whole matrices for Newton-Schulz are put
together, in the compute type (`optim/exchange.py`). Clipping, skipped steps, overlapped gathers, checkpoints that
reshard and saves beside training are then those of AdamW. The alternative, each matrix owned whole by one rank, would
have wanted all of that anew. Two things differ from algorithm 1: one rank puts a matrix together and sends the update
back, where there all ranks that hold a part of it compute the same; and tensor-parallel shards are treated as
data-parallel ones, so that no rank repeats another's work there either.

Megatron-core 0.19.2 has a Muon. It is not used: it wants a package that Megatron-core does not declare
(`emerging_optimizers`), hands weights of three dims, which all our experts are, to Adam, takes gate and up for one
matrix, and its sharded form ("layer-wise") keeps a state that our checkpoints do not reshard; and by default it takes
each tensor-parallel shard for a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from perilune.kernels.newton_schulz import orthogonalized
from perilune.pretrain.optim.exchange import Exchange
from perilune.pretrain.optim.matrices import Box, Name

RMS = 0.2  # of an update, about: AdamW's (section 2.2)
MOMENTUM = "momentum_buffer"  # its name in a parameter's state, and so in checkpoints


def scale(rows: int, columns: int) -> float:
    """What a nearly orthogonal matrix is multiplied by (eq. 4)."""
    return RMS * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Piece:
    """A rectangle of a matrix as it lies in a parameter that this rank optimizes, which is contiguous."""

    parameter: torch.Tensor
    box: Box
    offset: int  # elements from the parameter's first
    strides: tuple[int, int]

    def of(self, like_parameter: torch.Tensor) -> torch.Tensor:
        """The rectangle in the parameter, its gradient or its momentum."""
        size = (self.box.rows, self.box.columns)
        return like_parameter.as_strided(size, self.strides, like_parameter.storage_offset() + self.offset)


class Muon(torch.optim.Optimizer):
    """Parameters that have pieces are Muon's, all others AdamW's. `group["step"]` counts steps, as in TE's AdamW.

    `param_groups` are those of an AdamW (lr, betas, eps, weight_decay); `shapes` the matrices of the pieces. Made on
    all ranks of `group`, which together hold these matrices.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        pieces: Sequence[Piece],
        shapes: dict[Name, tuple[int, int]],
        group: dist.ProcessGroup,
        *,
        momentum: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__([{"params": []}], {})  # torch refuses parameters that are views, as shards of weights are
        self.param_groups = param_groups
        self._pieces, self._momentum, self._dtype, self._device = list(pieces), momentum, dtype, device
        self._matrices = {id(piece.parameter) for piece in pieces}
        self._exchange = Exchange([piece.box for piece in pieces], shapes, group)
        # Sum and count of the root mean squares of the last step's updates, of the matrices put together here.
        self.update_rms = torch.zeros(2, dtype=torch.float64, device=device)

    def init_state(self) -> None:
        """What the first step would begin with: zero moments."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            names = (MOMENTUM,) if id(parameter) in self._matrices else ("exp_avg", "exp_avg_sq")
            for name in names:
                if name not in self.state[parameter]:
                    self.state[parameter][name] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that all parameters have. Collective over the group."""
        del closure
        self.init_state()
        rates: dict[int, float] = {}
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            mine = [p for p in group["params"] if id(p) in self._matrices]
            self._adamw(group, [p for p in group["params"] if id(p) not in self._matrices])
            for parameter in mine:
                rates[id(parameter)] = group["lr"]
                self.state[parameter][MOMENTUM].mul_(self._momentum).add_(parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self._orthogonal(rates)

    def _adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        if not parameters:
            return
        before = float(group["step"] - 1)
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [torch.tensor(before, device=p.device) for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _orthogonal(self, rates: dict[int, float]) -> None:
        """Move the matrices, by Nesterov's momentum made orthogonal."""

        def ahead(index: int) -> torch.Tensor:
            piece = self._pieces[index]
            moment = piece.of(self.state[piece.parameter][MOMENTUM])
            return torch.add(piece.of(piece.parameter.grad), moment, alpha=self._momentum)  # type: ignore[arg-type]

        self.update_rms.zero_()
        for one in self._exchange.rounds:
            whole = self._exchange.together(one, ahead, self._dtype, self._device)
            for sides, x in whole.items():
                whole[sides] = orthogonalized(x, self._dtype)
                norms = torch.linalg.vector_norm(whole[sides], dim=(-2, -1), dtype=torch.float32)
                self.update_rms[0] += norms.double().sum() * scale(*sides) / math.sqrt(math.prod(sides))
                self.update_rms[1] += len(norms)
            for index, values in self._exchange.apart(one, whole, self._dtype, self._device):
                piece = self._pieces[index]
                rows, columns = self._exchange.shapes[piece.box.name]
                rate = rates[id(piece.parameter)] * scale(rows, columns)
                piece.of(piece.parameter).add_(values, alpha=-rate)
