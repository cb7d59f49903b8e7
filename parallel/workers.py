"""Processes kept alive between layouts: starting one takes seconds (torch, Megatron-core), a new process group little.

Used to compare layouts on one machine: `with Workers(4) as workers: results = workers.run(2, function, argument)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from perilune.parallel import late_compile, store
from perilune.parallel.quiet import quiet


class WorkerError(RuntimeError):
    """A function failed in some process; the message holds its rank and traceback."""


class Workers:
    """Up to `size` processes of one machine, each with its own interpreter, ended by `close` or with their parent.

    They compute on the GPUs of the machine if there is one for each, else all on its CPU. `start_s` is how long they
    may take to start, which is importing, and on a loaded machine takes minutes; `timeout_s` a function of theirs.
    """

    def __init__(self, size: int, threads: int = 1, timeout_s: float = 120.0, start_s: float = 600.0) -> None:
        self.size, self._threads, self._timeout_s, self._start_s = size, threads, timeout_s, start_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(*arguments)` in the first `world` processes, joined in one gloo or NCCL group; results by rank.

        `function` must be importable. Raises WorkerError with the traceback of the first rank to fail, or when
        `start_s` or `timeout_s` passes; the processes are started anew at the next call then.
        """
        if not 1 <= world <= self.size:
            raise ValueError(f"world={world} must be between 1 and the {self.size} processes of this pool")
        try:
            self._start(world)
            port = _free_port()
            for rank in range(world):
                self._pipes[rank].send((rank, world, port, function, arguments))
            return self._answers(range(world), self._timeout_s, "gave no answer")
        except BaseException:  # of an interrupt too: the answers to this call would be taken for those to the next
            self.close()
            raise

    def _answers(self, ranks: range, timeout_s: float, late: str) -> list[Any]:
        """What each of `ranks` sends next, all within `timeout_s` of one another. Raises WorkerError."""
        results: dict[int, Any] = {}
        while len(results) < len(ranks):
            waiting = {self._pipes[rank]: rank for rank in ranks if rank not in results}
            ready = wait(list(waiting), timeout=timeout_s)
            if not ready:
                raise WorkerError(f"ranks {sorted(waiting.values())} of {ranks.stop} {late} in {timeout_s:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, f"process ended with exit code {self._processes[rank].exitcode}"
                if not ok:
                    raise WorkerError(f"rank {rank} of {ranks.stop}: {value}")
                results[rank] = value
        return [results[rank] for rank in ranks]

    def close(self) -> None:
        """End every process, by its own id."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self, world: int) -> None:
        """Bring the processes up to `world`; those beyond what was asked for so far never start. Raises WorkerError."""
        new = range(len(self._processes), world)
        context = get_context("spawn")
        settings = {"OMP_NUM_THREADS": str(self._threads)}
        if not self._gpu_each():
            settings["CUDA_VISIBLE_DEVICES"] = ""
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            for _ in new:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, self._timeout_s), daemon=True)
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        self._answers(new, self._start_s, "had not started")

    def _gpu_each(self) -> bool:
        """Whether this machine has a GPU for every process: NCCL refuses two on one."""
        import torch

        return torch.cuda.device_count() >= self.size


def _serve(pipe: Connection, timeout_s: float) -> None:
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store.leave()
    quiet()
    late_compile.import_megatron_core()  # before `recv`, which imports it with the function that it gets
    pipe.send((True, None))  # from now on time counts as the function's
    while True:
        try:
            rank, world, port, function, arguments = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        try:
            pipe.send((True, _joined(function, arguments, timeout_s)))
        except Exception:
            with contextlib.suppress(OSError):  # the parent may be gone; then there is nobody to tell
                pipe.send((False, traceback.format_exc()))
            return


def _joined(function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        return function(*arguments)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _let_go()


def _let_go() -> None:
    """Free the models of the function that ran, and with them their groups: each keeps threads that poll.

    Two things of Megatron-core would keep them: a cache of RoPE tables that holds their modules, and a dispatcher's
    last probabilities, whose autograd graph leads over DDP's hooks back to it, out of the garbage collector's sight.
    """
    import torch
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    RotaryEmbedding.forward.cache_clear()  # type: ignore[attr-defined]
    YarnRotaryEmbedding.forward.cache_clear()  # type: ignore[attr-defined]
    for thing in gc.get_objects():
        if issubclass(type(thing), MoETokenDispatcher):  # isinstance would wake lazy, deprecated names of torch
            for name, value in vars(thing).items():
                if isinstance(value, torch.Tensor):
                    setattr(thing, name, None)
    gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
