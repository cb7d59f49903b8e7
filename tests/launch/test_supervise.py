"""What follows from an attempt that ended, and which rank a hang is blamed on: on the files that ranks leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perilune.launch.job import Job, Papers
from perilune.launch.judge import begin, events, exits_file, failures, judge, record_hang
from perilune.launch.supervise import supervise
from perilune.launch.watch import Hang, Watch, read_stack
from perilune.pretrain import vital_signs
from perilune.pretrain.checkpoint_files import DamagedCheckpoint
from perilune.pretrain.errors import InputError, Preempted


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(("train", "tiny"), tmp_path, procs_per_node=2, restarts=3, hang_s=0.6, start_s=5)


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    papers = Papers(tmp_path)
    begin(papers)
    return papers


def fail(
    papers: Papers, attempt: int, rank: int, kind: str, step: int, at: float, error: str = "E: x", **more: Any
) -> None:
    body = {"kind": kind, "step": step, "error": error, "time": at, "host": "n1", **more}
    (papers.failures / f"attempt_{attempt:03d}_rank_{rank:05d}.json").write_text(json.dumps(body))


# --- judgement ----------------------------------------------------------------------------------------------------


def test_ends_that_are_none_of_a_failure(job: Job, papers: Papers) -> None:
    assert (judge(job, papers, 0, 0).again, judge(job, papers, 0, 0).code) == (False, 0)
    verdict = judge(job, papers, 0, 75)
    assert (verdict.again, verdict.code, verdict.kind) == (False, 75, "preempted")


def test_the_cause_is_the_earliest_that_is_no_lost_peer(job: Job, papers: Papers) -> None:
    fail(papers, 0, 0, "lost_peer", 8, at=1.0)
    fail(papers, 0, 1, "out_of_memory", 7, at=2.0)
    fail(papers, 0, 2, "error", 7, at=3.0)
    (papers.failures / "attempt_000_rank_00003.json").write_text('{"kind": "err')  # cut off by the end of its host
    verdict = judge(job, papers, 0, 1)
    assert verdict.again and (verdict.kind, verdict.rank, verdict.step) == ("out_of_memory", 1, 7)
    assert len(failures(papers, 0)) == 3


@pytest.mark.parametrize("kind", ["bad_data", "non_finite", "out_of_memory", "error"])
def test_the_same_step_twice_is_given_up_another_step_is_not(job: Job, papers: Papers, kind: str) -> None:
    fail(papers, 0, 0, kind, 7, at=1, error="E: 17 of 0x7f")
    assert judge(job, papers, 0, 1).again
    fail(papers, 1, 1, kind, 8, at=2, error="E: 17 of 0x7f")
    assert judge(job, papers, 1, 1).again
    fail(papers, 2, 1, kind, 7, at=3, error="E: 18 of 0x8f")
    verdict = judge(job, papers, 2, 1)
    assert not verdict.again and "Attempt 0 failed so too" in verdict.why and verdict.code == 1


def test_another_error_at_the_same_step_is_tried_again(job: Job, papers: Papers) -> None:
    fail(papers, 0, 0, "error", 7, at=1, error="OSError: disk")
    fail(papers, 1, 0, "error", 7, at=2, error="KeyError: 'a'")
    assert judge(job, papers, 1, 1).again


def test_bad_input_is_given_up_at_once(job: Job, papers: Papers) -> None:
    fail(papers, 0, 0, "bad_input", 0, at=1)
    for verdict in (judge(job, papers, 0, 2), judge(job, papers, 1, 2)):  # recorded, and refused before it could be
        assert not verdict.again and verdict.code == 2 and verdict.kind == "bad_input"


def test_a_lost_process_is_tried_again_later_and_later_until_the_limit(job: Job, papers: Papers) -> None:
    fail(papers, 0, 0, "lost_peer", 7, at=1)
    exits_file(papers, 0).write_text(json.dumps({"first": 1, "exits": {"0": 1, "1": -9}}))
    verdict = judge(job, papers, 0, -9)
    assert verdict.again and verdict.kind == "lost" and verdict.why.startswith("rank 1 was killed by SIGKILL: by")
    assert "rank 0 lost its peer" in verdict.why
    assert "SIGKILL" in judge(job, papers, 5, 137, restarts=0).why  # as srun and shells tell it
    waits = [judge(job, papers, 5, -9, restarts=done).wait_s for done in range(3)]
    assert waits == [1.0, 2.0, 4.0]
    last = judge(job, papers, 5, -9, restarts=3)
    assert not last.again and last.why.endswith("No restart is left") and last.code == 1


def test_a_damaged_checkpoint_is_set_aside_and_kept(job: Job, papers: Papers, tmp_path: Path) -> None:
    bad, good = (tmp_path / "checkpoints" / f"step_0000000{n}" for n in (8, 4))
    for folder in (bad, good):
        folder.mkdir(parents=True)
    fail(papers, 0, 1, "bad_checkpoint", 0, at=1, folder=str(bad))
    for _ in range(2):  # asked again it says the same
        verdict = judge(job, papers, 0, 2, restarts=3)
        assert verdict.again and not verdict.counts and "kept as damaged_step_00000008" in verdict.why
        assert sorted(path.name for path in bad.parent.iterdir()) == ["damaged_step_00000008", "step_00000004"]
        bad.parent.joinpath("damaged_step_00000008").joinpath("x").touch()
    bad.mkdir()
    fail(papers, 1, 1, "bad_checkpoint", 0, at=1, folder=str(bad))
    assert "damaged_step_00000008_1" in judge(job, papers, 1, 2).why

    elsewhere = tmp_path / "other" / "checkpoints" / "step_00000001"
    elsewhere.mkdir(parents=True)
    fail(papers, 2, 0, "bad_checkpoint", 0, at=1, folder=str(elsewhere))
    verdict = judge(job, papers, 2, 2)
    assert not verdict.again and verdict.code == 2 and elsewhere.exists(), "another run's is not ours to rename"


# --- what ranks write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "training", "kind"),
    [
        (InputError("no such preset"), False, "bad_input"),
        (InputError("row 7 is damaged"), True, "bad_data"),
        (FloatingPointError("3 steps in a row"), True, "non_finite"),
        (MemoryError("out of memory on rank 0"), True, "out_of_memory"),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:22034"), True, "lost_peer"),
        (RuntimeError("ncclRemoteError: A call failed: remote process exited or there was a network error"), True,
         "lost_peer"),
        (RuntimeError("shape '[2, 3]' is invalid"), True, "error"),
    ],
)  # fmt: skip
def test_kinds_of_error(error: Exception, training: bool, kind: str) -> None:
    assert vital_signs.classify(error, training)[0] == kind


def test_a_damaged_checkpoint_is_found_behind_the_agreement_of_ranks(tmp_path: Path) -> None:
    try:
        try:
            raise DamagedCheckpoint(tmp_path, "file x is damaged")
        except InputError as inner:
            raise InputError("loading failed on rank 1") from inner
    except InputError as outer:
        assert vital_signs.classify(outer, False) == ("bad_checkpoint", {"folder": str(tmp_path)})


RANK = """
import os, sys, time
from pathlib import Path
sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
from perilune.pretrain import vital_signs
from perilune.pretrain.errors import InputError
def waits():  # as torch's would, by the name of its file
    time.sleep(float(os.environ.get("SLEEP", "60")))
