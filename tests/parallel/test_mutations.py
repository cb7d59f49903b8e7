"""The matrix sees what it is there to see: every planted error is out of tolerance, and nothing is without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mutations
import pytest

from perilune.parallel.workers import Workers
from perilune.pretrain.parity.layouts import Case
from perilune.pretrain.parity.matrix import Matrix
from perilune.pretrain.schema import Parallel, Recompute

DP, EP = Case(2), Case(2, Parallel(ep=2))
PP, VPP = Case(2, Parallel(pp=2)), Case(2, Parallel(pp=2, vpp=2))
TP, CP = (Case(2, parallel, micro_batch_size=2) for parallel in (Parallel(tp=2), Parallel(cp=2)))  # fewer messages
IMAGES = Case(2, fixture="vlm", micro_batch_size=2)
MUON = Case(2, Parallel(tp=2), micro_batch_size=2, optimizer="muon")
FULL = Case(1, recompute=Recompute("full"))
PLANTED: tuple[tuple[Callable[[pytest.MonkeyPatch], None], Case, str], ...] = (  # and what at least must be out
    (mutations.mtp_by_micro_batch, DP, "gradient"),
    (mutations.mean_of_means, DP, "gradient"),
    (mutations.bias_of_own_load, DP, "biases"),
    (mutations.rope_restarts_late, DP, "loss"),
    (mutations.attention_leaks, DP, "loss"),
    (mutations.shard_not_gathered, DP, "replicas"),
    (mutations.gate_gradient_lost, EP, "gradient"),
    (mutations.expert_reduced_as_dense, EP, "gradient"),
    (mutations.expert_reduced_as_dense, TP, "gradient"),
    (mutations.rope_key_not_summed, TP, "gradient"),
    (mutations.balance_by_tp, TP, "balance"),
    (mutations.balance_of_own_tokens, TP, "gradient"),
    (mutations.norm_not_summed, TP, "gradient"),
    (mutations.embeddings_apart, PP, "replicas"),
    (mutations.embeddings_apart, VPP, "replicas"),
    (mutations.paired_messages, VPP, "loss"),
    (mutations.counted_when_recomputed, FULL, "counts"),
    (mutations.bias_of_own_load, CP, "biases"),
    (mutations.balance_of_own_tokens, CP, "gradient"),
    (mutations.attention_leaks_over_cuts, CP, "loss"),
    (mutations.local_positions, CP, "loss"),
    (mutations.key_gradient_split, CP, "gradient"),
    (mutations.keys_out_of_order, CP, "loss"),
    (mutations.mtp_inside_the_cut, CP, "mtp"),
    (mutations.pieces_lost, MUON, "update"),
    (mutations.pieces_lost, replace(MUON, parallel=DP.parallel), "update"),
    (mutations.image_gradient_split, replace(IMAGES, parallel=TP.parallel), "gradient"),
    (mutations.images_see_each_other, IMAGES, "loss"),
    (mutations.images_by_the_cut, replace(IMAGES, parallel=CP.parallel), "loss"),
)


@pytest.fixture(scope="module")
def matrix(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(workers, tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize(
    ("planted", "case", "where"),
    PLANTED,
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "name", value),
)
def test_a_planted_error_is_caught(
    planted: Callable[[pytest.MonkeyPatch], None], case: Case, where: str, matrix: Matrix
) -> None:
    result = matrix.compare(case, mutations.train, planted)
    assert not result.error
    assert where in result.failures, result.deviations


@pytest.mark.parametrize("case", [DP, EP, TP, PP, VPP, CP, FULL], ids=lambda case: case.name)
def test_without_a_planted_error_nothing_is_out_of_tolerance(case: Case, matrix: Matrix) -> None:
    """After the planted ones, in the same processes: they leave nothing behind."""
    assert not matrix.compare(case).failures
