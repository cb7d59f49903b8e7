"""`perilune launch ray` on a real Ray cluster of two nodes, with tokens; and on the one it begins itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from launched_runs import STEPS, metrics, train
from ray_nodes import ENV, PERILUNE, TOKEN, Nodes

from perilune.launch import ray_driver, ray_jobs
from perilune.launch.job import Job, JobError, NoAnswer, Papers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.end()


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PERILUNE, *words],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=150)
    assert process.returncode == code, out
    return out


def once_at(run: Path, step: int, act: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (found := metrics(run)) and found[-1]["step"] >= step:
            act()
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached: {sorted(run.rglob('*.log'))}")


def beat(run: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Papers(run).beats / f"rank_{rank:05d}.json").read_text())
    return found


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which it takes connections."""
    try:
        links = process.net_connections("tcp")
        return {link.laddr.ip for link in links if link.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        return set()


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Papers(run).events.read_text().splitlines()]


def test_a_killed_rank_and_a_lost_node_and_the_losses_of_an_uninterrupted_run(
    cluster: Nodes, packed: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launched = start(["launch", "ray", "--address", cluster.address, "--nodes", "1-2", "--start-within", "60", "--",
                      *train(packed, "--run", str(run))])  # fmt: skip
    once_at(run, 4, lambda: os.kill(beat(run, 1)["pid"], signal.SIGKILL))

    def lose_node() -> None:
        assert {beat(run, rank)["attempt"] for rank in (0, 1)} == {1}
        cluster.tell("remove")

    deadline = time.monotonic() + 100
    while not any(event["event"] == "attempt" and event["attempt"] == 1 for event in events(run)):
        assert time.monotonic() < deadline, events(run)
        time.sleep(0.1)
    once_at(run, 7, lose_node)
    said = finish(launched)
    cluster.tell("add")

    seen = events(run)
    assert [(event["attempt"], event["nodes"]) for event in seen if event["event"] == "attempt"] == [
        (0, 2),
        (1, 2),
        (2, 1),
    ]
    assert [event["kind"] for event in seen if event["event"] == "restart"] == ["lost", "lost"], said
    ours = metrics(run)
    assert [entry["step"] for entry in ours] == list(range(1, STEPS + 1))
    # What two ranks computed is bitwise theirs; from the last attempt's checkpoint on it is one rank's.
    log = (Papers(run).logs / "rank_0.log").read_text()
    same = int(re.findall(rf"step (\d+) of {STEPS}, [\d,]+ of [\d,]+ tokens are done", log)[-1])
    assert same in (3, 6, 9) and ours[:same] == whole[:same]
    for mine, other in zip(ours[same:], whole[same:], strict=True):
        assert mine["tokens"] == other["tokens"] and mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert TOKEN not in "".join(file.read_text(errors="replace") for file in run.rglob("*") if file.is_file())


def test_asked_to_end_it_writes_a_checkpoint_and_the_job_says_so(cluster: Nodes, packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "launch",
        "ray",
        "--address",
        cluster.address,
        "--procs-per-node",
        "1",
        "--",
        *train(packed, "--run", str(run), steps=400),
    ]
    launched = start(words)
    once_at(run, 2, lambda: None)
    jobs = [PERILUNE, "jobs"]
    status = subprocess.run([*jobs, "status", str(run), "--json"], env=ENV, capture_output=True, text=True, timeout=60)
    assert json.loads(status.stdout)["state"] == "running", status
    subprocess.run([*jobs, "cancel", str(run)], env=ENV, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert "preempted" in finish(launched, 75)
    last = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{last:08d}"


def waits(answers: list[Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """`launch ray --wait` on a job, while its cluster answers so, the last for ever."""
    from ray.job_submission import JobStatus

    class Client:
        def get_job_status(self, number: str) -> JobStatus:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return JobStatus(answer)

        def get_job_logs(self, number: str) -> str:
            return ""

        def get_job_info(self, number: str) -> Any:
            return SimpleNamespace(driver_exit_code=75)

    monkeypatch.setattr(ray_jobs.time, "sleep", lambda seconds: None)
    return ray_jobs._stay(Client(), {"address": "http://head:8265", "job": "perilune_1"}, Papers(folder))


def test_a_cluster_that_is_silent_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away, busy = ConnectionError("refused"), RuntimeError("Request failed with status code 503: no GCS")
    assert waits(["RUNNING", away, busy, away, "RUNNING", "FAILED"], monkeypatch, tmp_path) == 75
    said = capsys.readouterr().err
    assert said.count("http://head:8265 does not answer since") == said.count("answers again") == 1, said
    assert "it was running" in said

    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.05)
    with pytest.raises(NoAnswer, match=r"perilune_1 is known: at .* it was running.*perilune jobs status") as silent:
        waits(["RUNNING", away], monkeypatch, tmp_path)
    assert str(tmp_path) in str(silent.value)
    with pytest.raises(JobError, match=r"perilune_1 does not exist.*perilune jobs status") as gone:
        waits(["RUNNING", RuntimeError("Job perilune_1 does not exist")], monkeypatch, tmp_path)
    assert not isinstance(gone.value, NoAnswer)


def test_a_request_without_the_token_is_refused(cluster: Nodes, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=20)
    assert refused.value.code in (401, 403)
    words = ["launch", "ray", "--address", cluster.address, "--", *train(packed, "--run", str(tmp_path / "run"))]
    env = {key: value for key, value in ENV.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run([PERILUNE, *words], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "RAY_AUTH_TOKEN" in done.stderr, done
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cluster_that_asks_for_no_token_is_refused_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of such a server is one request, which Python's own answers here as it would."""
    from http.server import HTTPServer, SimpleHTTPRequestHandler
    from threading import Thread

    class Open(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Open) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with monkeypatch.context() as patch, pytest.raises(JobError, match="--insecure"):
            patch.setattr(ray_jobs, "_loopback", lambda host: False)
            ray_jobs._client(f"http://127.0.0.1:{server.server_port}", insecure=False)
        server.shutdown()
    assert not ray_jobs._loopback("192.0.2.1") and ray_jobs._loopback("localhost")


def test_a_cluster_of_its_own_trains_ends_and_is_gone(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = start(["launch", "ray", "--procs-per-node", "2", "--", *train(packed, "--run", str(run), steps=2)])
    processes: list[psutil.Process] = []
    heard: set[str] = set()

    def look() -> None:
        processes.extend(psutil.Process(launched.pid).children(recursive=True))
        heard.update(address for process in processes for address in listening(process))

    once_at(run, 1, look)
    assert "done" in finish(launched)
    assert len(processes) > 5  # the driver, Ray's, and the ranks
    assert heard and heard <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, heard
    _, left = psutil.wait_procs(processes, timeout=15)
    assert not left
    assert [entry["step"] for entry in metrics(run)] == [1, 2]


def test_a_second_cancel_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "state", lambda where: "running")
    papers, where = Papers(tmp_path), {"launcher": "ray", "run_dir": str(tmp_path)}
    papers.folder.mkdir()
    asked = []
    for _ in range(2):
        ray_jobs.cancel(where, now=False)
        asked.append(int(ray_driver.stop_file(papers).read_text()))
    assert asked == [1, 2]


HERE = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run in the background
from perilune.launch import ray_jobs
from perilune.launch.job import Job, Papers
driver = '''
import sys, time
from pathlib import Path
while not Path(sys.argv[1], "launch", "stop").exists():
    time.sleep(0.02)
sys.exit(75)
'''
job = Job(("train",), Path(sys.argv[1]))
ray_jobs.entrypoint = lambda job: [sys.executable, "-c", driver, sys.argv[1]]
sys.exit(ray_jobs._run_here(job, Papers(job.run_dir)))
"""


def test_a_terminal_that_is_closed_asks_for_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", HERE, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not psutil.Process(process.pid).children() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
    finally:
        process.kill()


def attempt_that_fails(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`RayAttempt` number 2 on a cluster where starting its node's processes raises `error`."""
    import ray

    from perilune.launch import ray_ranks

    class Fails:
        def ready(self) -> None: ...

        def options(self, **more: object) -> None:
            raise error

    monkeypatch.setattr(ray_ranks, "placement_group", lambda bundles, strategy: Fails())
    monkeypatch.setattr(ray_ranks, "remove_placement_group", lambda group: (folder / "released").touch())
    monkeypatch.setattr(ray, "get", lambda ref, timeout: None)
    monkeypatch.setattr(ray, "remote", lambda kind: Fails())
    job = Job(("train",), folder / "run", folder=folder)
    try:
        return ray_ranks.RayAttempt(job, Papers(job.run_dir), 2, 1)
    finally:
        assert (folder / "released").exists()


def test_a_node_that_is_lost_at_the_start_is_an_attempt_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    attempt = attempt_that_fails(ray.exceptions.ActorDiedError(), tmp_path, monkeypatch)
    assert attempt.poll() == -signal.SIGKILL
    assert "perilune: attempt 2 has not begun: ActorDiedError: " in capsys.readouterr().err


def test_what_a_node_lacks_is_told_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    lacks = ray.exceptions.RayTaskError("start", "its stack", FileNotFoundError(2, "No such file", str(tmp_path)))
    with pytest.raises(JobError, match=f"FileNotFoundError: .*{tmp_path}.*; every node needs the folder {tmp_path}"):
        attempt_that_fails(lacks.as_instanceof_cause(), tmp_path, monkeypatch)


def test_a_cluster_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray raises a bare Exception on a machine that is too busy for it."""
    import ray

    def init(**more: object) -> None:
        raise Exception("The current node timed out during startup.")

    papers = Papers(tmp_path)
    papers.write(Job(("train",), tmp_path, folder=tmp_path), {"launcher": "ray"})
    monkeypatch.setattr(ray, "init", init)
    for name in ray_driver.own_cluster({}):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert ray_driver.main([str(tmp_path), "--here"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert said.startswith("perilune: giving up: Ray did not start on this machine: The current node timed out")
    assert said.count("\n") == 1 and [event["event"] for event in events(tmp_path)] == ["gave_up"]


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        ("ray_own.txt", ["--procs-per-node", "2"]),
        ("ray_cluster.txt", ["--address", "http://head:8265", "--nodes", "2-4", "--gpus-per-node", "8",
                             "--env", "NCCL_IB_HCA=mlx5", "--restarts", "10"]),
    ],
)  # fmt: skip
def test_dry_run_is_what_the_golden_file_says(golden: str, words: list[str]) -> None:
    command = [PERILUNE, "launch", "ray", *words, "--dry-run", "--", "train", "tiny", "data.path=/data/packed",
               "train.steps=4", "valid.every=0", "train.global_batch_size=96", "--run", "/runs/a"]  # fmt: skip
    done = subprocess.run(command, env=ENV, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout
    shown = done.stdout.replace(sys.executable, "PYTHON")
    assert shown == (Path(__file__).parent / "golden" / golden).read_text()


def test_the_token_of_an_own_cluster_is_new_or_the_users() -> None:
    one, two = ray_driver.own_cluster({}), ray_driver.own_cluster({})
    assert len(one["RAY_AUTH_TOKEN"]) == 64 and one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]
    assert ray_driver.own_cluster({"RAY_AUTH_TOKEN": "mine"})["RAY_AUTH_TOKEN"] == "mine"


def test_what_ray_shows_of_a_job_holds_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    job = Job(("train", "tiny"), Path("/runs/a"), folder=Path("/"), env={"A": "1"})
    assert TOKEN not in json.dumps(ray_jobs._submission(job))
    assert ray_jobs.runtime_env(job)["env_vars"]["A"] == "1"