def works():
    waits()
def all_reduce():
    waits()
code = compile("def all_reduce(wait): wait()", "/site/torch/distributed/distributed_c10d.py", "exec")
space = {}
exec(code, space)
with vital_signs.watched():
    for step in range(int(os.environ["STEPS"])):
        vital_signs.beat("step", step, 20)
        time.sleep(0.05)
    if os.environ["THEN"] == "raise":
        raise InputError("row 9 is damaged")
    space["all_reduce"](waits) if os.environ["THEN"] == "wait" else works()
"""


def rank(papers: Papers, number: int, then: str, steps: int = 30, attempt: int = 0) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PERILUNE_LAUNCH_DIR": str(papers.folder), "PERILUNE_HANG_S": "0.6", "RANK": str(number)}
    env |= {"PERILUNE_ATTEMPT": str(attempt), "THEN": then, "STEPS": str(steps)}
    return subprocess.Popen([sys.executable, "-c", RANK], env=env, stderr=subprocess.DEVNULL)


def hang_of(job: Job, papers: Papers, processes: list[subprocess.Popen[bytes]], stop: int | None = None) -> Any:
    watch = Watch(job, papers, 0)
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            if stop is not None and (papers.beats / f"rank_{stop:05d}.json").exists():
                processes[stop].send_signal(signal.SIGSTOP)
                stop = None
            if (hang := watch.check()) is not None:
                return hang
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    raise TimeoutError("no hang was found")


def test_the_rank_that_is_in_no_collective_is_blamed_and_the_others_collective_is_named(
    job: Job, papers: Papers
) -> None:
    found = hang_of(job, papers, [rank(papers, 0, "wait"), rank(papers, 1, "work")])
    assert found.ranks == (1,) and found.collective == "all_reduce" and found.silent_s > 0.6
    assert "it stood in waits (<string>:" in found.why and "rank 0 waits in all_reduce" in found.why


def test_of_several_collectives_sent_off_at_once_their_caller_is_named(papers: Papers) -> None:
    """As Megatron-core's DDP reduces its buckets."""
    papers.stacks.mkdir(parents=True, exist_ok=True)
    (papers.stacks / "rank_00000.txt").write_text(
        'Thread 0x01 (most recent call first):\n  File "/lib/python3.12/threading.py", line 9 in wait\n\n'
        "Current thread 0x02 (most recent call first):\n"
        '  File "/site/torch/distributed/distributed_c10d.py", line 8 in _coalescing_manager\n'
        '  File "/lib/python3.12/contextlib.py", line 144 in __exit__\n'
        '  File "/site/megatron/core/distributed/param_and_grad_buffer.py", line 7 in start_grad_sync\n'
    )
    found = read_stack(papers, 0)
    assert found and found.collective == "start_grad_sync"
    assert found.at == "start_grad_sync (param_and_grad_buffer.py:7)"


