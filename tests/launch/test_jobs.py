"""`perilune jobs`: what is shown, followed and left of a run, whatever its cluster says meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from perilune.launch import slurm
from perilune.launch.job import Job, NoAnswer, Papers
from perilune.launch.judge import note
from perilune.pretrain import jobs_command
from perilune.pretrain.errors import InputError


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    """Of a run on Slurm, with a line in its log."""
    found = Papers(tmp_path / "run")
    found.write(Job(("train",), found.run_dir, folder=tmp_path), {"launcher": "slurm", "jobs": ["7"]})
    found.logs.mkdir()
    (found.logs / "rank_0.log").write_text("first\n")
    return found


@pytest.mark.parametrize("part", ["[enforce fail at inline.cc:603] . unexpected", "no [/data/a, /data/b]"])
def test_an_error_with_brackets_is_shown_whole(
    papers: Papers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    monkeypatch.setattr(slurm, "state", lambda where: "failed")
    note(papers, "gave_up", attempt=0, why=f"rank 0: {part}")
    assert jobs_command.status(papers.run_dir, as_json=False) == 0
    assert f"gave_up: rank 0: {part}" in " ".join(capsys.readouterr().out.split())


def test_logs_are_followed_while_the_run_may_write_more(
    papers: Papers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm lets it wait for its next start, does not answer, and says that it has ended."""
    states = ["pending (BeginTime)", "unknown: squeue: timed out", "running (suspended)", "running"]

    def state(where: Any) -> str:
        del where
        with (papers.logs / "rank_0.log").open("a") as log:
            log.write(f"at {states[0] if states else 'the end'}\n")
        return states.pop(0) if states else "done"

    monkeypatch.setattr(slurm, "state", state)
    monkeypatch.setattr(jobs_command, "_ASK_S", 0.0)
    assert jobs_command.logs(papers.run_dir, None, 5, follow=True) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "first" and said[-1] == "at the end" and len(said) == 6


def test_a_cluster_is_not_asked_at_every_look_at_its_logs(papers: Papers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def state(where: Any) -> str:
        del where
        asked.append(time.monotonic())
        return "running" if len(asked) < 2 else "done"

    monkeypatch.setattr(slurm, "state", state)
    monkeypatch.setattr(jobs_command, "_ASK_S", 1.5)
    jobs_command.logs(papers.run_dir, None, 5, follow=True)
    assert asked[1] - asked[0] >= 1.5


def test_a_cancel_that_did_not_come_through_is_no_wish_to_end(papers: Papers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's own signals at a time limit would be taken for one."""

    def cancel(where: Any, now: bool) -> None:
        assert (papers.folder / "cancelled").exists()
        raise NoAnswer("squeue: timed out")

    monkeypatch.setattr(slurm, "cancel", cancel)
    with pytest.raises(InputError, match="timed out"):
        jobs_command.cancel(papers.run_dir, now=False)
    assert not (papers.folder / "cancelled").exists()
    monkeypatch.setattr(slurm, "cancel", lambda where, now: None)
    assert jobs_command.cancel(papers.run_dir, now=False) == 0
    assert (papers.folder / "cancelled").exists()
