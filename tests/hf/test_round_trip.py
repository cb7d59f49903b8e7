"""transformers' folder -> checkpoint -> folder: the same bits, the same logits; and trained checkpoints, out and in."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import hf_folders as folders
import hf_ranks as ranks
import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

from perilune.parallel.workers import Workers
from perilune.pretrain import checkpoint_files as files
from perilune.pretrain import config as configs
from perilune.pretrain import presets
from perilune.pretrain.checkpoint_metadata import MASTER
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import verify as checks
from perilune.pretrain.hf.export import export
from perilune.pretrain.hf.importing import import_hf
from perilune.pretrain.hf.verify import VerifyError, transformers_logits, verify
from perilune.pretrain.schema import Config, Data, Model, Parallel, Precision

ROWS = [torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(3)).tolist()]


def same_tensors(a: Path, b: Path) -> None:
    """Names, types and bits."""
    x, y = folders.all_tensors(a), folders.all_tensors(b)
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


@pytest.mark.parametrize("name", folders.MODELS)
def test_bits_and_logits(name: str, tmp_path: Path, pool: Workers) -> None:
    model = folders.MODELS[name]
    x = folders.write(tmp_path / "x", model)
    import_hf(x, tmp_path / "checkpoint")
    said: list[str] = []
    export(tmp_path / "checkpoint", tmp_path / "y", verified_by=partial(verify, workers=pool, say=said.append))
    same_tensors(x, tmp_path / "y")
    depths = model.num_nextn_predict_layers if model.n_routed_experts else 0
    assert "largest difference" in said[1] and said[1].count("MTP") == depths
    assert ("not compared" in said[-1]) == (depths != model.num_nextn_predict_layers)


def test_moonlight_at_tiny_width(tmp_path: Path, pool: Workers) -> None:
    """Its own configuration but for widths and depth; bf16, the router bias too, and its stale inv_freq tensors."""
    model = replace(
        presets.get("moonlight_16b_a3b").model, num_layers=5, hidden_size=16, num_attention_heads=2, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=24, moe_intermediate_size=4,
        vocab_size=512,
    )  # fmt: skip
    x = folders.write(tmp_path / "x", model, torch.bfloat16)
    tensors = folders.all_tensors(x)
    exported = {k: v.float() if k.endswith("bias") else v for k, v in tensors.items()}
    tensors = {k: v.bfloat16() for k, v in tensors.items()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(5)}
    folders.save(x, tensors)
    folders.edit(x / "config.json", dtype=..., torch_dtype="bfloat16", rope_parameters=..., rope_theta=50000.0)
    said: list[str] = []
    import_hf(x, tmp_path / "checkpoint", say=said.append)
    assert "5 stale" in said[0]
    export(
        tmp_path / "checkpoint", tmp_path / "y", verified_by=partial(verify, workers=pool), max_shard_bytes=5 * 10**4
    )
    written = folders.all_tensors(tmp_path / "y")
    assert written.keys() == exported.keys()
    assert len(list((tmp_path / "y").glob("model-*.safetensors"))) > 2
    for name, tensor in written.items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)) and tensor.dtype == exported[name].dtype


def test_sharded_folder_of_transformers(tmp_path: Path) -> None:
    x = folders.write(tmp_path / "x", folders.TINY, max_shard_size="50KB")
    assert len(list(x.glob("*.safetensors"))) > 2
    import_hf(x, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "y")
    same_tensors(x, tmp_path / "y")


def test_routers_in_fp32_beside_bf16(tmp_path: Path, pool: Workers) -> None:
    """As transformers from 5.24 on loads and saves bf16 models; a router trained there is not bf16 any more."""
    x = folders.write(tmp_path / "x", folders.TINY, torch.bfloat16)
    tensors = folders.all_tensors(x)
    routers = [name for name in tensors if name.endswith("gate.weight")]
    tensors |= {name: tensors[name].float() + 1e-4 for name in routers}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("bias")}
    folders.save(x, tensors)
    import_hf(x, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "y", verified_by=partial(verify, workers=pool))
    same_tensors(x, tmp_path / "y")
    export(tmp_path / "checkpoint", tmp_path / "z", dtype="fp32")
    assert all(torch.equal(t, tensors[name].float()) for name, t in folders.all_tensors(tmp_path / "z").items())
    folders.save(x, tensors | {routers[0]: tensors[routers[0]].half()})
    with pytest.raises(ValueError, match=r"is of type F16, by config\.json BF16"):
        import_hf(x, tmp_path / "never")


def test_shards_are_bounded_and_aligned(tmp_path: Path) -> None:
    x = folders.write(tmp_path / "x", folders.MODELS["odd sizes"], torch.bfloat16)
    import_hf(x, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "y", max_shard_bytes=4000)
    index = json.loads((tmp_path / "y" / "model.safetensors.index.json").read_text())
    sizes: dict[str, list[int]] = {}
    for file in (tmp_path / "y").glob("*.safetensors"):
        head = file.read_bytes()
        length = int.from_bytes(head[:8], "little")
        header = json.loads(head[8 : 8 + length])
        header.pop("__metadata__")
        sizes[file.name] = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
        for entry in header.values():
            assert (8 + length + entry["data_offsets"][0]) % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0
        assert {k for k, v in index["weight_map"].items() if v == file.name} == header.keys()
    assert all(sum(held) <= 4000 or len(held) == 1 for held in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


# ---------------------------------------------------------------- FP8


@pytest.mark.parametrize("rows", [576, 192, 128])
def test_fp8_blocks_are_dequantised(rows: int, tmp_path: Path) -> None:
    """`kv_a_proj_with_mqa` has 576 rows in DeepSeek-V3; 192 is a head's; neither is a multiple of 128 x 2."""
    model = replace(folders.TINY, hidden_size=160, kv_lora_rank=rows - 8)
    x = folders.write(tmp_path / "x", model, torch.bfloat16)
    tensors = folders.all_tensors(x)
    expected = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj_with_mqa.weight") or n.endswith("down_proj.weight")]:
        shape = tensors[name].shape
        blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
        tensors[name] = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(blocks, generator=generator) + 0.5
        tensors[f"{name}_scale_inv"] = scale
        full = torch.kron(scale, torch.ones(128, 128))[: shape[0], : shape[1]]
        expected[name] = (tensors[name].float() * full).bfloat16()
    folders.save(x, tensors)
    folders.edit(x / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    import_hf(x, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "y")
    written = folders.all_tensors(tmp_path / "y")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "y/config.json").read_text())


