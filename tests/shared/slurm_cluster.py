"""A Slurm of two nodes on this machine, for tests: munge, slurmctld and two slurmd, ended by their own ids.

Each node has two cores and two GPUs, which are files that nothing opens.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("perilune-a", "perilune-b")
_HOSTS = Path("/etc/hosts")


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    gone = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    return f"{', '.join(gone)} not installed" if gone else ""


def _port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Cluster:
    """A running one: `env` is what its commands need."""

    folder: Path
    conf: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def __call__(self, *words: str, timeout: float = 30.0) -> str:
        """Run one of Slurm's commands."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """JobState."""
        return self("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].split()[0]

    def until(self, job: str, *states: str, timeout: float = 90.0) -> str:
        """Wait for one of `states`, or the job's end."""
        deadline = time.monotonic() + timeout
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        while time.monotonic() < deadline:
            found = self.state(job)
            if found in (states or over):
                return found
            assert found not in over, f"job {job}: {found}"
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {self.state(job)}")

    def start(self, name: str, *words: str) -> None:
        """Start a daemon in the foreground."""
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=self.env
        )
        log.close()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self.start(node, "slurmd", "-D", "-f", str(self.conf), "-N", node)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a daemon."""
        process = self.daemons.pop(name)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start one, with its files in `folder`."""
    for name in ("state", "a", "b"):
        (folder / name).mkdir(parents=True)
    munge = folder / "munge"
    munge.mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    socket_file = f"/tmp/perilune-munge-{os.getpid()}"
    control, first, second = _port(), _port(), _port()
    conf = folder / "slurm.conf"
    conf.write_text(f"""ClusterName=perilune
SlurmctldHost={socket.gethostname()}({_address()})
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket_file},cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
NodeName={NODES[0]} NodeHostName=localhost NodeAddr={_address()} Port={first} CPUs=2 RealMemory=2000 Gres=gpu:2
NodeName={NODES[1]} NodeHostName=localhost NodeAddr={_address()} Port={second} CPUs=2 RealMemory=2000 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
    hosts = _HOSTS.read_text()
    env = {**os.environ, "SLURM_CONF": str(conf)}
    made = Cluster(folder, conf, env, {})
    try:
        # torch resolves the name of the first node.
        _HOSTS.write_text(hosts.rstrip("\n") + "".join(f"\n127.0.0.1 {node}" for node in NODES) + "\n")
        made.start(
            "munged", "munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        _wait(lambda: Path(socket_file).exists())
        made.start("slurmctld", "slurmctld", "-D", "-f", str(conf))
        for node in NODES:
            made.start_node(node)
        _wait(lambda: _idle(made))
        yield made
    finally:
        for name in reversed(list(made.daemons)):
            made.stop(name)
        lines = [line for line in _HOSTS.read_text().splitlines() if line not in [f"127.0.0.1 {n}" for n in NODES]]
        _HOSTS.write_text("\n".join(lines) + "\n")


def losing(folder: Path, death: str) -> str:
    """PATH with an sbatch whose first number nobody is told: the job is taken, then it runs `death`."""
    folder.mkdir()
    script = folder / "sbatch"
    real = shutil.which("sbatch")
    script.write_text(f'#!/bin/bash\n[ ! -e {folder}/lost ] || exec {real} "$@"\n{real} "$@" >{folder}/lost\n{death}\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def _idle(made: Cluster) -> bool:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=made.env, capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.split() == ["idle", "idle"]


def _address() -> str:
    """One of this machine that is not loopback: Slurm's daemons need it."""
    words = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True, timeout=10).stdout.split()
    return next((word for word in words if ":" not in word), "127.0.0.1")


def _wait(ready: object, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if ready():  # type: ignore[operator]
            return
        time.sleep(0.1)
    raise TimeoutError("Slurm did not come up")
