"""The store by which the ranks of a run find one another, where their launcher has opened its port (launch/agent.py).

The launcher's agent imports no torch, so rank 0 serves the store; all ranks join it, as they would join the store of
torchrun's agent. Until rank 0 serves, those that come early wait in the port's queue.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

_served: list[Any] = []  # to the end of this process


def serve(timeout_s: float = 600.0) -> None:
    """Serve the store if it is this process that was given the port; another call does nothing."""
    listening = os.environ.pop("PERILUNE_STORE_FD", None)
    if listening is None:
        return
    from torch.distributed import TCPStore

    _served.append(
        TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=int(listening),
        )
    )