def test_a_hang_that_another_process_saw_is_judged_as_one(job: Job, papers: Papers) -> None:
    hang = Hang((1,), 4.0, 3, "step", "all_reduce", "no sign of life of rank 1")
    record_hang(papers, 0, hang)
    found = judge(job, papers, 0, 137)
    assert (found.again, found.kind, found.rank, found.step, found.why) == (True, "hang", 1, 3, hang.why)
    assert judge(job, papers, 0, 0).kind == "done" and judge(job, papers, 1, 137).kind == "lost"


def test_a_stopped_rank_is_blamed_though_it_writes_nothing(job: Job, papers: Papers) -> None:
    found = hang_of(job, papers, [rank(papers, 0, "wait"), rank(papers, 1, "wait", steps=100)], stop=1)
    assert found.ranks == (1,) and "it is stopped (SIGSTOP); rank 0 waits in all_reduce" in found.why
    assert read_stack(papers, 1) is None


def test_a_stopped_rank_is_blamed_though_others_were_silent_before_it(job: Job, papers: Papers) -> None:
    """It was stopped after its last sign; the one that waits for it gave its own some time before."""
    papers.stacks.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(signal.SIGSTOP)
        watch = Watch(job, papers, 0)
        sign = {"attempt": 0, "phase": "step", "begun": True, "host": socket.gethostname(), "pid": os.getpid()}

        def beat(rank: int, **more: Any) -> None:
            (papers.beats / f"rank_{rank:05d}.json").write_text(json.dumps(sign | more))

        beat(0, step=2)
        watch.check()
        time.sleep(0.5)
        beat(1, step=3, pid=process.pid)
        watch.check()
        (papers.stacks / "rank_00000.txt").write_text(
            'Thread 1:\n  File "/torch/distributed/x.py", line 1 in all_reduce\n'
        )
        time.sleep(0.2)  # rank 0 is late, rank 1 not yet
        found = watch.check()
    finally:
        process.kill()
        process.wait(10)
    assert found is not None and found.ranks == (1,) and "SIGSTOP" in found.why