# ---------------------------------------------------------------- trained checkpoints

MODEL = replace(
    folders.TINY, num_nextn_predict_layers=1, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
)


def trained(tmp_path: Path, pool: Workers, compute: str, **parallel: int) -> tuple[Config, Path]:
    config = Config(
        model=MODEL,
        data=Data(seq_len=64),
        precision=Precision(compute=compute),  # type: ignore[arg-type]
        parallel=Parallel(**parallel),  # type: ignore[arg-type]
    )
    run = tmp_path / "run"
    run.mkdir()
    configs.save(config, run / "config.yaml")
    pool.run(2, ranks.train, config, run)
    return config, run


def test_trained_with_tensor_parallelism(tmp_path: Path, pool: Workers) -> None:
    """Shards are put together as Megatron-core's own loading does it; `--init-from` gives the same model."""
    config, run = trained(tmp_path, pool, "fp32", tp=2, etp=2)  # parts of experts too
    export(run, tmp_path / "y", verified_by=partial(verify, workers=pool))
    theirs = transformers_logits(tmp_path / "y", MODEL, ROWS)[0]
    loaded = pool.run(1, ranks.logits_of, config, run / "checkpoints" / "step_00000002", ROWS)[0][0]
    torch.testing.assert_close(loaded[0], theirs[0], atol=1e-5, rtol=0)
    import_hf(tmp_path / "y", tmp_path / "again")
    again = pool.run(1, ranks.logits_of, config, tmp_path / "again", ROWS)[0][0]
    assert torch.equal(again, loaded)
    moved = shutil.move(run / "checkpoints" / "step_00000002", tmp_path / "moved")
    export(moved, tmp_path / "z")
    same_tensors(tmp_path / "y", tmp_path / "z")
    assert "# moved, step 2" in (tmp_path / "z" / "README.md").read_text()
    card = (tmp_path / "y" / "README.md").read_text()
    assert "| Tokens trained | 128 |" in card and "| Steps | 2 |" in card and "| Verified | logits equal" in card


