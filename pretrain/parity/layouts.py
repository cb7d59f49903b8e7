"""Which layouts the parity matrix compares: every product of degrees, and each axis under each variant of the model.

A case is named by what differs from one rank: `tp2 cp2 ep4` is 4 processes or more, as the degrees ask.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from perilune.pretrain import rules
from perilune.pretrain.errors import InputError
from perilune.pretrain.parity import fixture
from perilune.pretrain.schema import Config, Parallel, Recompute

DEGREES = (1, 2, 4, 8)
MOST_STAGES = 4  # the fixture has four layers


@dataclass(frozen=True)
class Case:
    """One layout of one fixture, on `world` processes."""

    world: int
    parallel: Parallel = field(default_factory=Parallel)
    recompute: Recompute = field(default_factory=Recompute)
    fixture: str = "base"
    micro_batch_size: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def name(self) -> str:
        """Unique in the matrix, and readable."""
        p, default = self.parallel, Parallel()
        dp = self.world // (p.tp * p.pp * p.cp)
        words = [f"{axis}{getattr(p, axis)}" for axis in ("tp", "pp", "vpp", "cp") if getattr(p, axis) > 1]
        words += [f"dp{dp}"] if dp > 1 else []
        words += [f"{axis}{getattr(p, axis)}" for axis in ("ep", "etp") if getattr(p, axis) > 1]
        words += [] if p.dispatcher == default.dispatcher else [p.dispatcher]
        words += [] if p.layout is None else [p.layout]
        words += [] if p.zero1 or self.world == 1 else ["no-zero1"]
        words += [] if self.recompute.granularity == "none" else ["recompute"]
        words += ["full"] if self.recompute.granularity == "full" else ["+".join(self.recompute.modules)]
        words += [f"micro{self.micro_batch_size}"] if self.micro_batch_size != 1 else []
        words += [] if self.optimizer == "adamw" else [self.optimizer]
        words += [] if self.fixture == "base" else [f"({self.fixture})"]
        return " ".join(word for word in words if word) or "one rank"

    @property
    def config(self) -> Config:
        """The run's config of this case."""
        base = fixture.config(self.fixture, self.optimizer)
        return replace(
            base,
            parallel=self.parallel,
            recompute=self.recompute,
            train=replace(base.train, micro_batch_size=self.micro_batch_size),
        )

    def refusal(self) -> str | None:
        """Why this case cannot be, or None."""
        try:
            rules.check(self.config, self.world)
        except InputError as error:
            return str(error)
        return None


def matrix(max_procs: int = 8) -> list[Case]:
    """Every case of at most `max_procs` processes, small ones first."""
    every = [*_products(max_procs), *_variants(), *_recomputed(), *_settings(), *_muon()]
    found = {case.name: case for case in every}
    return sorted((c for c in found.values() if c.world <= max_procs and not c.refusal()), key=lambda c: c.world)


def _products(max_procs: int) -> list[Case]:
    """Every product of degrees; rows a forward pass and the dispatcher take turns, so that each meets every axis."""
    cases: list[Case] = []
    for world in (n for n in DEGREES if n <= max_procs):
        for tp, pp, vpp, cp, ep, etp in product(DEGREES, DEGREES, (1, 2), DEGREES, DEGREES, DEGREES):
            fits = world % (tp * pp * cp) == 0 and world % (ep * etp * pp) == 0
            if not fits or pp * vpp > MOST_STAGES or (vpp > 1 and pp == 1):
                continue
            # With eight processes, of the other products of expert axes only that which fewer have no room for.
            if world == 8 and etp not in (1, tp) and not etp == ep == pp == 2:
                continue
            turn = world // (tp * pp * cp) + tp + pp // 2 + vpp + cp + ep + etp
            parallel = Parallel(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp)
            if ep > 1 and turn % 3 == 0:
                parallel = replace(parallel, dispatcher="allgather")
            case = Case(world, parallel, micro_batch_size=2 if turn % 2 else 1)
            cases.append(replace(case, micro_batch_size=1) if case.refusal() else case)
    return cases