def test_a_rank_that_never_begins_is_blamed(job: Job, papers: Papers) -> None:
    short = Job(("train",), job.run_dir, procs_per_node=2, hang_s=60, start_s=1.5)
    found = hang_of(short, papers, [rank(papers, 0, "wait", steps=1)])
    assert found.ranks == (1,) and "it never began" in found.why and found.phase == "starting"


def test_beats_of_an_earlier_attempt_are_not_taken_for_signs_of_this_one(job: Job, papers: Papers) -> None:
    process = rank(papers, 0, "raise", steps=3, attempt=0)
    assert process.wait(30) == 1
    (found,) = failures(papers, 0)
    assert (found.kind, found.rank, found.step) == ("bad_data", 0, 3) and "row 9" in found.error
    watch = Watch(Job(("train",), job.run_dir, hang_s=60, start_s=0.2), papers, attempt=1)
    assert watch.check() is None
    time.sleep(0.3)
    until = time.monotonic() + 10
    while (hang := watch.check()) is None and time.monotonic() < until:
        time.sleep(0.1)
    assert hang is not None and "never began" in hang.why


def test_without_a_launcher_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vital_signs, "_signs", None)
    for name in ("PERILUNE_LAUNCH_DIR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Preempted), vital_signs.watched():
        vital_signs.beat("step", 1, 2)
        raise Preempted("asked")
    assert list(tmp_path.iterdir()) == []


# --- attempt after attempt ----------------------------------------------------------------------------------------


class Shell:
    """An attempt: one process of a shell."""

    def __init__(self, words: str) -> None:
        self.process = subprocess.Popen(["sh", "-c", words])

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def supervised(job: Job, papers: Papers, words: list[str], there: list[int]) -> tuple[int, list[int], list[str]]:
    """(exit code, nodes of each attempt, what was said): attempt N runs words[N] on at most there[N] nodes."""
    used: list[int] = []
    said: list[str] = []

    def start(attempt: int, nodes: int) -> Shell:
        used.append(nodes)
        return Shell(words[attempt])

    available = lambda: there[min(len(used), len(there) - 1)]  # noqa: E731
    return supervise(job, papers, start, available=available, asked=lambda: 0, say=said.append), used, said


def test_after_the_loss_of_a_node_it_goes_on_with_those_that_the_layout_allows(tmp_path: Path) -> None:
    job = Job(("train",), tmp_path, nodes=4, min_nodes=1, procs_per_node=2, worlds=(2, 4, 8), start_s=60)
    code, used, said = supervised(job, Papers(tmp_path), ["kill -9 $$", "kill -9 $$", "exit 0"], [4, 3, 4])
    assert (code, used) == (0, [4, 2, 4]) and "Restart 2 of 3 in 2 s" in said[-1]
    found = [(event["event"], event.get("nodes")) for event in events(Papers(tmp_path))]
    assert found == [
        ("attempt", 4),
        ("restart", None),
        ("attempt", 2),
        ("restart", None),
        ("attempt", 4),
        ("done", None),
    ]


def test_too_few_nodes_are_waited_for_and_then_it_is_given_up(tmp_path: Path) -> None:
    job = Job(("train",), tmp_path, nodes=2, start_s=0.5)
    code, used, said = supervised(job, Papers(tmp_path), ["exit 0"], [1])
    assert (code, used) == (1, []) and said[-1] == "giving up: 1 nodes are there, and it needs 2"


def test_what_one_launch_left_does_not_judge_the_next(job: Job, papers: Papers) -> None:
    fail(papers, 0, 0, "error", 7, at=1)
    code, _, _ = supervised(job, papers, ["exit 0"], [1])
    assert code == 0 and failures(papers, 0) == []
