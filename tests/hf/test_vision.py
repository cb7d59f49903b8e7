"""Models with a tower: Kimi-VL's and Kimi-K2.5's folders in and out, bit by bit, and as transformers reads them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import caption_ranks
import hf_folders as folders
import pytest
import torch

from perilune.parallel.workers import Workers
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import table, verify_images
from perilune.pretrain.hf.config import config_to_hf
from perilune.pretrain.hf.config_vision import Media, with_vision, without_vision
from perilune.pretrain.hf.export import export
from perilune.pretrain.hf.importing import import_hf
from perilune.pretrain.hf.source import Checkpoint
from perilune.pretrain.hf.verify import VerifyError, verify
from perilune.pretrain.schema import Vision
from perilune.vision.images import normalize

FORMATS = ("kimi_vl", "kimi_k25")
MODEL = replace(folders.TINY, q_lora_rank=None, rms_norm_eps=1e-5)  # as Moonlight
VISION = Vision(
    num_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=40, pos_emb_height=6, pos_emb_width=6
)
NEW = 12
MEDIA = Media(pad=500, start=501, end=502)


def write(folder: Path, names: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of random weights."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    text = config_to_hf(MODEL, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(with_vision(text, VISION, names, MEDIA)))
    tensors = {}
    for block in table.blocks(MODEL, VISION, names):
        values = folders.draw(block.theirs, block.shape, generator)
        if block.theirs.endswith("proj.weight") and len(block.shape) == 4:
            values = values / math.sqrt(14 * 3 * 14)
        tensors[block.theirs] = values if block.fp32 else values.to(dtype)
    folders.save(folder, tensors)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format's folder; the folder lies beside it."""
    home = tmp_path_factory.mktemp("vision")
    for names in FORMATS:
        import_hf(write(home / names, names), home / f"{names}_checkpoint")
    return {names: home / f"{names}_checkpoint" for names in FORMATS}


@pytest.mark.parametrize("names", FORMATS)
def test_bits_and_what_transformers_makes_of_them(
    names: str, imported: dict[str, Path], tmp_path: Path, pool: Workers
) -> None:
    said: list[str] = []
    checked = partial(verify, workers=pool, say=said.append)
    export(imported[names], tmp_path / "y", names=names, verified_by=checked)
    x, y = (folders.all_tensors(folder) for folder in (imported[names].with_name(names), tmp_path / "y"))
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert "two images" in said[0]
    card = (tmp_path / "y" / "README.md").read_text()
    assert "MoonViT, 2 layers" in card and "within" in card
    processor = json.loads((tmp_path / "y" / "preprocessor_config.json").read_text())
    assert processor["patch_size"] == 14 and processor["image_mean"] == [0.5] * 3
    other = FORMATS[1 - FORMATS.index(names)]
    export(imported[names], tmp_path / "z", names=other)
    z = folders.all_tensors(tmp_path / "z")
    assert len(z) == len(x) and z.keys() != x.keys()


def test_greedy_continuation_is_transformers(imported: dict[str, Path], tmp_path: Path, pool: Workers) -> None:
    """After a prompt with two images, from an export, from the other format's folder, and from the checkpoint."""
    from transformers import Kimi_K25ForConditionalGeneration

    export(imported["kimi_vl"], tmp_path / "y", names="kimi_k25")
    net = Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / "y", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    asked = verify_images.prompt(MODEL, VISION, MEDIA.pad)
    frames = torch.cat((torch.ones(2, 1, dtype=torch.int64), asked.grids), dim=1)
    ids = torch.tensor([asked.ids])
    theirs = net.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=normalize(asked.patches),
        image_grid_thw=frames, do_sample=False, max_new_tokens=NEW,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    for folder in (tmp_path / "y", imported["kimi_vl"].with_name("kimi_vl"), imported["kimi_vl"]):
        assert pool.run(1, caption_ranks.continued, folder, asked, NEW)[0] == theirs
    other = replace(asked, patches=asked.patches.flip(0))
    assert pool.run(1, caption_ranks.continued, tmp_path / "y", other, NEW)[0] != theirs  # they are looked at


