"""What the processes of tests/test_checkpoint.py do; each function runs on every rank of a group."""

from __future__ import annotations

import errno
import hashlib
import resource
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from perilune.parallel import mesh as meshes
from perilune.pretrain import checkpoint, checkpoint_files, model, presets, rules
from perilune.pretrain.data.collate import collate
from perilune.pretrain.data.shard import Row
from perilune.pretrain.objective import next_token
from perilune.pretrain.optim import optimizer
from perilune.pretrain.optim.average import average_of
from perilune.pretrain.schema import Config, Parallel, Precision
from perilune.pretrain.step import train_step
from perilune.pretrain.timetable import StepPlan

ROWS = 4


def config_of(compute: str = "fp32", layers: int = 4, **parallel: Any) -> Config:
    """`tiny` in a layout; four layers, so that pp=2 with vpp=2 has some in every stage."""
    tiny = presets.get("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, num_layers=layers),
        parallel=Parallel(**parallel),
        precision=Precision(compute=compute),  # type: ignore[arg-type]
    )


class Trainer:
    """A model and its optimizer in a layout, trained on rows that depend on nothing but the step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        mesh = rules.mesh_of(config, dist.get_world_size())
        meshes.start(mesh, timeout_s=60)
        self.dp = mesh.dp
        self.model = model.build(config, mesh)
        self.optimizer = optimizer.build(config, self.model)
        self.step = 0
        self.before_update: Callable[[], None] = lambda: None

    def train(self, steps: int) -> list[float]:
        """Losses (nats a token) of the next `steps` steps."""
        return [self._one().loss for _ in range(steps)]

    def _one(self) -> Any:
        rng = np.random.default_rng(self.step)
        length = self.config.data.seq_len
        bounds, mask = np.array([0, length // 3, length], np.int32), np.ones(length, np.uint8)
        rows = [
            Row(str(i), rng.integers(0, self.config.model.vocab_size, length).astype(np.uint16), bounds, mask)
            for i in range(ROWS)
        ]
        mine = rows[parallel_state.get_data_parallel_rank() :: self.dp]
        batches = [collate([row], self.config.model.num_nextn_predict_layers, True) for row in mine]
        todo = StepPlan(rows=ROWS, lr=1e-2 / (1 + self.step), mtp_weight=0.3, bias_speed=1e-2)
        self.step += 1
        return train_step(
            self.model, self.optimizer, batches, next_token, todo, clip=1.0, before_update=self.before_update
        )

    def digest(self) -> dict[str, str]:
        """SHA-256 of all that this rank holds: weights and biases, masters, moments, averages, step counts."""
        hashes: dict[str, Any] = defaultdict(hashlib.sha256)
        for chunk in self.model.bare():
            for name, value in sorted(chunk.state_dict().items()):
                if isinstance(value, torch.Tensor):
                    hashes["weights"].update(name.encode() + _bytes(value))
        for one in self.optimizer.chained_optimizers:
            for group in one.optimizer.param_groups:
                if "step" in group:
                    hashes["step"].update(b"%d" % group["step"])
                for weight in group["params"]:
                    hashes["masters"].update(_bytes(weight))
                    for name, value in one.optimizer.state[weight].items():
                        hashes[name].update(_bytes(value))
            if (average := average_of(one)) is not None:
                for value in average.of.values():
                    hashes["averages"].update(_bytes(value))
        return {name: value.hexdigest() for name, value in hashes.items()}

    def close(self) -> None:
        meshes.stop(leave_group=False)


def _bytes(tensor: torch.Tensor) -> bytes:
    return str(tensor.dtype).encode() + tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def trainer(config: Config) -> Iterator[Trainer]:
    """A new one, taken down so that the next can have another layout."""
    made = Trainer(config)
    try:
        yield made
    finally:
        made.close()


# --- resume -------------------------------------------------------------------------------------------------------


def straight_and_resumed(configs: list[Config], folder: Path) -> list[dict[str, Any]]:
    """For each layout: four steps at once with a save after two, and two steps of new objects that load it."""
    found = []
    for index, config in enumerate(configs):
        with trainer(config) as first:
            first.train(2)
            path = checkpoint.save(
                folder / str(index), 2, first.model, first.optimizer, {"step": 2}, config=config, keep=0
            )
            straight = {"at 2": first.digest(), "losses": first.train(2), "at 4": first.digest()}
        with trainer(config) as second:
            new = second.digest()
            second.step = checkpoint.load(path, second.model, second.optimizer)["step"]
            resumed = {"at 2": second.digest(), "losses": second.train(2), "at 4": second.digest()}
        found.append({"straight": straight, "resumed": resumed, "new": new})
    return found


# --- other layouts ------------------------------------------------------------------------------------------------


def train_and_save(config: Config, folder: Path) -> dict[str, Any]:
    """Two steps, saved; this rank's state dict and the loss of the step after."""
    with trainer(config) as one:
        one.train(2)
        state = {
            name: value.clone() for name, value in one.model.bare()[0].state_dict().items() if torch.is_tensor(value)
        }
        path = checkpoint.save(folder, 2, one.model, one.optimizer, {"step": 2}, config=config, keep=0)
        return {"path": path, "state": state, "loss": one.train(1)[0]}


