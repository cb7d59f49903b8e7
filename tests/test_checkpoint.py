"""Checkpoints: bitwise, in any layout; damage is named, nothing hostile runs, a crash leaves a whole one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from perilune.parallel.workers import Workers
from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import config as configs
from perilune.pretrain.checkpoint_files import CheckpointError

RENAMED = {  # a module's name -> its name in checkpoints, which is Megatron-core's
    "experts.w1": "experts.experts.linear_fc1.weight",
    "experts.w2": "experts.experts.linear_fc2.weight",
    "mtp_model_layer": "transformer_layer",
}


@pytest.fixture(scope="module")
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A one-process fp32 run after two steps: its checkpoint, its state dict and the loss of the step that follows."""
    return workers.run(1, ranks.train_and_save, ranks.config_of(), tmp_path_factory.mktemp("saved"))[0]


def tensors_of(path: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The whole global tensors of a checkpoint, put together by torch's own tool, which knows nothing of layouts."""
    out = tmp_path / f"{path.parent.name}.pt"
    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=True)


# --- bitwise ------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight_on_bitwise(workers: Workers, tmp_path: Path) -> None:
    configs = [
        ranks.config_of("bf16", ep=2),
        ranks.config_of("bf16", tp=2, zero1=False),
        ranks.config_of("fp32", pp=2, vpp=2),
        # The first stage has no experts, so nothing in their optimizer.
        ranks.config_of("bf16", pp=2, layers=2, layout="Et|tmL"),
    ]
    for results in workers.run(2, ranks.straight_and_resumed, configs, tmp_path):
        for config, result in zip(configs, results, strict=True):
            assert result["resumed"] == result["straight"], config.parallel
            assert result["new"]["weights"] != result["straight"]["at 2"]["weights"]
            assert all(result["straight"]["at 2"][key] != value for key, value in result["straight"]["at 4"].items())


def test_stages_of_unusual_content_resume_bitwise(workers: Workers, tmp_path: Path) -> None:
    """MTP's embedding lies behind a padded bucket in the last; a middle one holds nothing at all."""
    for world, layout in ((2, "Etttt|mL"), (3, "Ett||ttmL")):
        config = ranks.config_of("fp32", pp=world, layout=layout)
        for (result,) in workers.run(world, ranks.straight_and_resumed, [config], tmp_path / f"{world}"):
            assert result["resumed"] == result["straight"], layout


