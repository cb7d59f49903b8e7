"""A run on Ray: submitted by its job API to a cluster that is there, or on a cluster of one node begun for it here."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from perilune.launch import local
from perilune.launch.job import Job, JobError, NoAnswer, Papers
from perilune.launch.launchers import claimed
from perilune.launch.ray_driver import QUIET, own_cluster, stop_file

_ANSWER_S = 30.0
_PATIENCE_S = 600.0  # with a cluster that does not answer, while its run is waited for
_NOT_KNOWN = "ended: its cluster does not know it"  # it never came there, or the cluster is another one since
# Of the server's errors those that are no verdict on the job: the cluster is not all there.
_AWAY = re.compile(r"status code (408|429|502|503|504)|try again later")
_TOKEN_HELP = "export RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"


def entrypoint(job: Job) -> list[str]:
    """What the job runs, on the head node."""
    return [job.program[0], "-P", "-m", "perilune.launch.ray_driver", str(job.run_dir)]


def runtime_env(job: Job) -> dict[str, Any]:
    """Ray shows it to whoever may ask about the job: nothing of this process's environment is in it."""
    return {"env_vars": {**QUIET, **job.common_env()}}


def describe(job: Job, address: str | None) -> str:
    """Exactly what `run` submits or starts."""
    bundles = {"CPU": job.procs_per_node} | ({"GPU": job.gpus_per_node} if job.gpus_per_node else {})
    fewest = f", {job.min_nodes} at least" if job.min_nodes and job.min_nodes < job.nodes else ""
    lines = [f"# {job.nodes} nodes{fewest}, each a bundle of {json.dumps(bundles)}; restarts: {job.restarts}"]
    if address:
        lines += [
            f"# submitted to {address}, as {json.dumps(_submission(job), indent=2)}",
            shlex.join(entrypoint(job)),
        ]
    else:
        names = " ".join(f"{name}={'NEW' if 'TOKEN' in name else value}" for name, value in own_cluster({}).items())
        lines += [
            "# on a cluster of this machine alone, on 127.0.0.1, which ends with the run",
            f"env {names} {shlex.join([*entrypoint(job), '--here'])}",
        ]
    ranks = f"RANK, LOCAL_RANK, WORLD_SIZE={job.world}, MASTER_ADDR and MASTER_PORT of the first node, PERILUNE_ATTEMPT"
    lines += [f"# for each process, in {job.folder}: {ranks}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.common_env().items())]
    return "\n".join([*lines, shlex.join(job.command)])


def run(
    job: Job, address: str | None, *, insecure: bool, wait: bool, prepare_run: Callable[[], None] = lambda: None
) -> int:
    """Start the run; with `wait` stay to its end and return its exit code. SIGTERM and Ctrl-C end it with a checkpoint.

    `prepare_run` is called before it starts, once no other launch can have its folder. Raises JobError for a cluster
    that refuses, or takes jobs from anybody; NoAnswer for one that does not answer, when it has been asked again for a
    while if it has taken the job.
    """
    papers = Papers(job.run_dir)
    client = check(address, insecure)
    if address is None and not wait:
        raise JobError("--no-wait needs --address: a cluster of this machine for one run ends with this command")
    with claimed(papers):
        prepare_run()
        number = _not_taken(papers, address) or f"perilune_{secrets.token_hex(8)}"
        stop_file(papers).unlink(missing_ok=True)
        if client is None:
            return _run_here(job, papers)
        where = {"launcher": "ray", "address": address, "job": number, "run_dir": str(job.run_dir)}
        _submit(client, job, where, papers)
    return _stay(client, where, papers) if wait else 0


def _submit(client: Any, job: Job, where: dict[str, Any], papers: Papers) -> None:
    """Raises JobError, NoAnswer."""
    # Before, and left there after an error: a job that nobody knows of could be submitted a second time.
    papers.write(job, where)
    number, address = where["job"], where["address"]
    try:
        client.submit_job(**_submission(job), submission_id=number)
    except Exception as error:  # of requests, of Ray: what the server said is all there is to say
        there = state(where)  # the answer may be lost of a job that was taken
        said = f"{address} did not take the job: {_line(error)}"
        if there.startswith("unknown") or (there == _NOT_KNOWN and _away(error)):
            raise NoAnswer(said) from error
        if there == _NOT_KNOWN:
            raise JobError(said) from error
    print(f"submitted: job {number} to {address}", file=sys.stderr, flush=True)


def check(address: str | None, insecure: bool) -> Any:
    """The client of the cluster at `address`. Raises JobError where Ray is missing or the cluster refuses; NoAnswer."""
    if importlib.util.find_spec("ray") is None:
        raise JobError("Ray is missing here: pip install 'ray[default]', or start the run by another launcher")
    return _client(address, insecure) if address else None


def state(where: dict[str, Any]) -> str:
    """`running`, `pending`, `done`, `failed`, ..., as the cluster says it; `unknown: WHY` where it does not."""
    if not where.get("address"):
        return local.state(where)
    try:
        word = str(_client(where["address"], True).get_job_status(where["job"]).value)
    except Exception as error:
        if f"{where['job']} does not exist" in str(error):
            return _NOT_KNOWN
        return f"unknown: {where['address']} does not say ({_line(error)})"
    return {"SUCCEEDED": "done", "STOPPED": "cancelled"}.get(word, word.lower())


def cancel(where: dict[str, Any], now: bool) -> None:
    """Ask the run to end: with a checkpoint, or `now`. Raises JobError where it does not run."""
    if (there := state(where)) not in ("running", "pending"):
        raise JobError(f"the run does not run: {there}; there is nothing to cancel")
    _ask(Papers(Path(where["run_dir"])), 2 if now else 1)
    if now and where.get("address"):
        _client(where["address"], True).stop_job(where["job"])


def _not_taken(papers: Papers, address: str | None) -> str:
    """The number of an earlier submission that did not come there: under it one that is on its way yet, and this one,
    are one job. Empty: there is none."""
    try:
        _, where = papers.read()
    except JobError:
        return ""
    there = address and where.get("address") == address and state(where) == _NOT_KNOWN
    return str(where["job"]) if there else ""


def _submission(job: Job) -> dict[str, Any]:
    return {
        "entrypoint": shlex.join(entrypoint(job)),
        "runtime_env": runtime_env(job),
        "metadata": {"name": job.name, "run_dir": str(job.run_dir)},
    }


def _run_here(job: Job, papers: Papers) -> int:
    """A driver with a cluster of its own; both end with this process."""
    papers.write(job, {**local.where(job), "launcher": "ray"})
    child = str(Path(local.__file__).with_name("child.py"))
    command = [sys.executable, "-S", "-P", child, str(os.getpid()), "-", "-", *entrypoint(job), "--here"]
    with local.signals_that_ask() as asked:
        driver = subprocess.Popen(command, env={**os.environ, **own_cluster(os.environ)}, start_new_session=True)
        told = 0
        while (code := driver.poll()) is None:
            if (more := len(asked) - told) > 0:
                told += more
                _ask(papers, more)
            time.sleep(0.1)
    return code if code >= 0 else 1


def _stay(client: Any, where: dict[str, Any], papers: Papers) -> int:
    """Until the job has ended; the run's exit code. Raises JobError where the cluster knows it no more; NoAnswer where
    it does not answer for long."""
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {one: signal.signal(one, lambda one, frame: asked.append(one)) for one in numbers}
    told, seen, silence = 0, 0, _Silence(where, papers)
    try:
        while True:
            if (more := len(asked) - told) > 0:
                told += more
                _ask(papers, more)
            try:
                status = client.get_job_status(where["job"])
                text = client.get_job_logs(where["job"])
                code = client.get_job_info(where["job"]).driver_exit_code if status.is_terminal() else None
            except Exception as error:
                silence.goes_on(error)
            else:
                silence.ends(status.value)
                print(text[seen:], end="", file=sys.stderr, flush=True)
                seen = len(text)
                if status.is_terminal():
                    return 0 if status.value == "SUCCEEDED" else code if code is not None and code > 0 else 1
            time.sleep(0.5)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Silence:
    """What is known of a job while its cluster does not answer, which a head that starts anew, or a network, may do."""

    def __init__(self, where: dict[str, Any], papers: Papers) -> None:
        self._where, self._papers = where, papers
        self._known = f"it took the job at {_clock()}"
        self._since: float | None = None

    def goes_on(self, error: Exception) -> None:
        """A question has no answer. Raises JobError for a verdict on the job; NoAnswer when patience is at its end."""
        job, address, now = self._where["job"], self._where["address"], time.monotonic()
        again = (
            f"`perilune jobs status {self._papers.run_dir}` asks again, and `jobs logs --follow` shows how it gets on"
        )
        if not _away(error):
            raise JobError(f"{address} says of job {job}: {_line(error)}; {self._known}. {again}") from error
        if self._since is None:
            self._since = now
            print(f"perilune: {address} does not answer since {_clock()} ({_line(error)}); {self._known}, and the run "
                  f"goes on if the cluster does: it is asked again for {_PATIENCE_S:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
        if now - self._since > _PATIENCE_S:
            raise NoAnswer(
                f"{address} has not answered for {now - self._since:.0f} s ({_line(error)}). Of job {job} is known: "
                f"{self._known}; the run goes on if the cluster does. {again}"
            ) from error

    def ends(self, state: str) -> None:
        """It has answered."""
        self._known = f"at {_clock()} it was {state.lower()}"
        if self._since is not None:
            after = time.monotonic() - self._since
            print(f"perilune: {self._where['address']} answers again, after {after:.0f} s", file=sys.stderr, flush=True)
            self._since = None


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _ask(papers: Papers, times: int) -> None:
    """Ask so many times more: somebody may have asked already, from elsewhere."""
    with suppress(OSError, ValueError):
        times += int(stop_file(papers).read_text() or 0)
    new = stop_file(papers).with_suffix(".new")
    new.write_text(str(times))
    os.replace(new, stop_file(papers))


def _client(address: str, insecure: bool) -> Any:
    """Of the job API. Raises JobError for an address that is none, or that lets anybody run programs; NoAnswer."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        shown = address if "@" not in address else f"{parts.scheme}://...@{parts.hostname}"
        raise JobError(f"--address {shown}: the job server, as http://head:8265, without user or password")
    if not insecure and not _loopback(parts.hostname) and _takes_anybody(address):
        raise JobError(
            f"{address} is beyond this machine and asks for no token, so that anybody who reaches it runs programs "
            "there: start the cluster with RAY_AUTH_MODE=token, or say --insecure"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's own waits for ever for an answer."""

        def _do_request(self, *arguments: Any, **more: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": _ANSWER_S, **more})

    try:
        return Client(address)
    except Exception as error:
        kind = NoAnswer if _away(error) else JobError
        raise kind(f"{address} does not answer as a job server: {_line(error)}; {_TOKEN_HELP}") from error


def _away(error: Exception) -> bool:
    """Whether the cluster, or what is between, is at fault: there is no answer, or none on the matter."""
    return isinstance(error, OSError) or bool(_AWAY.search(str(error)))


def _takes_anybody(address: str) -> bool:
    """Whether it lists its jobs to a request without a token."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except OSError as error:
        raise NoAnswer(f"{address} does not answer: {_line(error)}") from error


def _loopback(host: str) -> bool:
    try:
        return all(ipaddress.ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
