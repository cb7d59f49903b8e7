"""Runs on this machine, killed, stopped and broken: what comes back, what is given up, and that nothing is left.

Training is the real one. Where only processes matter, the ranks are a few lines of Python, which start at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from launched_runs import STEPS, metrics, train

from perilune.launch import launchers, local
from perilune.launch.job import Job, JobError, Papers
from perilune.launch.judge import events, note
from perilune.launch.launchers import claimed

COMMAND = str(Path(sys.executable).with_name("perilune"))


@contextmanager
def started(*words: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, as a terminal's foreground job is; ended with the body."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        **more,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def finish(process: subprocess.Popen[str], code: int, timeout: float = 180) -> str:
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out
    return out


def until(what: Callable[[], Any], limit_s: float = 120) -> Any:
    """The first true value of `what()`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"not within {limit_s} s")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ranks(launcher: int, count: int = 2) -> list[int]:
    """Process ids by rank, once all are there."""
    found = [pid for agent in children(launcher) for pid in children(agent)]
    return found if len(found) == count else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def at_step(run: Path, step: int, attempt: int) -> bool:
    """Whether attempt number `attempt` has recorded `step`."""
    beat = run / "launch" / "beats" / "rank_00000.json"
    if not beat.exists() or json.loads(beat.read_text())["attempt"] != attempt:
        return False
    entries = metrics(run)
    return bool(entries) and entries[-1]["step"] >= step


# --- training -----------------------------------------------------------------------------------------------------


def test_a_run_with_a_stopped_rank_a_killed_rank_and_a_damaged_checkpoint_equals_one_without(
    packed: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["launch", "local", "--nproc", "2", "--hang-after", "3", "--", *train(packed, save_every=2)]
    words += ["--run", str(run)]
    with started(COMMAND, *words) as process:
        until(lambda: at_step(run, 3, 0))
        stopped = until(lambda: ranks(process.pid))
        _only_loopback([*children(process.pid), *stopped])
        os.kill(stopped[1], signal.SIGSTOP)
        began = time.monotonic()
        until(lambda: at_step(run, 5, 1))
        recovered = time.monotonic() - began
        assert not any(map(alive, stopped)), "a stopped rank survived"
        killed = until(lambda: ranks(process.pid))
        os.kill(killed[0], signal.SIGKILL)
        until(lambda: not any(map(alive, killed)))
        newest = sorted((run / "checkpoints").glob("step_*"))[-1]
        _flip_a_bit(max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size))
        said = finish(process, 0)
    assert recovered < 90, "hang of 3 s, start of about 10 s"
    assert metrics(run) == whole

    restarts = [event for event in events(Papers(run)) if event["event"] == "restart"]
    assert [event["kind"] for event in restarts] == ["hang", "lost", "bad_checkpoint"]
    pattern = rf"no sign of life of rank 1 \(\S+, pid {stopped[1]}\) for \d+ s, in phase 'step' after step \d+: "
    pattern += r"it is stopped \(SIGSTOP\); rank 0 waits in \w+, \w+ \(\w+\.py:\d+\)"
    assert restarts[0]["rank"] == 1 and re.fullmatch(pattern, restarts[0]["why"]), restarts[0]["why"]
    assert "rank 0 was killed by SIGKILL" in restarts[1]["why"]
    assert newest.with_name(f"damaged_{newest.name}").is_dir() and f"damaged_{newest.name}" in restarts[2]["why"]
    assert [event["restarts"] for event in restarts] == [1, 2, 2], "a damaged checkpoint counts for no restart"
    assert "perilune: rank 0 was killed by SIGKILL; its log: " in said and "done: " in said
    _check_status(run)