def test_the_file_holds_what_the_model_held(saved: dict[str, Any], tmp_path: Path) -> None:
    stored = tensors_of(saved["path"], tmp_path)
    weights = {name: value for name, value in stored.items() if not name.startswith("optimizer.")}
    state = {}
    for name, value in saved["state"].items():
        for module, key in RENAMED.items():
            name = name.replace(module, key)
        state[name] = value
    assert weights.keys() == state.keys() and any("expert_bias" in name for name in weights)
    assert all(torch.equal(weights[name], state[name]) for name in weights)
    learned = [name for name in weights if not name.endswith("expert_bias")]
    moments = {f"optimizer.state.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in learned}
    assert stored.keys() == weights.keys() | moments  # no second copy of fp32 weights as their own masters
    assert configs.load(saved["path"] / "config.yaml") == ranks.config_of()


@pytest.mark.parametrize("world", [1, 2])
def test_any_layout_loads_what_another_saved(
    world: int, saved: dict[str, Any], workers: Workers, tmp_path: Path
) -> None:
    if world == 2:
        source, loss = saved["path"], saved["loss"]
        layouts = [{"ep": 2}, {"tp": 2, "etp": 2}, {"pp": 2, "zero1": False}]
        configs = [ranks.config_of("fp32", **layout) for layout in layouts]
    else:
        first = workers.run(2, ranks.train_and_save, ranks.config_of("bf16", ep=2), tmp_path / "source")[0]
        source, loss = first["path"], first["loss"]
        configs = [ranks.config_of("bf16", zero1=zero1) for zero1 in (True, False)]
    expected = tensors_of(source, tmp_path)
    for config, again in zip(
        configs, workers.run(world, ranks.load_and_save_again, configs, source, tmp_path)[0], strict=True
    ):
        found = tensors_of(again["path"], tmp_path)
        assert found.keys() == expected.keys(), config.parallel
        assert all(torch.equal(found[name], expected[name]) for name in expected), config.parallel
        assert again["loss"] == pytest.approx(loss, rel=1e-6 if world == 2 else 1e-3)
    if world == 1:
        masters = [name for name in expected if name.startswith("optimizer.state.param.")]
        assert masters and all(expected[name].dtype is torch.float32 for name in masters)
        assert all(torch.equal(expected[n.split("param.", 1)[1]], expected[n].bfloat16()) for n in masters)


def test_init_from_takes_weights_only(saved: dict[str, Any], workers: Workers, tmp_path: Path) -> None:
    (found,) = workers.run(1, ranks.weights_only, saved["path"], tmp_path)
    for name, value in saved["state"].items():
        assert torch.equal(found["state"][name], value if name.endswith("expert_bias") else value.bfloat16())
    assert found["masters follow"]
    assert "weights only" in found["resume"] and "--init-from" in found["resume"]
    assert "float32 in it and" in found["cast"] and "precision.compute" in found["cast"]
    assert "it lacks 15 tensors" in found["other model"]
    assert "[64, 128] float32 in it and [32, 128] float32 here" in found["other model"]


# --- damage and malice --------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def zero(file: Path) -> None:
    data = file.read_bytes()
    at = len(data) // 3
    file.write_bytes(data[:at] + bytes(4096) + data[at + 4096 :])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped bit": flip,
    "4 KiB of zeros": zero,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 9),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", ".metadata", "config.yaml", "manifest.json"])
def test_damage_is_named(name: str, damage: str, saved: dict[str, Any], tmp_path: Path) -> None:
    path = shutil.copytree(saved["path"], tmp_path / "step_00000002")
    assert files.verify(path)["step"] == 2
    DAMAGE[damage](path / name)
    with pytest.raises(CheckpointError, match=name):
        files.verify(path)


def test_a_changed_number_in_the_manifest_is_damage(saved: dict[str, Any], tmp_path: Path) -> None:
    path = shutil.copytree(saved["path"], tmp_path / "step_00000002")
    text = (path / "manifest.json").read_text()
    assert text.count('"optimizer_step": 2') == 1
    (path / "manifest.json").write_text(text.replace('"optimizer_step": 2', '"optimizer_step": 3'))
    with pytest.raises(CheckpointError, match="SHA-256"):
        files.verify(path)