_AXES = (
    (2, Parallel()),
    (2, Parallel(tp=2)),
    (2, Parallel(pp=2)),
    (2, Parallel(pp=2, vpp=2)),
    (2, Parallel(cp=2)),
    (2, Parallel(ep=2)),
    (4, Parallel(tp=2, ep=2, etp=2)),
    (4, Parallel(tp=2, cp=2, ep=4)),
    (8, Parallel(tp=2, pp=2, cp=2, ep=2)),
)


def _variants() -> list[Case]:
    """Each axis alone, and some products, under every other fixture."""
    others = [name for name in fixture.NAMES if name != "base"]
    return [Case(world, parallel, fixture=name, micro_batch_size=2) for name in others for world, parallel in _AXES]


def _recomputed() -> list[Case]:
    """Each policy on one rank, and on products that it could upset."""
    selective = [Recompute("selective", (name,)) for name in recompute_names()]
    v3 = Recompute("selective", ("layernorm", "mla_up_proj", "moe_act"))  # what DeepSeek-V3 trains with
    policies = [*selective, v3, Recompute("full")]
    alone = [Case(1, recompute=policy, micro_batch_size=2) for policy in policies]
    together = [
        Case(world, parallel, recompute=policy)
        for policy in (v3, Recompute("selective", ("core_attn", "moe", "mtp")), Recompute("full"))
        for world, parallel in (_AXES[3], _AXES[6], _AXES[7])
    ]
    seeing = Case(2, Parallel(tp=2), Recompute("full"), fixture="vlm", micro_batch_size=2)
    return [*alone, *together, seeing]


def recompute_names() -> list[str]:
    """Names of what can be recomputed."""
    from perilune.parallel.recompute import MODULES

    return list(MODULES)


def _settings() -> list[Case]:
    """Optimizer state not sharded, uneven stages, and other sizes of micro-batches."""
    plain = [replace(parallel, zero1=False) for _, parallel in _AXES]
    cases = [Case(world, parallel) for (world, _), parallel in zip(_AXES, plain, strict=True)]
    layouts = ((2, "Ettt|tmL"), (2, "Et|tttmL"), (4, "Ett|t|t|mL"), (4, "Et|tt|t|mL"), (4, "E|tt|tt|mL"))
    cases += [Case(pp, Parallel(pp=pp, layout=layout)) for pp, layout in layouts]
    cases += [Case(2, Parallel(pp=2, vpp=2, layout=layout)) for layout in ("Et|t|t|tmL", "E|tt|t|tmL")]
    cases += [Case(world, parallel, micro_batch_size=4) for world, parallel in _AXES[:2] + _AXES[4:6]]
    return cases


def _muon() -> list[Case]:
    """Muon on each axis, with what it cuts differently: no query latent, fused queries, keys and values of a tower."""
    layouts = [
        (1, Parallel()),
        *_AXES,
        (2, Parallel(zero1=False)),
        (2, Parallel(tp=2, zero1=False)),
        (2, Parallel(etp=2)),
        (2, Parallel(tp=2, etp=2)),
        (2, Parallel(ep=2, zero1=False)),
        (4, Parallel()),
        (4, Parallel(etp=2)),  # experts split and copied
        (4, Parallel(tp=2)),
        (8, Parallel(tp=2, pp=2)),
    ]
    cases = [Case(world, parallel, micro_batch_size=2 if world < 8 else 1) for world, parallel in layouts]
    seen = ((2, Parallel()), (2, Parallel(tp=2)), (4, Parallel(tp=2, cp=2, ep=4)))
    cases += [Case(world, p, fixture=name, micro_batch_size=2) for name in ("moonlight", "vlm") for world, p in seen]
    return [replace(case, optimizer="muon") for case in cases]
