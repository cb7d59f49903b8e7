"""Slurm: what is written, by golden files and with hostile values; what happens, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import slurm_cluster
from click.testing import CliRunner
from launched_runs import STEPS, metrics, train

from perilune.launch import slurm as slurm_jobs
from perilune.launch import slurm_script
from perilune.launch.job import Job, JobError, NoAnswer, Papers
from perilune.launch.launchers import refuse_second
from perilune.launch.slurm_script import Placement, Site
from perilune.pretrain import launch_cli

GOLDEN = Path(__file__).with_name("golden")
SITE = """\
env:
  NCCL_SOCKET_IFNAME: ib0
  NCCL_IB_HCA: mlx5_0,mlx5_1
sbatch:
  constraint: h100
  exclusive: true
srun:
  mpi: pmix
setup:
  - module load cuda/13.0
"""
CASES = {
    "small": (["--threads", "4", "--time", "01:00:00"], {}),
    "large": (
        ["--nodes", "6-8", "--gpus-per-node", "8", "--time", "1-00:00:00", "--partition", "gpu",
         "--exclude", "node[3,7]", "--image", "/images/perilune.sif", "--mount", "/data:/data:ro",
         "--site", "site.yaml", "--per", "node"],
        {"site.yaml": SITE},
    ),
    "sweep": (["--sweep", "optim.lr=1e-3,2e-3", "--sweep", "train.seed=1,2", "--gpus-per-node", "2",
               "--image", "registry/perilune:1"], {}),
    "chain": (["--chain", "3", "--time", "12:00:00", "--account", "moon"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_is_the_script_and_the_commands(name: str, perilune: Any, tmp_path: Path) -> None:
    """To write the golden files anew: PERILUNE_GOLDEN=write."""
    options, files = CASES[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    layout = ["parallel.ep=8", "train.global_batch_size=1536"] if name == "large" else []
    words = ["train", "tiny", "data.path=/data/packed", "valid.every=0", *layout, "--run", "/shared/runs/a"]
    done = perilune("launch", "slurm", *options, "--dry-run", "--", *words, PERILUNE_TEST_TOKEN="canary-7f3a")
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace(sys.executable, "PYTHON").replace(str(tmp_path), "/home/me")
    assert "canary-7f3a" not in said
    golden = GOLDEN / f"slurm_{name}.txt"
    if os.environ.get("PERILUNE_GOLDEN") == "write":
        golden.write_text(said)
    assert said == golden.read_text()
    script = tmp_path / "job.sh"
    script.write_text(said.split("\n", 1)[1])
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60, check=False)
        assert checked.returncode == 0, checked.stdout


HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a b'c\"d",
    "*",
    "; touch pwned #",
    "-n",
    "\\",
    "!x",
    "~",
    "${#hosts}",
    "{# #}",
]


def test_hostile_values_arrive_as_they_are(tmp_path: Path) -> None:
    run = tmp_path / "a b $(touch pwned)"
    job = Job(tuple(HOSTILE), run, folder=tmp_path, env={"V": HOSTILE[2] + "$(touch pwned)"},
              program=("printf", "%s\\n"))  # fmt: skip
    site = Site("a\nb; touch pwned", env={"W": "; touch pwned"})
    text = slurm_script.script(job, Placement(site=site), tmp_path / "job.sh")
    head = text[: text.index("# --- which nodes")]
    head += '"${command[@]}"; printf "%s\\n" "$V" "$W" "$run"\n'
    done = subprocess.run(
        ["bash", "-c", head], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False,
        env={"PATH": os.environ["PATH"], "SLURM_CPUS_ON_NODE": "2"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [*HOSTILE, job.env["V"], "; touch pwned", str(job.run_dir)], done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enviroment: {A: b}", "did you mean 'env'"),
        ("setup: ['export HF_TOKEN=abc']", "setup sets HF_TOKEN"),
        ("env: {HF_TOKEN: abc}", "HF_TOKEN is named like a secret"),
        ("env: {PROXY: 'http://me:pw@proxy'}", "carries a credential"),
        ("env: {'A B': c}", "is no name of a variable"),
        ("sbatch: {constraint: \"a\\nb\"}", "more than one line"),
        ("- a", "not a list"),
        ("env: [a]", "a mapping"),
        ("a: [", "no YAML"),
    ],
)  # fmt: skip
def test_a_site_that_cannot_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(JobError, match=message):
        Site.read(tmp_path / "site.yaml")


def test_a_sweep_over_layouts_goes_on_with_as_many_nodes_as_all_of_them_fit() -> None:
    """The command alone would fit 3 nodes too, and not one of the runs would be it."""
    train = ["train", "tiny", "valid.every=0", "model.num_layers=4", "data.path=/data/packed",
             "train.global_batch_size=96", "--run", "/shared/runs/a"]  # fmt: skip
    words = ["--nodes", "1-4", "--dry-run", "--json", "--sweep", "parallel.pp=2,4", "--", *train]
    done = CliRunner().invoke(launch_cli.launch, ["slurm", *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["job"]["worlds"] == [4]


def test_a_sweep_over_data_speaks_of_each_data_once() -> None:
    train = ["train", "tiny", "valid.every=0", "--run", "/shared/runs/a"]
    sweep = ["--sweep", "data.path=/data/a,/data/b", "--sweep", "optim.lr=1e-3,2e-3"]
    done = CliRunner().invoke(launch_cli.launch, ["slurm", "--dry-run", *sweep, "--", *train])
    assert done.exit_code == 0, done.output
    assert [line for line in done.stderr.splitlines() if "/data/" in line or "no data" in line] == [
        f"perilune: /data/{name}: not seen from here; every node must see it there" for name in "ab"
    ]


def test_sweeps_and_times_that_cannot_be_are_refused() -> None:
    assert slurm_script.seconds("1-02:03:04") == 93784 and slurm_script.seconds(None) == 0
    assert slurm_script.parse_sweep(("a=[1,2],3",)) == (("a", ("[1,2]", "3")),)
    assert slurm_script.parse_sweep(("a=[[1,2],[3]],{b: [4,5], c: {}},6",)) == (
        ("a", ("[[1,2],[3]]", "{b: [4,5], c: {}}", "6")),
    )
    for bad in ("a", "=1", "a=", "a=1,1", "a=[1,2", "a=1],2", "a=[1,{2],3}", "a=1,"):
        with pytest.raises(JobError, match="--sweep"):
            slurm_script.parse_sweep((bad,))
    for bad in ("12", "1:00", "00:61:00"):
        with pytest.raises(JobError, match="--time"):
            slurm_script.seconds(bad)
    job = Job(("train",), Path("/runs/a"), folder=Path("/"), time_s=120)
    for wrong, message in (
        ({"mounts": ("/data",)}, "SOURCE:TARGET"),
        ({"image": "docker://u:pw@host/a"}, "credential"),
        ({"env": {"WORLD_SIZE": "7"}}, "leave it out"),
        ({"hang_s": float("nan")}, "of seconds"),
    ):
        with pytest.raises(JobError, match=message):
            Job(("train",), Path("/runs/a"), folder=Path("/"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="as soon as it begins"):
        slurm_script.script(job, Placement(signal_before=120), Path("/job.sh"))
    with pytest.raises(JobError, match="have one folder"):
        slurm_script.tasks_of((("a", ("x/y", "x*y")),))


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("sacct: error: Problem talking to the database: Connection refused", "unknown: sacct: sacct: error: Problem"),
        ("sacct: error: slurm_receive_msg: Socket timed out on send/recv operation", "unknown: sacct: "),
        ("Slurm accounting storage is disabled", "not submitted"),
    ],
)
def test_accounting_that_does_not_answer_is_no_accounting_that_is_not_there(
    said: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a submission whose answer was lost, and which squeue does not know any more."""
    for name, line in (("squeue", "exit 0"), ("sacct", f"echo '{said}' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_jobs, "_ON_ITS_WAY_S", 0.0)
    where = {"launcher": "slurm", "jobs": [], "mark": "perilune_0123456789abcdef"}
    assert slurm_jobs.state(where).startswith(state)
    papers = Papers(tmp_path / "run")
    papers.write(Job(("train",), tmp_path / "run", folder=tmp_path), where)
    if state.startswith("unknown"):
        with pytest.raises(NoAnswer, match="may be under way: sacct"):
            refuse_second(papers)
    else:
        refuse_second(papers)


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CONFIGURING", "running (configuring)"),  # its nodes start up, in a cloud for minutes
        ("SUSPENDED", "running (suspended)"),
        ("STAGE_OUT", "running (stage_out)"),
        ("REQUEUE_HOLD", "pending (why)"),
        ("PREEMPTED", "preempted"),
    ],
)
def test_a_job_that_neither_runs_nor_waits_is_under_way(
    word: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, line in (("squeue", f"echo '7|{word}|why'"), ("sacct", f"echo '{word}|0:0'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    where = {"launcher": "slurm", "jobs": ["7"]}
    assert slurm_jobs.state(where) == state
    papers = Papers(tmp_path / "run")
    papers.write(Job(("train",), tmp_path / "run", folder=tmp_path), where)
    if state == "preempted":
        refuse_second(papers)
    else:
        with pytest.raises(JobError, match="is being trained already, by slurm's job 7"):
            refuse_second(papers)


# --- a real one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def perilune_on(slurm: slurm_cluster.Cluster, *words: str) -> str:
    command = [str(Path(sys.executable).with_name("perilune")), *words]
    done = subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(slurm: slurm_cluster.Cluster, run: Path, *words: str) -> list[str]:
    """The job numbers."""
    site = run.parent / "site.yaml"
    site.write_text("env: {GLOO_SOCKET_IFNAME: lo}\n")
    said = perilune_on(
        slurm, "launch", "slurm", "--site", str(site), "--threads", "1", "--json", *words, "--run", str(run)
    )
    numbers: list[str] = json.loads(said)["jobs"]
    return numbers


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "launch" / "events.jsonl").read_text().splitlines()]


def reaches(run: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(events(run))


@pytest.mark.timeout(400)
def test_two_nodes_requeued_and_a_node_lost_equal_an_uninterrupted_run(
    slurm: slurm_cluster.Cluster, packed: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = 2 * STEPS  # so that it has not ended when a node is lost
    (job,) = launch(slurm, run, "--nodes", "2", "--", *train(packed, steps=steps))
    reaches(run, 2)
    slurm("scancel", "--batch", "--signal=USR1", job)  # what --signal sends before the time limit
    time.sleep(0.3)
    slurm("scancel", "--batch", "--signal=TERM", job)  # what comes at the limit itself, if the checkpoint takes so long
    slurm.until(job, "PENDING", "REQUEUED")
    assert len(list((run / "checkpoints").glob("step_*"))) >= 1
    slurm.until(job, "RUNNING")
    reaches(run, 7)
    slurm("scontrol", "update", f"nodename={slurm_cluster.NODES[1]}", "state=down", "reason=test")
    slurm.until(job, "PENDING", "REQUEUED")
    assert slurm.until(job, timeout=150) == "COMPLETED"
    last = {entry["step"]: entry for entry in metrics(run)}
    assert [last[step] for step in sorted(last)][:STEPS] == whole
    found = json.loads(perilune_on(slurm, "jobs", "status", "--json", str(run)))
    assert (found["state"], found["attempt"], found["restarts"], found["step"]) == ("done", 2, 0, steps)


@pytest.mark.timeout(300)
def test_a_stopped_rank_is_noticed_and_cancel_ends_with_a_checkpoint(
    slurm: slurm_cluster.Cluster, packed: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = train(packed, steps=1000)  # one that has ended cannot be cancelled
    (job,) = launch(slurm, run, "--procs-per-node", "2", "--per", "node", "--hang-after", "4", "--", *endless)
    reaches(run, 4)
    stopped = json.loads((run / "launch" / "beats" / "rank_00001.json").read_text())["pid"]
    os.kill(stopped, signal.SIGSTOP)
    before = len(metrics(run))
    reaches(run, before + 2)
    found = json.loads(perilune_on(slurm, "jobs", "status", "--json", str(run)))
    assert (found["attempt"], found["restarts"]) == (1, 1)
    (restart,) = [event for event in events(run) if event["event"] == "restart"]
    why = restart["why"]
    assert (restart["kind"], restart["rank"]) == ("hang", 1)
    assert f"no sign of life of rank 1 ({socket.gethostname()}, pid {stopped})" in why and "SIGSTOP" in why
    assert not Path(f"/proc/{stopped}").exists()
    perilune_on(slurm, "jobs", "cancel", str(run))
    assert slurm.until(job) == "FAILED"  # 75 is not 0; and it is not requeued
    assert "ExitCode=75:0" in slurm("scontrol", "show", "job", job), events(run)
    assert (run / "launch" / "outcome").read_text().strip() == "cancelled"
    at = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step_{at:08d}").is_dir()
    last = {entry["step"]: entry for entry in metrics(run)}
    assert [last[step] for step in sorted(last)][:STEPS] == whole[:at]


def held(run: Path, packed: Path) -> list[str]:
    """A launch whose job waits."""
    site = run.parent / "site.yaml"
    site.write_text("sbatch: {hold: true, comment: ours}\n")
    command = [str(Path(sys.executable).with_name("perilune")), "launch", "slurm", "--site", str(site)]
    return [*command, "--", *train(packed), "--run", str(run)]


@pytest.mark.parametrize("death", ["kill -9 $PPID", "kill -9 $$"])
def test_a_job_whose_number_nobody_was_told_is_found_and_not_submitted_again(
    slurm: slurm_cluster.Cluster, packed: Path, tmp_path: Path, death: str
) -> None:
    """Launcher or sbatch are killed as soon as Slurm has taken the job, which waits."""
    run = tmp_path / "run"
    command = held(run, packed)
    env = slurm.env | {"PATH": slurm_cluster.losing(tmp_path / "bin", death)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (2 if "$$" in death else -signal.SIGKILL), done
    (job,) = (tmp_path / "bin" / "lost").read_text().split()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2 and "is being trained already, by slurm's job" in again.stderr, again
    assert slurm("squeue", "--noheader", "--states=PENDING", "--format=%i").split() == [job]
    assert json.loads(perilune_on(slurm, "jobs", "status", "--json", str(run)))["state"] == "pending (JobHeldUser)"
    perilune_on(slurm, "jobs", "cancel", str(run))
    assert slurm.state(job) == "CANCELLED"


def test_a_controller_that_does_not_answer_takes_no_second_job(
    slurm: slurm_cluster.Cluster, packed: Path, tmp_path: Path
) -> None:
    """It is stopped while it has the submission, and wakes up after the launcher was killed."""
    run = tmp_path / "run"
    command = held(run, packed)
    control = slurm.daemons["slurmctld"]
    control.send_signal(signal.SIGSTOP)
    try:
        launcher = subprocess.Popen(command, env=slurm.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        where = Papers(run).where
        while not (where.exists() and psutil.Process(launcher.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # until sbatch has asked
        sbatch = psutil.Process(launcher.pid).children()
        assert [one.name() for one in sbatch] == ["sbatch"]
        for one in (launcher, *sbatch):
            one.kill()
        launcher.wait(10)
    finally:
        control.send_signal(signal.SIGCONT)
    again = subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=100, check=False)
    jobs = slurm("squeue", "--noheader", "--states=PENDING", "--format=%i").split()
    assert len(jobs) == 1, (jobs, again)
    perilune_on(slurm, "jobs", "cancel", str(run))


def test_a_damaged_checkpoint_counts_for_no_restart(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    """The judge, a line of shell here, has set one aside twice; one restart is allowed."""
    program = tmp_path / "program.sh"
    program.write_text(
        '#!/bin/sh\n[ "$1 $2" = "jobs judge" ] && echo "{\\"counts\\": false, \\"rank\\": 0}"\n'
        '[ "$1" = jobs ] && exit 0\n[ "$PERILUNE_ATTEMPT" -ge 2 ] || exit 1\n'
    )
    program.chmod(0o755)
    run = tmp_path / "run"
    job = Job(("train",), run, folder=tmp_path, program=(str(program),), restarts=1)
    file = tmp_path / "job.sh"
    file.write_text(slurm_script.script(job, Placement(), file))
    (run / "launch").mkdir(parents=True)
    assert slurm.until(slurm("sbatch", "--parsable", str(file))) == "COMPLETED"
    assert (run / "launch" / "attempts").read_text() == "2 0\n"
    assert not (run / "launch" / "suspects").exists()


def test_a_suspended_job_is_under_way(slurm: slurm_cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60")
    slurm.until(job, "RUNNING")
    slurm("scontrol", "suspend", job)
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    assert slurm_jobs.state({"launcher": "slurm", "jobs": [job]}) == "running (suspended)"
    slurm("scontrol", "resume", job)
    slurm("scancel", job)


def test_an_array_of_two_with_a_gpu_each_rank(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    """The script with a program of two lines in place of training, which the real GPUs are missing for."""
    shown = tmp_path / "shown.sh"
    shown.write_text(
        '#!/bin/sh\n[ "$1" = jobs ] && exit 0\n'
        'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE gpus=$CUDA_VISIBLE_DEVICES $MASTER_ADDR $*"\n'
    )
    shown.chmod(0o755)
    run = tmp_path / "run"
    job = Job(
        ("train", "--run", str(run)), run, folder=tmp_path, procs_per_node=2, gpus_per_node=2, program=(str(shown),)
    )
    placement = Placement(sweep=(("k", ("1", "b c")),))
    file = tmp_path / "job.sh"
    file.write_text(slurm_script.script(job, placement, file))
    (run / "launch").mkdir(parents=True)
    number = slurm("sbatch", "--parsable", str(file))
    for task, (folder, value) in enumerate((("k=1", "k=1"), ("k=b_c", "k=b c"))):
        assert slurm.until(f"{number}_{task}") == "COMPLETED"
        for rank in range(2):
            (line,) = (run / folder / "logs" / f"rank_{rank}.log").read_text().splitlines()
            words = line.split(" ", 4)
            assert words[:3] == [f"{rank}/2", f"{rank}/2", "gpus=0,1"] and words[3] in slurm_cluster.NODES
            assert words[4] == f"train {value} --run {run / folder}"


def test_a_chain_goes_on_until_the_run_is_finished(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    script = tmp_path / "program.sh"
    script.write_text('#!/bin/sh\n[ "$1" = jobs ] && exit 0\necho ran\n')
    script.chmod(0o755)
    run = tmp_path / "run"
    job, placement = Job(("train",), run, folder=tmp_path, program=(str(script),)), Placement(chain=2)
    file = tmp_path / "job.sh"
    file.write_text(slurm_script.script(job, placement, file))
    (run / "launch").mkdir(parents=True)
    first, second = slurm_script.commands(placement, file)
    one = slurm(*first)
    two = slurm(*(word.replace("JOB", one) for word in second))
    assert slurm.until(one) == "COMPLETED" and slurm.until(two) == "COMPLETED"
    assert (run / "logs" / "rank_0.log").read_text() == "ran\n"
    assert "nothing to do, the run has ended: finished" in (run / "launch" / f"slurm-{two}.log").read_text()


@pytest.mark.parametrize("chain", [1, 2])
def test_a_node_blamed_twice_is_left_out_of_the_job_that_goes_on(
    slurm: slurm_cluster.Cluster, tmp_path: Path, chain: int
) -> None:
    """The judge, a line of shell here, blames rank 1 each time. The next job knows how often was restarted."""
    program = tmp_path / "program.sh"
    program.write_text(
        '#!/bin/sh\n[ "$1 $2" = "jobs judge" ] && echo "{\\"rank\\": 1}"\n[ "$1" = jobs ] && exit 0\n'
        '[ "$PERILUNE_ATTEMPT" -ge 2 ] || exit 1\necho "$SLURMD_NODENAME $WORLD_SIZE"\n'
    )
    program.chmod(0o755)
    run = tmp_path / "run"
    job = Job(("train",), run, folder=tmp_path, program=(str(program),), nodes=2, min_nodes=1, worlds=(1, 2))
    file = tmp_path / "job.sh"
    placement = Placement(chain=chain)
    file.write_text(slurm_script.script(job, placement, file))
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "suspects").write_text(slurm_cluster.NODES[0] + "\n")  # of an earlier launch
    first = slurm("sbatch", "--parsable", "--nodes=2", str(file))
    for words in slurm_script.commands(placement, file)[1:]:
        slurm(*(word.replace("JOB", first) for word in words))
    assert slurm.until(first) == "FAILED"
    second = str(int(first) + 1)
    assert slurm.until(second) == "COMPLETED"
    assert (run / "logs" / "rank_0.log").read_text() == f"{slurm_cluster.NODES[0]} 1\n"
    assert (run / "launch" / "attempts").read_text() == "2 2\n"
    assert (run / "launch" / "suspects").read_text().split() == [slurm_cluster.NODES[1]] * 2
