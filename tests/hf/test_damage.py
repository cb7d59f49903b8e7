"""Folders and checkpoints with planted damage: a loud error that names it, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_folders as folders
import numpy as np
import pytest
import torch

from perilune.pretrain import checkpoint_files
from perilune.pretrain import config as configs
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf.export import export
from perilune.pretrain.hf.importing import import_hf
from perilune.pretrain.hf.shards import ShardWriter, parse_size
from perilune.pretrain.schema import Config

MODEL = replace(folders.MODELS["mtp 1"], num_layers=2, n_routed_experts=4)
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("good") / "x", MODEL)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = replace(MODEL, num_nextn_predict_layers=0)
    return folders.write(tmp_path_factory.mktemp("sharded") / "x", model, max_shard_size="30KB")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Path:
    return import_hf(good, tmp_path_factory.mktemp("checkpoint") / "step")


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = folders.all_tensors(folder)
        change(held)
        folders.save(folder, held)

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: folders.edit(folder / "config.json", **changes)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({name: make(held[name])}))


def fp8(scale: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[O_PROJ] = held[O_PROJ].to(torch.float8_e4m3fn)
        if scale is not None:
            held[f"{O_PROJ}_scale_inv"] = torch.ones(scale, dtype=dtype)

    return tensors(change)


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [damage(folder) for damage in damages] and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - size)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SINGLE = "model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (tensors(lambda held: held.pop(EXPERT)), f"{EXPERT} is missing"),
    "a whole layer missing": (
        tensors(lambda held: [held.pop(k) for k in list(held) if k.startswith("model.layers.1.")]), "more"
    ),
    "router bias missing": (
        tensors(lambda held: held.pop("model.layers.1.mlp.gate.e_score_correction_bias")), "correction_bias is missing"
    ),
    "MTP missing": (
        tensors(lambda held: [held.pop(k) for k in list(held) if k.startswith("model.layers.2.")]),
        "model.num_nextn_predict_layers=0 imports without",
    ),
    "extra": (tensors(lambda held: held.update({"model.layers.9.x": torch.ones(2)})), "model.layers.9.x (model.safe"),
    "extra expert": (
        tensors(lambda held: held.update({EXPERT.replace(".2.", ".4."): held[EXPERT]})), "experts.4.down_proj"
    ),
    "scales without FP8": (
        tensors(lambda held: held.update({f"{O_PROJ}_scale_inv": torch.ones(1, 1)})), f"{O_PROJ}_scale_inv"
    ),
    "transposed": (put("model.layers.1.self_attn.q_a_proj.weight", lambda t: t.T.clone()), "is [32, 16], by config"),
    "a row less": (put("lm_head.weight", lambda t: t[:-1]), "is [511, 32], by config.json [512, 32]"),
    "flat": (put(O_PROJ, lambda t: t.flatten()), f"{O_PROJ} ({SINGLE}) is [2048]"),
    "fp16": (put(O_PROJ, lambda t: t.half()), f"{O_PROJ} ({SINGLE}) is of type F16, by config.json F32"),
    "bf16 among fp32": (put(O_PROJ, lambda t: t.bfloat16()), "is of type BF16, by config.json F32"),
    "integers": (put(O_PROJ, lambda t: t.int()), "is of type I32"),
    "not finite": (put(EXPERT, with_nan), f"{EXPERT} holds values that are not finite"),
    "MTP's head is another": (
        put("model.layers.2.shared_head.head.weight", lambda t: t + 1), "head.weight is not a copy of lm_head"
    ),
    "MTP's embedding is another": (put("model.layers.2.embed_tokens.weight", lambda t: -t), "is not a copy of model"),
    "FP8 unannounced": (fp8((1, 1)), "no quantization_config"),
    "FP8 without scales": (both(fp8(None), config(quantization_config=FP8)), f"{O_PROJ}_scale_inv is missing"),
    "FP8 scales misshapen": (both(fp8((2, 1)), config(quantization_config=FP8)), "is [2, 1] F32, must be [1, 1] F32"),
    "FP8 scales mistyped": (both(fp8((1, 1), torch.bfloat16), config(quantization_config=FP8)), "[1, 1] BF16, must be"),
    "another quantization": (config(quantization_config={"quant_method": "awq"}), "'awq'"),
    "truncated": (cut(SINGLE, 64), f"{SINGLE} is truncated or damaged"),
    "truncated in the header": (lambda f: os.truncate(f / SINGLE, 100), f"{SINGLE} is truncated or damaged"),
    "empty": (lambda f: os.truncate(f / SINGLE, 0), f"{SINGLE} is truncated or damaged"),
    "bytes behind the end": (lambda f: (f / SINGLE).open("ab").write(b"0" * 8) and None, "is truncated or damaged"),
    "no tensors": (lambda f: (f / SINGLE).unlink(), "holds neither"),
    "pickle": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin") and None, "pytorch_model.bin is a pickle"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config cut": (cut("config.json", 9), "config.json is not JSON"),
    "config a folder": (
        both(lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").mkdir()),
        "config.json cannot be read",
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]") and None, "holds a list"),
    "a layer more said": (config(num_hidden_layers=3), "is missing"),
    "far too many layers said": (config(num_hidden_layers=3 * 10**8), "by config.json it has"),
    "far too many experts said": (config(n_routed_experts=10**9), "by config.json it has"),
    "a list for a kind": (config(model_type=[]), "model_type"),
    "an expert less said": (config(n_routed_experts=3), "experts.3."),
    "another width said": (config(hidden_size=64), "by config.json [512, 64]"),
    "another type said": (config(dtype="bfloat16"), "is of type F32, by config.json BF16"),
    "no type said": (config(dtype=...), "names no dtype"),
    "float16 said": (config(dtype="float16"), "names float16"),
    "types in a list": (config(dtype=["float32"]), "names ['float32']"),
    "no base of RoPE": (config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "model.rope_theta=0.0"),
    "negative eps": (config(rms_norm_eps=-1e-6), "rms_norm_eps=-1e-06"),
    "two types said": (config(torch_dtype="bfloat16"), "bfloat16 and float32"),
    "a rule not built": (config(norm_topk_prob=False), "norm_topk_prob"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name: str, tmp_path: Path, good: Path) -> None:
    damage, message = DAMAGE[name]
    x = shutil.copytree(good, tmp_path / "x")
    damage(x)
    with pytest.raises(InputError, match=re.escape(message)):
        import_hf(x, tmp_path / "out" / "checkpoint")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def index(change: Callable[[dict[str, str], Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        tree = json.loads(path.read_text())
        change(tree["weight_map"], folder)
        path.write_text(json.dumps(tree))

    return damage


INDEX: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file is gone": (index(lambda m, f: (f / m[O_PROJ]).unlink()), "is missing; model.safetensors.index.json"),
    "a file is cut": (index(lambda m, f: cut(m[O_PROJ], 8)(f)), "is truncated or damaged"),
    "points elsewhere": (index(lambda m, f: m.update({O_PROJ: m["lm_head.weight"]})), f"lacks {O_PROJ}|says is in"),
    "unlisted": (index(lambda m, f: m.pop(O_PROJ)), f"holds {O_PROJ}, which .* does not list"),
    "listed only": (index(lambda m, f: m.update(more=m[O_PROJ])), "lacks more"),
    "out of the folder": (index(lambda m, f: m.update({O_PROJ: "../x/model.safetensors"})), "not the plain name"),
    "a pickle listed": (index(lambda m, f: m.update({O_PROJ: "a.bin"})), "not the plain name of a safetensors file"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}") and None, "no weight_map"),
    "both layouts": (lambda f: ((f / SINGLE).write_bytes(b"") and None) or (f / SINGLE).touch(), "which of the two"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX)
def test_a_damaged_index_is_refused(name: str, tmp_path: Path, sharded: Path) -> None:
    damage, message = INDEX[name]
    x = shutil.copytree(sharded, tmp_path / "x")
    damage(x)
    with pytest.raises(InputError, match=message):
        import_hf(x, tmp_path / "checkpoint")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_nothing_is_written_over(tmp_path: Path, good: Path, checkpoint: Path) -> None:
    (tmp_path / "there").mkdir()
    for run in (lambda: import_hf(good, tmp_path / "there"), lambda: export(checkpoint, tmp_path / "there")):
        with pytest.raises(InputError, match="never written over"):
            run()
    assert not list((tmp_path / "there").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_overrides(tmp_path: Path, good: Path) -> None:
    """Keys change the configuration, not the tensors; MTP can be left out; a shape that does not fit is refused."""
    said: list[str] = []
    path = import_hf(
        good, tmp_path / "a", ["model.num_nextn_predict_layers=0", "model.seq_aux_loss_alpha=0.5", "optim.lr=1e-5"],
        say=said.append,
    )  # fmt: skip
    kept = configs.load(path / "config.yaml")
    assert (kept.model.num_nextn_predict_layers, kept.model.seq_aux_loss_alpha, kept.optim.lr) == (0, 0.5, 1e-5)
    assert "tensors of MTP layers left out" in said[0]
    text = (path / "config.yaml").read_text()
    assert "preset" not in text and "seq_len" not in text  # so that any preset takes it by --config
    with pytest.raises(InputError, match="unknown key"):
        import_hf(good, tmp_path / "b", ["model.layers=1"])
    with pytest.raises(InputError, match=r"by config\.json"):
        import_hf(good, tmp_path / "b", ["model.moe_intermediate_size=8"])


def test_interrupted(tmp_path: Path, good: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way through, by an error or Ctrl-C: no folder; and none of that name while it is written."""
    seen = []
    put = ShardWriter.put

    def stop(self: ShardWriter, name: str, tensor: np.ndarray) -> None:
        seen.append((tmp_path / "y").exists())
        if len(seen) > 20:
            raise KeyboardInterrupt
        put(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "y")
    assert len(seen) == 21 and not any(seen) and list(tmp_path.iterdir()) == []


