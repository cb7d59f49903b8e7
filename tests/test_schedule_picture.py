"""What `train --dry-run --plot` draws: the numbers that training itself uses, and only panels that say something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset
from PIL import Image

from perilune.pretrain import config as configs
from perilune.pretrain import presets
from perilune.pretrain.data.shard import RowImage
from perilune.pretrain.schedule_picture import draw, panels_of
from perilune.pretrain.schema import Config
from perilune.pretrain.timetable import Timetable
from perilune.vision.image_header import ImageRule


def panels(config: Config, dp: int = 1) -> tuple[list[int], dict[str, Any]]:
    at, found = panels_of(config, dp)
    return at, {panel.what: panel for panel in found}


def test_deepseek_v3_as_published() -> None:
    """arXiv 2412.19437, section 4.2."""
    at, found = panels(presets.get("deepseek_v3"), 64)
    assert list(found) == ["learning rate", "tokens a batch, millions", "router-bias speed", "weight of the MTP loss"]
    of = {name: dict(zip(at, panel.lines[""], strict=True)) for name, panel in found.items()}
    assert at[0] == 0 and at[-1] == 14_800_000_000_000 and at == sorted(set(at))
    mtp, bias = of["weight of the MTP loss"], of["router-bias speed"]
    assert (mtp[10 * 10**12 - 1], mtp[10 * 10**12]) == (0.3, 0.1), "a jump is one token wide"
    assert (bias[14_300_000_000_000 - 1], bias[14_300_000_000_000]) == (1e-3, 0)
    assert max(of["learning rate"].values()) == 2.2e-4 and of["learning rate"][at[-1]] == pytest.approx(7.3e-6)
    assert of["learning rate"][14_633_000_000_000 - 1] == pytest.approx(2.2e-5), "the tail is a jump, too"
    rows = of["tokens a batch, millions"]
    assert (rows[0], rows[at[-1]]) == pytest.approx((3072 * 4096 / 1e6, 15360 * 4096 / 1e6))


def test_they_are_the_timetables(tmp_path: Path) -> None:
    words = ["schedule.lr=multistep", "train.batch_ramp_tokens=4000", "train.batch_ramp_start=2", "train.steps=40"]
    config = configs.resolve("tiny", words)
    at, found = panels(config)
    plan = Timetable(config, 1)
    tokens = 0
    while tokens < plan.total_tokens:
        todo = plan.at(tokens)
        near = [i for i, t in enumerate(at) if abs(t - tokens) <= 25]
        for name, value in (
            ("tokens a batch", todo.rows * 64), ("router-bias speed", todo.bias_speed),
            ("weight of the MTP loss", todo.mtp_weight),
        ):  # fmt: skip
            assert value in [found[name].lines[""][i] for i in near]
        after = np.interp(tokens + todo.rows * 64, at, found["learning rate"].lines[""])
        assert after == pytest.approx(todo.lr, rel=0.02)
        tokens += todo.rows * 64
    plain = replace(config, model=replace(config.model, num_nextn_predict_layers=0))
    assert "weight of the MTP loss" not in panels(plain)[1]


def test_a_blend_has_its_parts_and_images_theirs(tmp_path: Path) -> None:
    rule = ImageRule(placeholder_id=500, patch_size=14, merge_size=2, patch_limit=64)
    pieces = packed_lengths(lognormal_lengths(40, median=20), 64)
    for name in ("text", "images"):
        rows = list(random_rows(pieces, 500))
        if name == "images":  # a quarter of each row
            rows = [replace(row, images=(RowImage(b"-", "png", 0, 16, (8, 8)),)) for row in rows]
        write_dataset(tmp_path / name, rows, 64, 512, images=rule if name == "images" else None)
    blend = f"data.blend={{{tmp_path}/text: {{0: 1.0, 5120: 0.25}}, {tmp_path}/images: {{5120: 0.75}}}}"
    config = configs.resolve("tiny", [blend])
    at, found = panels(config)
    parts = {name: dict(zip(at, line, strict=True)) for name, line in found["part of the data"].lines.items()}
    assert list(parts) == ["text", "images"]
    assert (parts["text"][5119], parts["text"][5120]) == (1.0, 0.25)
    assert all(parts["text"][t] + parts["images"][t] == 1 for t in at)
    assert list(found)[-1] == "part of the tokens"
    images = dict(zip(at, found["part of the tokens"].lines["images"], strict=True))
    assert (images[0], images[at[-1]]) == pytest.approx((0, 0.75 * 16 / 64))
    file = tmp_path / "s.png"
    assert draw(config, 1, file) == list(found)
    with Image.open(file) as picture:
        assert picture.size[0] > 700 and picture.size[1] > 700
        assert len(set(picture.convert("L").resize((60, 60)).tobytes())) > 5, "not blank"


def test_the_command(perilune: Any, tmp_path: Path) -> None:
    words = ["train", "tiny", "valid.every=0"]
    done = perilune(*words, "--dry-run", "--plot", "s.png")
    assert done.returncode == 0 and done.stdout.endswith(
        "s.png: learning rate, router-bias speed, weight of the MTP loss\n"
    )
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "goes with --dry-run" in perilune(*words, "--plot", "s.png").stderr
    bad = perilune(*words, "--dry-run", "--plot", "nowhere.xyz")
    assert bad.returncode == 2 and "cannot be written" in bad.stderr
    nowhere = perilune(*words, "--dry-run", "--plot", "absent/s.png")
    assert nowhere.returncode == 2 and "there is no folder absent" in nowhere.stderr
    assert not (tmp_path / "absent").exists()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from perilune.pretrain import schedule_picture
    from perilune.pretrain.errors import InputError

    monkeypatch.setattr(schedule_picture.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[scaling\]'"):
        draw(presets.get("tiny"), 1, tmp_path / "s.png")