@pytest.mark.parametrize("masters", [False, True])
def test_bf16_run_gives_its_weights_or_its_masters(
    masters: bool, tmp_path: Path, pool: Workers, trained_bf16: Callable[[], tuple[Config, Path]]
) -> None:
    config, run = trained_bf16()
    export(run, tmp_path / "y", dtype="fp32" if masters else None)
    dtype = torch.float32 if masters else torch.bfloat16
    for name, tensor in folders.all_tensors(tmp_path / "y").items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else dtype)
    theirs = transformers_logits(tmp_path / "y", MODEL, ROWS)[0]
    path = run / "checkpoints" / "step_00000002"
    loaded = pool.run(1, ranks.logits_of, config, path, ROWS, masters)[0][0]
    torch.testing.assert_close(loaded[0], theirs[0], atol=1e-5, rtol=0)
    if masters:
        rounded = pool.run(1, ranks.logits_of, config, path, ROWS)[0][0]
        assert float((rounded - loaded).abs().max()) > 1e-4  # else the test could not tell


def test_a_master_that_is_absent(tmp_path: Path, trained_bf16: Callable[[], tuple[Config, Path]]) -> None:
    """Of what was trained it is missed; what was frozen never had one, and costs the others none of theirs."""
    config, run = trained_bf16()
    step = shutil.copytree(run / "checkpoints" / "step_00000002", tmp_path / "step")
    metadata = FileSystemReader(step).read_metadata()
    for index in [at for at in metadata.storage_data if at.fqn == MASTER + "output_layer.weight"]:
        del metadata.storage_data[index]
    del metadata.state_dict_metadata[MASTER + "output_layer.weight"]
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    _forge(step, config)
    export(step, tmp_path / "bf16")
    with pytest.raises(InputError, match=r"none of 1 that were trained, output_layer\.weight among them"):
        export(step, tmp_path / "y", dtype="fp32")
    _forge(step, replace(config, train=replace(config.train, freeze=("language_model",))))
    export(step, tmp_path / "y", dtype="fp32")
    export(run, tmp_path / "whole", dtype="fp32")
    own = {"lm_head.weight", "model.layers.3.shared_head.head.weight"}
    whole, bf16 = folders.all_tensors(tmp_path / "whole"), folders.all_tensors(tmp_path / "bf16")
    for name, tensor in folders.all_tensors(tmp_path / "y").items():
        assert torch.equal(tensor, bf16[name].float() if name in own else whole[name]), name
    card = (tmp_path / "y" / "README.md").read_text()
    assert "the masters of the bfloat16 weights; what was frozen (language_model) cast" in card


@pytest.fixture(scope="module")
def trained_bf16(tmp_path_factory: pytest.TempPathFactory, pool: Workers) -> Callable[[], tuple[Config, Path]]:
    made = trained(tmp_path_factory.mktemp("bf16"), pool, "bf16", ep=2)
    return lambda: made


# ---------------------------------------------------------------- verification


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("imported")
    return import_hf(folders.write(home / "x", folders.MODELS["mtp 1"]), home / "checkpoint")