class Payload:
    """Pickled, it is an order to write a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def seal(path: Path) -> Path:
    """Make the manifest agree with the files again, as an attacker would."""
    body = json.loads((path / "manifest.json").read_text())
    names = [entry.name for entry in path.iterdir() if entry.name != "manifest.json"]
    body = {**body, "files": files.describe(path, names)}
    del body["format"], body["sha256"]
    files.write_manifest(path, body)
    assert files.verify(path)
    return path


def hostile(source: Path, folder: Path, mark: Path) -> dict[str, Path]:
    """Checkpoints whose hashes agree, each with something in it that should not be."""
    copies = {}

    def copy(name: str) -> tuple[Path, Metadata]:
        copies[name] = shutil.copytree(source, folder / name)
        return copies[name], FileSystemReader(source).read_metadata()

    path, _ = copy("pickle in metadata")
    (path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))

    path, metadata = copy("pickle behind bytes")  # torch's planner unpickles an entry that is called bytes
    index = next(iter(metadata.storage_data))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))

    path, metadata = copy("pickle for a tensor")
    blob = pickle.dumps(Payload(mark))
    place = metadata.storage_data[index]
    with open(path / place.relative_path, "r+b") as stream:
        stream.seek(place.offset)
        stream.write(blob)

    path, metadata = copy("other file")
    metadata.storage_data[index].relative_path = "../pickle in metadata/.metadata"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))

    path, metadata = copy("hole")
    metadata.state_dict_metadata[index.fqn].chunks.clear()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))

    path, _ = copy("common.pt")  # where older Megatron-core keeps what is no tensor; it would read it first
    torch.save({"optimizer": Payload(mark)}, path / "common.pt")
    return {name: seal(path) for name, path in copies.items()}


def test_nothing_hostile_runs_and_damage_stops_all_ranks(
    saved: dict[str, Any], workers: Workers, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    copies = hostile(saved["path"], tmp_path, mark)
    with pytest.raises(AttributeError):  # the payload works: torch's own reader runs it
        FileSystemReader(copies["pickle in metadata"]).read_metadata()
    assert mark.exists()
    mark.unlink()
    copies["damaged"] = shutil.copytree(saved["path"], tmp_path / "damaged")
    flip(copies["damaged"] / "__0_0.distcp")
    copies["none"] = tmp_path
    first, second = workers.run(2, ranks.loads, ranks.config_of(ep=2), list(copies.values()))
    assert first == second and not mark.exists()
    found = dict(zip(copies, first, strict=True))
    assert "builtins.exec" in found["pickle in metadata"] and ".metadata" in found["pickle in metadata"]
    assert "BytesStorageMetadata" in found["pickle behind bytes"]
    assert "failed on rank 0" in found["pickle for a tensor"]
    assert "'../pickle in metadata/.metadata', which is not in a file of the manifest" in found["other file"]
    assert "its parts 0" in found["hole"]
    assert found["common.pt"] == "not refused"  # nobody opens it
    assert str(copies["damaged"] / "__0_0.distcp") in found["damaged"]
    assert "no manifest.json" in found["none"]


def test_what_cannot_be_read_is_not_damaged(saved: dict[str, Any], workers: Workers, tmp_path: Path) -> None:
    """A launched run sets damage aside: a disk that does not answer must not cost a good checkpoint."""
    path = shutil.copytree(saved["path"], tmp_path / "step_00000002")
    for reads in workers.run(2, ranks.unreadable, path):
        assert reads["kinds"] == ["OSError", "OSError"] and "failed on rank 1: OSError" in reads["said"][0]
    flip(path / "config.yaml")  # the second rank's share
    for reads in workers.run(2, ranks.unreadable, path, 0):
        assert reads["kinds"] == ["DamagedCheckpoint", "OSError"] and "config.yaml is damaged" in reads["said"][0]


# --- failing and crashing while saving ----------------------------------------------------------------------------


def test_a_failure_on_one_rank_is_one_on_all_and_leaves_the_old(workers: Workers, tmp_path: Path) -> None:
    found = workers.run(2, ranks.failing_saves, ranks.config_of(ep=2), tmp_path)
    for rank in found:
        assert rank["first"] == rank["again"] == str(tmp_path / "step_00000001")
        assert "SaveError" in rank["shards"] and "rank 1" in rank["shards"], rank["shards"]
        assert "SaveError" in rank["manifest"] and "No space left" in rank["manifest"]
        assert rank["left"] == ["latest", "step_00000001"]
        assert "not the same on all ranks" in rank["ranks differ"]
        assert "TypeError" in rank["no JSON"] and "keys a" in rank["no JSON"]
        assert "another run's state" in rank["another run"]
        assert rank["second"] == str(tmp_path / "step_00000002")
    assert files.verify(tmp_path / "step_00000002")["layout"]["ep"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000002"]  # keep=1


def fake(folder: Path, step: int, keep: int = 0) -> Path:
    """A checkpoint without tensors, by the steps that `save` takes."""
    there, temporary = files.prepare(folder, step)
    if there is not None:
        return there
    (temporary / "__0_0.distcp").write_bytes(os.urandom(5000))
    body = {"step": step, "run_state": {"step": step}, "files": files.describe(temporary, ["__0_0.distcp"])}
    files.write_manifest(temporary, body)
    return files.commit(temporary, step, keep)


KILLED_AT = """
import os, signal, shutil, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
left = int(sys.argv[3])
def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
for module, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]:
    setattr(module, name, counted(getattr(module, name)))
