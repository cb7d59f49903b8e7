"""The store by which the ranks of a run find one another, where their launcher has taken a port for it.

The launcher imports no torch (launch/agent.py, launch/ray_ranks.py), so rank 0 serves the store, at the socket that it
was given; all ranks join it, as they would join the store of torchrun's agent.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

_served: list[Any] = []  # to the end of this process


def serve(timeout_s: float = 600.0) -> None:
    """Serve the store if it is this process that was given the port; another call does nothing."""
    given = os.environ.pop("PERILUNE_STORE_FD", None)
    if given is None:
        return
    from torch.distributed import TCPStore

    os.set_inheritable(int(given), False)
    _served.append(
        TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=int(given),
        )
    )


def leave() -> None:
    """Join no store of the launcher's: this process, and those that it starts, make groups of their own."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "PERILUNE_STORE_FD"):
        os.environ.pop(name, None)