def _flip_a_bit(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def _check_status(run: Path) -> None:
    """`perilune jobs`, after the end."""

    def jobs(*words: str, code: int = 0) -> str:
        with started(COMMAND, "jobs", *words) as process:
            return finish(process, code)

    found = json.loads(jobs("status", str(run), "--json"))
    assert (found["launcher"], found["state"], found["step"], found["steps"]) == ("local", "ended", STEPS, STEPS)
    assert (found["attempt"], found["restarts"], found["last_event"]["event"]) == (3, 3, "done")
    assert [rank["phase"] for rank in found["ranks"]] == ["done", "done"]
    table = jobs("status", str(run))
    assert f"{STEPS} of {STEPS}" in table and "last sign" in table
    assert "==> " in jobs("logs", str(run)) and "rank_1.log" in jobs("logs", str(run))
    assert "nothing to cancel" in jobs("cancel", str(run), code=2)


def test_a_step_that_fails_the_same_way_twice_is_given_up(packed: Path, tmp_path: Path) -> None:
    """A weight of the loss so large that every gradient overflows."""
    keys = ["tiny", f"data.path={packed}", "train.steps=3", "schedule.mtp_weight=1e39", "train.nonfinite_limit=1"]
    keys += ["train.global_batch_size=1"]
    words = ["launch", "local", "--nproc", "1", "--", "train", *keys, "--run", str(tmp_path / "run")]
    with started(COMMAND, *words) as process:
        said = finish(process, 1)
    assert "step 1: non finite: FloatingPointError: 1 steps in a row" in said
    assert "Attempt 0 failed so too: the run diverges there" in said
    found = [event["event"] for event in events(Papers(tmp_path / "run"))]
    assert found == ["attempt", "restart", "attempt", "gave_up"]


def test_bad_input_is_one_line_and_no_restart(packed: Path, tmp_path: Path) -> None:
    words = ["launch", "local", "--nproc", "2", "--", "train", "tiny", f"data.path={packed}", "parallel.tp=3"]
    with started(COMMAND, *words, "--run", str(tmp_path / "run")) as process:
        said = finish(process, 2)
    assert said.startswith("perilune: error: ") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_json_is_all_that_stdout_holds(packed: Path, tmp_path: Path) -> None:
    keys = ["train", "tiny", f"data.path={packed}", "valid.every=0", "train.steps=1", "train.global_batch_size=1"]
    words = [COMMAND, "launch", "local", "--json", "--", *keys, "--run", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(done.stdout)
    assert found["code"] == 0 and found["where"]["launcher"] == "local" and found["job"]["arguments"][:2] == keys[:2]
    assert "step 1/1" in done.stderr and "done: " in done.stderr


def test_a_plot_is_refused_as_it_would_not_be_drawn(tmp_path: Path) -> None:
    words = ["launch", "local", "--", "train", "tiny", "--plot", str(tmp_path / "a.png")]
    with started(COMMAND, *words) as process:
        assert "it goes with `perilune train --dry-run`" in finish(process, 2, 60)


def test_dry_run_prints_what_would_run(packed: Path, tmp_path: Path) -> None:
    words = ["launch", "local", "--nproc", "2", "--threads", "3", "--env", "NCCL_DEBUG=INFO", "--dry-run", "--"]
    words += ["train", "tiny", f"data.path={packed}", "parallel.ep=2", "--run", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "GLOO_SOCKET_IFNAME")}
    with started(COMMAND, *words, cwd=tmp_path, env=env | {"WANDB_API_KEY": "canary"}) as process:
        said = finish(process, 0)
    for path, name in ((packed, "DATA"), (tmp_path, "HERE"), (Path(sys.executable), "PYTHON")):
        said = said.replace(str(path), name)
    golden = Path(__file__).parent / "golden" / "local.txt"
    assert said == golden.read_text()
    assert list(tmp_path.iterdir()) == []


# --- processes ----------------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
from pathlib import Path
here, rank, attempt = Path(os.environ["HERE"]), os.environ["RANK"], os.environ["PERILUNE_ATTEMPT"]
def stop(number, frame):
    time.sleep(1.0)  # a checkpoint takes longer than a poll
    (here / f"saved_{rank}").write_text(attempt)
    sys.exit(75)
if MODE not in ("deaf", "other follows"):
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"up_{attempt}_{rank}").write_text(str(os.getpid()))
print("rank", rank, "of", os.environ["WORLD_SIZE"], "with $HOME ${local_rank}", flush=True)
if MODE in ("first fails", "other follows") and attempt == "0" and rank == "1":
    while not (here / "up_0_0").exists():  # it could not be asked to end before
        time.sleep(0.02)
    sys.exit(7)
if MODE == "other follows":  # as one does whose peer is gone
    peer = here / "up_0_1"
    while not peer.exists() or not peer.read_text() or Path("/proc", peer.read_text()).exists():
        time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(1)
while not (here / "end").exists():
    time.sleep(0.02)