def test_nobody_waits_for_hashes_of_an_export_that_has_ended(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_CHUNK", 16)
    hashed: list[bool] = []
    check = checkpoint_files.check_files

    def slow(path: Path, manifest: dict[str, Any], names: Any, stop: Any = None) -> None:
        if stop is not None:
            stop.wait(60)
        check(path, manifest, names, stop)
        hashed.append(stop is not None)

    monkeypatch.setattr(checkpoint_files, "check_files", slow)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        monkeypatch.setattr(ShardWriter, "put", lambda *_, error=error: (_ for _ in ()).throw(error))
        began = time.monotonic()
        with pytest.raises((KeyboardInterrupt, InputError)):
            export(checkpoint, tmp_path / "y")
        assert time.monotonic() - began < 30 and True not in hashed


def test_a_name_without_room_for_the_hidden_one_is_refused(tmp_path: Path, good: Path, checkpoint: Path) -> None:
    for run in (lambda out: import_hf(good, out), lambda out: export(checkpoint, out)):
        for length in (238, 300):
            with pytest.raises(InputError, match=f"a name of {length} bytes"):
                run(tmp_path / ("n" * length))
    export(checkpoint, tmp_path / ("n" * 237))


def test_a_full_disk_is_one_sentence(tmp_path: Path, good: Path, checkpoint: Path) -> None:
    """The limit on the size of a file stands for it; torch's writer answers with an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, before[1]))
    try:
        for run in (lambda: import_hf(good, tmp_path / "y"), lambda: export(checkpoint, tmp_path / "y")):
            with pytest.raises(InputError, match=r"y was not written: File too large; make room"):
                run()
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------- damaged checkpoints


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _config(path: Path, **changes: Any) -> None:
    body = checkpoint_files.read_manifest(path)
    configs.save(Config(model=replace(MODEL, **changes)), path / "config.yaml")
    body["files"] |= checkpoint_files.describe(path, ["config.yaml"])
    body.pop("format")
    checkpoint_files.write_manifest(path, body)


def _unlisted(path: Path) -> None:
    body = checkpoint_files.read_manifest(path)
    body["files"].pop("config.yaml")
    body.pop("format")
    checkpoint_files.write_manifest(path, body)


def _packed(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "perilune-packed", "format_version": 1}')


def _sealed(path: Path, **changes: Any) -> None:
    body = checkpoint_files.read_manifest(path) | changes
    body.pop("format")
    checkpoint_files.write_manifest(path, body)


CHECKPOINT: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit": (lambda p: _flip(p / "__0_0.distcp"), "SHA-256"),
    "one bit of metadata": (lambda p: _flip(p / ".metadata"), "SHA-256"),
    "one bit of the configuration": (lambda p: _flip(p / "config.yaml"), "SHA-256"),
    "the configuration gone": (lambda p: (p / "config.yaml").unlink(), "config.yaml is missing"),
    "no configuration listed": (lambda p: _unlisted(p), "its manifest lists no config.yaml"),
    "a packed dataset": (lambda p: _packed(p), "is no checkpoint: its manifest.json is of the format perilune-packed"),
    "cut": (lambda p: os.truncate(p / "__0_0.distcp", 1000), "has 1000 bytes"),
    "a file less": (lambda p: (p / "__0_0.distcp").unlink(), "is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "neither a run"),
    "a step in words": (lambda p: _sealed(p, step="2"), "step absent or of another type"),
    "a list of a run's state": (lambda p: _sealed(p, run_state=[]), "run_state absent"),
    "a list of versions": (lambda p: _sealed(p, versions=[]), "versions absent"),
    "a list of files": (lambda p: _sealed(p, files=["a"]), "files absent"),
    "a size in words": (lambda p: _sealed(p, files={"a": {"bytes": "1", "sha256": ""}}), "files.a absent"),
    "a layer more": (lambda p: _config(p, num_layers=3), "it lacks"),
    "far too many layers": (lambda p: _config(p, num_layers=3 * 10**8), "tensors and more, and all of its files"),
    "far too many experts": (lambda p: _config(p, n_routed_experts=10**9), "tensors and more, and all of its files"),
    "a layer less": (lambda p: _config(p, num_layers=1, n_routed_experts=0), "which this model has not"),
    "wider": (lambda p: _config(p, vocab_size=513), "by the configuration [513, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint_is_refused(name: str, tmp_path: Path, checkpoint: Path) -> None:
    damage, message = CHECKPOINT[name]
    path = shutil.copytree(checkpoint, tmp_path / "step")
    damage(path)
    with pytest.raises(InputError, match=re.escape(message)):
        export(path, tmp_path / "y")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]


# ---------------------------------------------------------------- memory, sizes


def _anonymous() -> int:
    """Bytes of this process's memory that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _peak_growth(run: Callable[[], Any]) -> int:
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def test_memory_is_a_few_tensors_not_the_model(tmp_path: Path) -> None:
    model = replace(
        folders.TINY, n_routed_experts=0, num_layers=12, first_k_dense_replace=12, hidden_size=256,
        intermediate_size=2048, vocab_size=256,
    )  # fmt: skip
    x = folders.write(tmp_path / "x", model)
    largest, whole = 2 * 2048 * 256 * 4, (x / SINGLE).stat().st_size
    assert whole > 12 * largest
    growth = _peak_growth(lambda: import_hf(x, tmp_path / "checkpoint"))
    assert growth < 6 * largest
    growth = _peak_growth(lambda: export(tmp_path / "checkpoint", tmp_path / "y"))
    assert growth < 6 * largest


def test_memory_is_a_few_experts_not_a_layer_of_them(tmp_path: Path) -> None:
    model = replace(folders.TINY, n_routed_experts=64, hidden_size=128, moe_intermediate_size=128, vocab_size=256)
    layer = 64 * 2 * 128 * 128 * 4
    x = folders.write(tmp_path / "x", model)
    assert _peak_growth(lambda: import_hf(x, tmp_path / "checkpoint")) < layer / 2
    assert _peak_growth(lambda: export(tmp_path / "checkpoint", tmp_path / "y")) < layer / 2


def test_shard_sizes_in_words() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5GiB") == 3 * 2**29 and parse_size("200 mb") == 2 * 10**8
    for wrong in ("5", "GB", "-1GB", "5TBB", "0KB", "9" * 400 + "GB"):
        with pytest.raises(InputError, match="max-shard-size"):
            parse_size(wrong)
