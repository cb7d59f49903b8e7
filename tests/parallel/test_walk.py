"""One run walks through six layouts, of one to eight processes, by its checkpoints: nothing changes on the way."""

from __future__ import annotations

from pathlib import Path

import checkpoint_ranks as ranks
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from perilune.parallel.workers import Workers

LAYOUTS = (
    (2, {"pp": 2, "vpp": 2}),
    (4, {"tp": 2, "ep": 4}),
    (1, {}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 2}),
    (4, {"cp": 2, "ep": 2, "etp": 2, "zero1": False}),
    (2, {"ep": 2, "dispatcher": "allgather"}),
)


def tensors_of(path: Path, out: Path) -> dict[str, torch.Tensor]:
    """The whole global tensors of a checkpoint, put together by torch's own tool, which knows nothing of layouts."""
    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=True)


def test_a_run_walks_through_six_layouts(workers: Workers, tmp_path: Path) -> None:
    """Each loads what the one before saved, saves it again, takes a step, saves, and takes the step after.

    Weights and optimizer state are the same bits after the first save and the second; and the step after is the same
    in both layouts, to the tolerance of the matrix.
    """
    before = None
    for index, (world, degrees) in enumerate(LAYOUTS):
        source = before["path"] if before else None
        found = workers.run(world, ranks.hop, ranks.config_of(**degrees), source, tmp_path / f"{index}")[0]
        if before is not None:
            saved = tensors_of(before["path"], tmp_path / "saved.pt")
            again = tensors_of(found["copy"], tmp_path / "again.pt")
            assert saved.keys() == again.keys(), degrees
            assert all(torch.equal(saved[name], again[name]) for name in saved), degrees
            assert sum("exp_avg" in name for name in saved) > 30
            assert found["loss"] == pytest.approx(before["next"], rel=1e-6), degrees
        before = found
    assert before is not None and before["step"] == len(LAYOUTS)
