"""RUN [--here]: supervises a launched run on the Ray cluster of this process; the entry point of the job.

With --here it begins a cluster of one node on this machine, for this run alone: loopback, a token that is new, no usage
statistics, no dashboard, a small object store.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from perilune.launch.job import Job, JobError, Papers

# Before Ray is imported, which reads these once.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; no data goes through it


def own_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of a cluster for one run, with a token of its own that is written nowhere."""
    return {
        **QUIET,
        # Else Ray gives its node an address that others reach, and listens on every interface; its metrics ask for no
        # token. With this its node is 127.0.0.1, and so is everything that listens.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": environment.get("RAY_worker_niceness", "0"),  # else ranks yield to all else
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": environment.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
    }


def stop_file(papers: Papers) -> Path:
    """How often somebody has asked the run to end: with a signal Ray gives a job 3 s, too few for a checkpoint."""
    return papers.folder / "stop"


def main(arguments: list[str]) -> int:
    """Returns the run's exit code."""
    run_dir, here = Path(arguments[0]), "--here" in arguments[1:]
    os.environ.update({**QUIET, **(own_cluster(os.environ) if here else {})})
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    import ray

    from perilune.launch.ray_ranks import RayAttempt, nodes_there
    from perilune.launch.supervise import note, supervise

    papers = Papers(run_dir)
    job, _ = papers.read()
    asked_file = stop_file(papers)

    def asked() -> int:
        try:
            return len(signals) + int(asked_file.read_text() or 0)
        except (OSError, ValueError):
            return len(signals)

    def say(text: str) -> None:
        print(f"perilune: {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:  # sockets' paths have 107 bytes
        try:
            _connect(job, temporary if here else None)
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray has put its own in their place
                signal.signal(number, lambda number, frame: signals.append(number))
            return supervise(
                job,
                papers,
                lambda number, nodes: RayAttempt(job, papers, number, nodes),
                available=lambda: nodes_there(job),
                asked=asked,
                say=say,
            )
        except JobError as error:
            note(papers, "gave_up", why=str(error))
            say(f"giving up: {error}")
            return 1
        finally:
            ray.shutdown()


def _connect(job: Job, temporary: str | None) -> None:
    """Join the cluster, or begin one in the folder `temporary`. Raises JobError with what Ray said."""
    try:
        _init(job, temporary)
    except Exception as error:  # bare ones too: Ray's processes do not start, or there is no cluster
        said = " ".join(str(error).split())[:500]
        if temporary is None:
            raise JobError(f"Ray did not join its cluster: {said}; what does `ray status` say there?") from error
        raise JobError(
            f"Ray did not start on this machine: {said}; is it busy, or short of memory or of space in /tmp?"
        ) from error


def _init(job: Job, temporary: str | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "configure_logging": True, "logging_level": logging.WARNING}
    if temporary is None:
        ray.init(address="auto", **quiet)
        return
    cpus = max(job.procs_per_node, os.cpu_count() or 1)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        _temp_dir=temporary,
        **quiet,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