def _other(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = folders.all_tensors(folder)
    change(tensors)
    folders.save(folder, tensors)


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.0.mlp.{side}_proj.weight" for side in ("gate", "up"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


DAMAGE = {
    "another scaling factor": (lambda f: folders.edit(f / "config.json", routed_scaling_factor=2.0), "logits differ"),
    "another eps": (lambda f: folders.edit(f / "config.json", rms_norm_eps=1e-2), "logits differ"),
    "gate and up exchanged": (lambda f: _other(f, _swap), "is not what"),
    "a layer less": (lambda f: _other(f, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight")), "was not written"),
    "a tensor more": (lambda f: _other(f, lambda t: t.update(more=torch.ones(1))), "belong to no model"),
    "an MTP layer less": (lambda f: _other(f, lambda t: t.pop("model.layers.3.eh_proj.weight")), "was not written"),
    "a layer more in config.json": (lambda f: folders.edit(f / "config.json", num_hidden_layers=4), "says 4 layers"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verification_refuses(name: str, tmp_path: Path, pool: Workers, imported: Path) -> None:
    """And an export that fails it never gets its name."""
    damage, message = DAMAGE[name]

    def verified(folder: Path, *rest: object) -> str:
        damage(folder)
        return verify(folder, *rest, workers=pool)  # type: ignore[arg-type]

    with pytest.raises(VerifyError, match=message):
        export(imported, tmp_path / "y", verified_by=verified)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_that_holds_nan_is_told_so(dtype: str, tmp_path: Path, imported: Path) -> None:
    step = shutil.copytree(imported, tmp_path / "step")
    export(step, tmp_path / "good")
    norm = folders.all_tensors(tmp_path / "good")["model.norm.weight"].numpy()
    bad = norm.copy()
    bad.view("uint32")[3:5] = 0x7F800001, 0xFFC12345  # which numpy and torch need not cast to the same bits
    for file in step.glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(norm.tobytes(), bad.tobytes()))
    _forge(step, configs.load(step / "config.yaml"))
    with pytest.raises(VerifyError, match=r"own weights hold NaN in model\.norm\.weight: its logits cannot"):
        export(step, tmp_path / "y", dtype=dtype, verified_by=verify)


def test_what_is_compared_bit_by_bit() -> None:
    zero, nan = torch.zeros(2), torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32)
    assert checks._same(nan, other, cast=True) and not checks._same(nan, other, cast=False)
    for cast in (True, False):
        assert checks._same(zero, zero, cast) and not checks._same(zero, -zero, cast)
        assert not checks._same(nan, zero, cast) and not checks._same(zero, nan, cast)


@pytest.mark.parametrize("kind", ["missing", "mismatched"])
def test_transformers_complaints_are_heard(kind: str, tmp_path: Path) -> None:
    x = folders.write(tmp_path / "x", folders.TINY)
    name = "model.layers.1.self_attn.o_proj.weight"
    _other(x, lambda t: t.pop(name) if kind == "missing" else t.update({name: t[name][:-1]}))
    with pytest.raises(VerifyError, match=rf"{kind}.*{re.escape(name)}"):
        transformers_logits(x, folders.TINY, ROWS)


def test_safetensors_reads_what_we_write(tmp_path: Path, imported: Path) -> None:
    export(imported, tmp_path / "y")
    with safe_open(tmp_path / "y/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_model_that_transformers_computes_otherwise_is_refused(tmp_path: Path, imported: Path) -> None:
    for key, value, reason in (
        ("latent_norm_eps", 1e-5, "latent_norm_eps"),
        ("num_experts_per_tok", 4, "K/M = 4/1"),
    ):
        model: Model = replace(
            folders.MODELS["mtp 1"], n_group=2 if key == "num_experts_per_tok" else 1, **{key: value}
        )
        other = tmp_path / key
        shutil.copytree(imported, other)
        _forge(other, Config(model=model))
        with pytest.raises(ValueError, match=reason):
            export(other, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def _forge(checkpoint: Path, config: Config) -> None:
    """Another configuration into a checkpoint, with a manifest that fits what lies there."""
    body = files.read_manifest(checkpoint)
    configs.save(config, checkpoint / "config.yaml")
    body["files"] = files.describe(checkpoint, body["files"])
    body.pop("format")
    files.write_manifest(checkpoint, body)