"""
LAUNCH = "import sys; from perilune.launch import local, job; sys.exit(local.run(job.Job.from_json(sys.argv[1])))"


@contextmanager
def launched(folder: Path, mode: str, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    program = (sys.executable, "-S", "-c", f"MODE = {mode!r}" + RANK)
    job = Job(("$HOME",), folder, procs_per_node=2, restarts=restarts, program=program, env={"HERE": str(folder)})
    with started(sys.executable, "-c", LAUNCH, job.to_json()) as process:
        yield process


def up(folder: Path, attempt: int = 0) -> list[int]:
    """Process ids of both ranks, once they are up."""
    files = [folder / f"up_{attempt}_{rank}" for rank in (0, 1)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_a_killed_launcher_takes_its_agent_and_ranks_along(tmp_path: Path) -> None:
    with launched(tmp_path, "deaf") as process:
        pids = [*up(tmp_path), *children(process.pid)]
        assert len(pids) == 3
        process.kill()
        until(lambda: not any(map(alive, pids)), 10)


def _only_loopback(pids: list[int]) -> None:
    """Whatever these processes listen on is 127.0.0.1 or ::1."""
    inodes = {
        match[1]
        for pid in pids
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink() and (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)))
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                listening.append(words[1].rpartition(":")[0])
    assert listening and set(listening) <= {"0100007F", "00000000000000000000000001000000"}, listening


def test_a_killed_agent_takes_its_ranks_along_and_is_started_again(tmp_path: Path) -> None:
    with launched(tmp_path, "", restarts=1) as process:
        pids = up(tmp_path)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        second = up(tmp_path, 1)
        assert not any(map(alive, pids))
        (tmp_path / "end").touch()
        said = finish(process, 0, 30)
    assert not any(map(alive, second))
    assert said.count("rank 0 of 2 with $HOME ${local_rank}\n") == 2 and "rank 1" not in said
    assert "rank 1 of 2" in (tmp_path / "logs" / "rank_1.log").read_text()
    assert "the ranks' agent was killed by SIGKILL" in said and "Restart 1 of 1 in 1 s" in said


def test_exit_code_is_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    with launched(tmp_path, "first fails") as process:
        said = finish(process, 7, 60)
    assert "perilune: rank 1 ended with exit code 7; its log: " in said
    assert (tmp_path / "saved_0").exists(), "the other was asked to end"


def test_a_rank_that_fails_for_another_within_the_second_is_not_named(tmp_path: Path) -> None:
    with launched(tmp_path, "other follows") as process:
        said = finish(process, 7, 60)
    assert "perilune: rank 1 ended with exit code 7; its log: " in said
    exits = json.loads(next((tmp_path / "launch" / "failures").glob("attempt_000_exits.json")).read_text())
    assert exits == {"first": 1, "exits": {"1": 7, "0": 1}}


FULL = """
import os, sys, time
from pathlib import Path
launch = Path(os.environ["PERILUNE_LAUNCH_DIR"])
attempt = int(os.environ["PERILUNE_ATTEMPT"])
if os.environ["RANK"] == "0":
    if attempt == 0:
        (launch / "events.jsonl").unlink()
    for name in ("events.jsonl", f"failures/attempt_{attempt:03d}_exits.json"):
        (launch / name).mkdir(exist_ok=True)
else:
    time.sleep(0.5)
    sys.exit(1 if attempt == 0 else 75)