def test_a_wrong_order_of_heads_is_seen(
    imported: dict[str, Path], tmp_path: Path, pool: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v as Megatron-core has them, head by head, would load without a word."""
    checked = partial(verify, workers=pool, say=lambda text: None)
    monkeypatch.setattr(table.Block, "to_theirs", lambda block, ours: ours.reshape(block.shape))
    with pytest.raises(VerifyError, match=r"wqkv\.weight is not what"):
        export(imported["kimi_k25"], tmp_path / "y", names="kimi_k25", verified_by=checked)
    assert not (tmp_path / "y").exists()


def test_the_names_are_the_published_ones() -> None:
    """335 tensors of tower and projector in the header of the published checkpoint."""
    big = Vision(num_layers=27)
    names = [block.theirs for block in table.blocks(MODEL, big) if not block.theirs.startswith("language_model.")]
    layer = "vision_tower.encoder.blocks.26."
    parts = ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")
    assert {name for name in names if name.startswith(layer)} == {
        f"{layer}{part}.{kind}" for part in parts for kind in ("weight", "bias")
    }
    rest = [name for name in names if "blocks" not in name]
    assert rest == [
        "vision_tower.patch_embed.proj.weight", "vision_tower.patch_embed.proj.bias",
        "vision_tower.patch_embed.pos_emb.weight", "vision_tower.encoder.final_layernorm.weight",
        "vision_tower.encoder.final_layernorm.bias", "multi_modal_projector.pre_norm.weight",
        "multi_modal_projector.pre_norm.bias", "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.bias",
    ]  # fmt: skip
    assert len(names) == 335
    shapes = {block.theirs: block.shape for block in table.blocks(replace(MODEL, hidden_size=2048), big)}
    assert shapes["vision_tower.patch_embed.proj.weight"] == (1152, 3, 14, 14)
    assert shapes["vision_tower.patch_embed.pos_emb.weight"] == (64, 64, 1152)
    assert shapes["multi_modal_projector.linear_2.weight"] == (2048, 4608)


def test_what_does_not_fit_is_one_line(imported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--format deepseek_v3: .* formats are kimi_vl, kimi_k25"):
        Checkpoint(imported["kimi_vl"], names="deepseek_v3")
    import_hf(folders.write(tmp_path / "text", folders.TINY), tmp_path / "text_checkpoint")
    with pytest.raises(InputError, match=r"--format kimi_vl: .* formats are deepseek_v3"):
        export(tmp_path / "text_checkpoint", tmp_path / "y", names="kimi_vl")
    with pytest.raises(InputError, match="leave its keys out"):
        import_hf(imported["kimi_vl"].with_name("kimi_vl"), tmp_path / "z", ["vision.num_layers=1"])
    assert not (tmp_path / "y").exists() and not (tmp_path / "z").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": ...}, "has no text_config and vision_config"),
        ({"media_placeholder_token_id": ...}, "no media_placeholder_token_id"),
        ({"vision_config": {"hidden_size": 24}}, "no num_hidden_layers"),
        ({"vision_config": {"merge_kernel_size": [1, 1]}}, "2 x 2 patches are merged here"),
    ],
)
def test_a_config_that_says_no_tower_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    x = write(tmp_path / "x", "kimi_vl")
    folders.edit(x / "config.json", **change)
    with pytest.raises(InputError, match=message):
        import_hf(x, tmp_path / "y")


def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    x = write(tmp_path / "x", "kimi_vl")
    held = folders.all_tensors(x)
    del held["vision_tower.encoder.blocks.1.wo.bias"]
    held["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
    folders.save(x, held)
    with pytest.raises(InputError, match=r"blocks\.1\.wo\.bias is missing.*linear_1\.bias .* is \[7\], by"):
        import_hf(x, tmp_path / "y")


@pytest.mark.parametrize(
    ("vision", "names", "message"),
    [
        (replace(VISION, layer_norm_eps=1e-6), "kimi_vl", "layer_norm_eps=1e-06"),
        (replace(VISION, rope_theta=5e3), "kimi_vl", "rope_theta=5000"),
        (replace(VISION, pos_emb_width=8), "kimi_k25", "square"),
    ],
)
def test_a_tower_that_readers_would_compute_otherwise_is_refused(vision: Vision, names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_vision(config_to_hf(MODEL), vision, names, MEDIA)
    with pytest.raises(InputError, match="placeholder"):
        with_vision(config_to_hf(MODEL), VISION, names, None)


@pytest.mark.parametrize(
    "tower",
    [
        {"merge_kernel_size": 2},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": {"rope_theta": True}},
    ],
)
def test_a_tower_described_by_other_types_is_refused(tower: dict[str, Any]) -> None:
    sizes = dict.fromkeys(
        "num_hidden_layers hidden_size num_attention_heads intermediate_size patch_size init_pos_emb_height "
        "init_pos_emb_width".split(),
        2,
    )
    raw = {"model_type": "kimi_vl", "text_config": {}, "media_placeholder_token_id": 1}
    assert without_vision({**raw, "vision_config": sizes})
    with pytest.raises(InputError, match="|".join(tower)):
        without_vision({**raw, "vision_config": sizes | tower})
