"""[NODES CPUS]: a Ray cluster on this machine, of two nodes with two CPUs, or so many, for tests.

It obeys one word a line of its stdin.

Prints {"address": URL of the job server, "pids": [...]} once it is up. `remove` ends the second node as a lost one
(kill -9 of its raylet), `add` puts another in its place; each is answered by a line. End of stdin: all ends.
Environment: RAY_AUTH_MODE and RAY_AUTH_TOKEN are the caller's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

HEALTH = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
# Each driver would have as many idle workers started as there are CPUs; and workers give way to whatever else computes.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"} | {
    f"RAY_health_check_{name}": str(n) for name, n in HEALTH.items()
}

import psutil  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

STORE = 80 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    count, cpus = map(int, sys.argv[1:] or (2, 2))
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        os.environ["RAY_TMPDIR"] = folder  # where Ray notes the newest cluster
        for name in ("ray", "1"):
            Path(folder, name).mkdir()
        head = {"node_ip_address": "127.0.0.2", "include_dashboard": True, "dashboard_host": "127.0.0.1",
                "dashboard_port": port, "num_cpus": cpus, "object_store_memory": STORE,
                "temp_dir": f"{folder}/1"}  # fmt: skip
        cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)

        def add(number: int) -> object:
            Path(folder, str(number)).mkdir()
            return cluster.add_node(node_ip_address=f"127.0.0.{number + 1}", num_cpus=cpus, object_store_memory=STORE,
                                    temp_dir=f"{folder}/{number}")  # fmt: skip

        number, second = count, [add(number) for number in range(2, count + 1)][-1:]
        say({"address": f"http://127.0.0.1:{port}"})
        for line in sys.stdin:
            if line.strip() == "remove":
                cluster.remove_node(second.pop(), allow_graceful=False)
            elif line.strip() == "add":
                number += 1
                second = [add(number)]
            say({"done": line.strip(), "pids": [child.pid for child in psutil.Process().children(recursive=True)]})
        cluster.shutdown()


def say(found: dict[str, object]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