import builtins, io
builtins.open = counted(builtins.open)
from perilune.pretrain import checkpoint_files as files
folder = Path(sys.argv[2])
_, temporary = files.prepare(folder, 3)
(temporary / "a").write_bytes(bytes(1000))
files.write_manifest(temporary, {"step": 3, "run_state": {}, "files": files.describe(temporary, ["a"])})
files.commit(temporary, 3, 1)
"""


def test_killed_at_any_point_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    ends, newest = [], []
    for point in range(100):
        folder = tmp_path / str(point)
        fake(folder, 1), fake(folder, 2)
        command = [sys.executable, "-c", KILLED_AT, str(Path(__file__).parent / "shared"), str(folder), str(point)]
        ends.append(subprocess.run(command, timeout=60, check=False).returncode)
        found = files.latest(folder)
        assert found is not None
        newest.append(files.verify(found)["step"])
        assert newest[-1] == int(found.name[-1])
        fake(folder, 4, keep=1)
        assert sorted(entry.name for entry in folder.iterdir()) == ["latest", "step_00000004"]
        if ends[-1] == 0:
            break
    assert ends[-1] == 0 and set(ends[:-1]) == {-signal.SIGKILL} and len(ends) > 10
    assert newest == sorted(newest) and {2, 3} == set(newest)  # 3 from its commit on


def test_latest_and_keep(tmp_path: Path) -> None:
    assert files.latest(tmp_path / "nothing") is None
    for step in (5, 900, 100_000_000, 7):  # the last one after a step back
        fake(tmp_path, step, keep=3)
    assert [path.name for path in files.committed(tmp_path)] == ["step_00000007", "step_00000900", "step_100000000"]
    assert (tmp_path / "latest").read_text() == "step_00000007\n"
    (tmp_path / "latest").write_text("step_00000008\n")  # points to nothing
    (tmp_path / "step_200000000").mkdir()  # without a manifest: not complete
    assert files.latest(tmp_path) == tmp_path / "step_100000000"
    fake(tmp_path, 8)  # keep=0: all
    assert len(files.committed(tmp_path)) == 4


def test_an_old_one_that_cannot_be_removed_ends_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # NFS keeps what somebody has open as .nfsXXXX

    fake(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        for step in (2, 3):
            assert files.verify(fake(tmp_path, step, keep=1))["step"] == step
            assert [path.name for path in files.committed(tmp_path)] == [f"step_{step:08d}"]
    assert "cannot be removed now" in caplog.text and list(tmp_path.glob(".step_*"))
    fake(tmp_path, 4, keep=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000004"]


def test_a_checkpoint_of_the_same_step_stays_unless_damaged(tmp_path: Path) -> None:
    path = fake(tmp_path, 3)
    before = (path / "manifest.json").read_bytes()
    assert fake(tmp_path, 3) == path and (path / "manifest.json").read_bytes() == before
    flip(path / "__0_0.distcp")
    fake(tmp_path, 3)
    assert files.verify(path) and (path / "manifest.json").read_bytes() != before
    fake(tmp_path, 4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]


@pytest.mark.parametrize("state", [{"a": float("nan")}, {"a": (1,)}, {"a": {1: 2}}, {"a": {1, 2}}])
def test_a_run_state_that_json_would_change_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        files.json_only(state)
    fine = {"a": [1, 2.5, "x", None, True, {"b": 1e-17}], "n": 2**70}
    assert files.json_only(fine) == fine


def test_shares_are_even_and_complete() -> None:
    sizes = {f"f{i}": i % 7 + 1 for i in range(40)}
    split = files.shares(sizes, 3)
    assert sorted(name for part in split for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in split]
    assert max(loads) - min(loads) <= 1
