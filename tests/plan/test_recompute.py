"""The command that measures recomputation: every policy gives the gradients of none, and holds less."""

from __future__ import annotations

import json
from typing import Any

Perilune = Any  # the fixture of tests/conftest.py


def test_every_policy_keeps_the_gradients_and_saves_memory(perilune: Perilune) -> None:
    """Of two MTP depths the second is recomputed before the first is needed. On a CPU, attention keeps a softmax in
    bf16 only, and the experts never keep their activations: their policies have nothing to save elsewhere."""
    words = ["recompute", "tiny", "train.micro_batch_size=4"]
    for compute, layers, depths in (("fp32", 5, 2), ("bf16", 2, 1)):  # fp32 as deep as the last line needs
        sizes = f"model.num_layers={layers}", f"model.num_nextn_predict_layers={depths}"
        done = perilune(*words, *sizes, f"precision.compute={compute}", "--json")
        costs = {cost["policy"]: cost for cost in json.loads(done.stdout)}
        none = costs.pop("none")
        assert done.returncode == 0 and len(costs) == 10
        nothing_to_save = {"moe_act"} if compute == "bf16" else {"moe_act", "core_attn"}
        for policy, cost in costs.items():
            # A norm's gradient has two parts; recomputed, they are added to each other before they meet the residual's.
            assert cost["gradients"] <= (1e-6 if "layernorm" in policy else 0.0), policy
            assert policy in nothing_to_save or cost["bytes"] < none["bytes"], policy
        if compute == "fp32":
            assert costs["full"]["bytes"] < 0.5 * none["bytes"]


def test_a_refusal_names_what_was_asked_for(perilune: Perilune) -> None:
    done = perilune("recompute", "tiny", "train.micro_batch_size=0")
    assert done.returncode == 2 and "train.micro_batch_size=0 must be at least 1" in done.stderr