"""


def test_a_disk_that_takes_nothing_does_not_end_the_supervision(tmp_path: Path) -> None:
    """Nothing is written from the first attempt on: it is said instead; restart and exit code are as ever."""
    program = (sys.executable, "-S", "-c", FULL)
    job = Job((), tmp_path, procs_per_node=2, restarts=1, program=program)
    with started(sys.executable, "-c", LAUNCH, job.to_json()) as process:
        said = finish(process, 75)
    assert "events.jsonl cannot be written (Is a directory): {" in said and '"event": "restart"' in said
    assert "Restart 1 of 1 in 1 s" in said and "Traceback" not in said


def test_sigterm_is_passed_on_once_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    with launched(tmp_path, "") as process:
        up(tmp_path)
        slurm = ["launch", "slurm", "--", "train", "tiny", "data.path=nowhere", "valid.every=0", "--run", str(tmp_path)]
        with started(COMMAND, *slurm) as other:  # whichever launcher
            assert "is being trained already" in finish(other, 2, 30)
        with launched(tmp_path, "") as other:
            assert f"is being trained already, by process {process.pid}" in finish(other, 1, 30)
        process.terminate()
        said = finish(process, 75, 30)
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()
    assert "stopping after a checkpoint" in said


def test_a_second_run_that_is_refused_leaves_the_first_ones_configuration(packed: Path, tmp_path: Path) -> None:
    """Written over, the first run could go on with the second one's keys alone."""
    with launched(tmp_path, "") as process:
        up(tmp_path)
        (tmp_path / "config.yaml").write_text("the first run's\n")
        keys = ["train", "tiny", f"data.path={packed}", "valid.every=0", "optim.lr=9e-3", "--run", str(tmp_path)]
        for words in (keys, ["launch", "local", "--", *keys], ["launch", "ray", "--", *keys]):
            with started(COMMAND, *words) as other:
                assert "is being trained already" in finish(other, 2, 30)
            assert (tmp_path / "config.yaml").read_text() == "the first run's\n", words
        process.terminate()
        finish(process, 75, 30)


def test_of_two_launches_in_one_instant_one_is_refused_and_writes_nothing(packed: Path, tmp_path: Path) -> None:
    """The other has not recorded itself yet, so that only its lock tells of it."""
    keys = ["train", "tiny", f"data.path={packed}", "valid.every=0", "optim.lr=9e-3", "--run", str(tmp_path)]
    with claimed(Papers(tmp_path)):
        for words in (keys, ["launch", "ray", "--", *keys]):
            with started(COMMAND, *words) as other:
                said = finish(other, 2, 60)
            assert f"is being launched already, by process {os.getpid()} on {socket.gethostname()}" in said, words
    assert [file.name for file in tmp_path.rglob("*")] == ["launch", "lock"]


def test_a_run_that_lives_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file system: while it holds its folder it runs; where locks do not reach, its heartbeats tell."""
    papers = Papers(tmp_path)
    job = Job(("train",), tmp_path, folder=tmp_path)
    where = local.where(job) | {"host": "elsewhere"}
    papers.write(job, where)
    with (papers.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert local.state(where) == "running on elsewhere"
        with pytest.raises(JobError, match=r"trained already, by process \d+ \(running on elsewhere\)"):
            launchers.refuse_second(papers)
    assert local.state(where) == "on elsewhere, which cannot be asked from here"

    papers.beats.mkdir()
    beat = papers.beats / "rank_00000.json"
    beat.write_text("1")
    monkeypatch.setattr(launchers, "_LOOK_S", 0.5)
    timer = Timer(0.2, lambda: beat.write_text("2"))
    timer.start()
    said = r"on elsewhere .*, which cannot be asked from here, and its ranks give signs"
    with pytest.raises(JobError, match=said), claimed(papers):
        pass
    timer.join()
    with claimed(papers):  # silent: with a word
        pass
    note(papers, "stopped")
    monkeypatch.setattr(launchers, "_LOOK_S", 60.0)  # it has said that it ended: nothing to wait for
    with claimed(papers):
        pass


def test_ctrl_c_ends_with_a_checkpoint_and_twice_at_once(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    with launched(once, "") as process:
        up(once)
        os.killpg(process.pid, signal.SIGINT)
        finish(process, 75, 30)
        assert (once / "saved_0").exists() and (once / "saved_1").exists()
    with launched(twice, "deaf") as process:
        pids = up(twice)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None and all(map(alive, pids))
        os.killpg(process.pid, signal.SIGINT)
        finish(process, 1, 30)
        assert not any(map(alive, pids))


def test_cancel_reaches_the_launcher_alone(tmp_path: Path) -> None:
    with launched(tmp_path, "") as process:
        up(tmp_path)
        _, where = Papers(tmp_path).read()
        assert local.state(where) == "running"
        reused = where | {"started": str(int(where["started"]) + 1)}
        with pytest.raises(JobError, match="nothing to cancel"):
            local.cancel(reused, now=True)
        local.cancel(where, now=False)
        finish(process, 75, 30)
    assert local.state(where) == "ended"
    assert "cannot be asked from here" in local.state(where | {"host": "elsewhere"})
