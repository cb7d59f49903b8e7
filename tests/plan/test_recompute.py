"""The command that measures recomputation: every policy gives the gradients of none, and holds less."""

from __future__ import annotations

import json
from typing import Any

Perilune = Any  # the fixture of tests/conftest.py


def test_every_policy_keeps_the_gradients_and_saves_memory(perilune: Perilune) -> None:
    done = perilune("recompute", "tiny", "train.micro_batch_size=4", "optim.name=muon", "--json")  # no step is taken
    costs = {cost["policy"]: cost for cost in json.loads(done.stdout)}
    none = costs.pop("none")
    assert done.returncode == 0 and len(costs) == 10
    for policy, cost in costs.items():
        # A norm's gradient has two parts; recomputed, they are added to each other before they meet the residual's.
        assert cost["gradients"] <= (1e-6 if "layernorm" in policy else 0.0), policy
        # On a CPU attention and experts keep no more than their inputs anyway, and a depth's peak is its head's.
        most = 1.02 if policy in ("core_attn", "moe_act", "mtp") else 1.0
        assert cost["bytes"] < most * none["bytes"], policy
    assert costs["full"]["bytes"] < 0.7 * none["bytes"]


def test_a_refusal_names_what_was_asked_for(perilune: Perilune) -> None:
    done = perilune("recompute", "tiny", "train.micro_batch_size=0")
    assert done.returncode == 2 and "train.micro_batch_size=0 must be at least 1" in done.stderr