def load_and_save_again(configs: list[Config], source: Path, folder: Path) -> list[dict[str, Any]]:
    """In each layout: load `source`, save it again, and the loss of the step after."""
    found = []
    for index, config in enumerate(configs):
        with trainer(config) as one:
            one.step = checkpoint.load(source, one.model, one.optimizer)["step"]
            path = checkpoint.save(folder / str(index), 2, one.model, one.optimizer, {"step": 2}, config=config, keep=0)
            found.append({"path": path, "loss": one.train(1)[0]})
    return found


def hop(config: Config, source: Path | None, folder: Path) -> dict[str, Any]:
    """Load `source` if there is one and save it again; a step, saved; and the loss of the step after that."""
    with trainer(config) as one:
        found: dict[str, Any] = {}
        if source is not None:
            one.step = checkpoint.load(source, one.model, one.optimizer)["step"]
            found["copy"] = _saved(one, folder / "copy")
        found["loss"] = one.train(1)[0]
        found["path"], found["step"] = _saved(one, folder), one.step
        found["next"] = one.train(1)[0]
        return found


def _saved(one: Trainer, folder: Path) -> Path:
    state = {"step": one.step}
    return checkpoint.save(folder, one.step, one.model, one.optimizer, state, config=one.config, keep=0)


def weights_only(source: Path, folder: Path) -> dict[str, Any]:
    """What init_from does to a bf16 model, and what is refused."""
    found: dict[str, Any] = {}
    with trainer(config_of("bf16", zero1=True)) as one:
        checkpoint.init_from(source, one.model, one.optimizer)
        (chunk,) = one.model.bare()
        found["state"] = {name: value for name, value in chunk.state_dict().items() if torch.is_tensor(value)}
        found["masters follow"] = all(
            torch.equal(
                master,
                one.optimizer.chained_optimizers[index]
                .model_float16_groups[group][place]
                .detach()
                .flatten()[_range(one.optimizer.chained_optimizers[index], group, place)]
                .float(),
            )
            for index, part in enumerate(one.optimizer.chained_optimizers)
            for group, masters in enumerate(part.shard_fp32_from_float16_groups)
            for place, master in enumerate(masters)
        )
        path = checkpoint.save(folder, 0, one.model, None, {}, config=one.config, keep=0)
        checkpoint.load(path, one.model, None)
        found["resume"] = _refused(lambda: checkpoint.load(path, one.model, one.optimizer))
        found["cast"] = _refused(lambda: checkpoint.load(source, one.model, one.optimizer))
    deeper = config_of()
    deeper = replace(deeper, model=replace(deeper.model, num_layers=5, hidden_size=32))
    with trainer(deeper) as other:
        found["other model"] = _refused(lambda: checkpoint.init_from(source, other.model))
    return found


def _range(part: Any, group: int, place: int) -> slice:
    bounds = part._get_model_param_range_map(part.model_float16_groups[group][place])["param"]
    return slice(bounds.start, bounds.end)


def _refused(action: Any) -> str:
    try:
        action()
    except checkpoint.CheckpointError as error:
        return str(error)
    return "not refused"


# --- what goes wrong ----------------------------------------------------------------------------------------------


def loads(config: Config, paths: list[Path]) -> list[str]:
    """How each checkpoint is refused (or not) on this rank."""
    with trainer(config) as one:
        return [_refused(lambda path=path: checkpoint.load(path, one.model, one.optimizer)) for path in paths]


def unreadable(path: Path, failing: int = 1) -> dict[str, list[str]]:
    """What each rank raises where the rank `failing` cannot read its share, and where not even the manifest."""

    def broken(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    found: dict[str, list[str]] = {"kinds": [], "said": []}
    for name in ("describe", "read_manifest"):
        kept = getattr(checkpoint_files, name)
        if dist.get_rank() == failing:
            setattr(checkpoint_files, name, broken)
        try:
            checkpoint.opened(path)
        except Exception as error:
            found["kinds"].append(type(error).__name__)
            found["said"].append(str(error))
        finally:
            setattr(checkpoint_files, name, kept)
    return found


def failing_saves(config: Config, folder: Path) -> dict[str, Any]:
    """Saves that fail on one rank only: what each rank raises. Then one that does not fail."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    with trainer(config) as one:
        one.train(1)

        def attempt(step: int, state: dict[str, Any] | None = None) -> str:
            try:
                state = state or {"step": step}
                return str(checkpoint.save(folder, step, one.model, one.optimizer, state, config=config, keep=1))
            except (checkpoint.SaveError, TypeError, ValueError) as error:
                return f"{type(error).__name__}: {error}"

        found["first"] = attempt(1)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:  # the kernel refuses to let a file grow beyond 64 KiB, as a full disk would
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
        found["shards"] = attempt(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

        write = checkpoint_files._write_synced

        def full(path: Path, text: str) -> None:
            if path.name == checkpoint_files.MANIFEST:
                raise OSError(28, "No space left on device")
            write(path, text)

        checkpoint_files._write_synced = full
        found["manifest"] = attempt(2)
        checkpoint_files._write_synced = write
        dist.barrier()
        found["left"] = sorted(entry.name for entry in folder.iterdir())
        dist.barrier()
        found["ranks differ"] = attempt(2, {"rank": rank})
        found["no JSON"] = attempt(2, {"a": (1, 2)})
        found["again"] = attempt(1)
        found["another run"] = attempt(1, {"step": 1, "tokens": 5})
        found["second"] = attempt(2)
    return found
