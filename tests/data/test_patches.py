"""Images of rows become patches of batches: the same by any processes, at their placeholders, or the row's damage."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_rows import write_dataset
from PIL import Image

from perilune.pretrain import schema
from perilune.pretrain.data import images as row_images
from perilune.pretrain.data.batch import PackedBatch
from perilune.pretrain.data.inspect_verify import verify
from perilune.pretrain.data.manifest import image_rule, read_manifest
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row, RowImage
from perilune.pretrain.data.storage import open_store
from perilune.pretrain.data.stream import Stream, open_stream, valid_batches
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import ImageRule
from perilune.vision.images import cut, decode

SEQ_LEN = 64
TOWER = schema.Vision(num_layers=1)
RULE = ImageRule(placeholder_id=7)


def picture(number: int) -> bytes:
    """A picture of its own size, colours, kind and orientation."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (20 + number % 50, 90 - number % 70, 3), np.uint8))
    kind = ("PNG", "JPEG", "WEBP")[number % 3]
    if number % 5 == 1 and kind != "JPEG":
        image.putalpha(Image.new("L", image.size, 99))
    exif = Image.Exif()
    exif[0x0112] = 1 + number % 8
    out = io.BytesIO()
    image.save(out, kind, exif=exif)
    return out.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """Rows of none to several images, of a patch limit that scales some down."""
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(folder / "a.tar", "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for i in range(40):
            if i % 4 == 3:
                add(f"{i:02d}.txt", f"words alone, {i} of them. ".encode() * 12)
                continue
            shown = list(range(3 * i, 3 * i + 1 + i % 3))
            for number in shown:
                add(f"{i:02d}.{number}.png", picture(number))
            lists = {"texts": [f"text {i}", *[None] * len(shown)], "images": [None, *(f"{n}.png" for n in shown)]}
            add(f"{i:02d}.json", json.dumps(lists).encode())
    pack([str(folder / "a.tar")], folder / "data", tokenizer_path, SEQ_LEN, rows_per_shard=7, patch_limit=16)
    return folder / "data"


def open_one(path: Path, workers: int = 0, vision: schema.Vision | None = TOWER, **keys: Any) -> Stream:
    data = schema.Data(path=str(path), seq_len=SEQ_LEN, workers=workers, **keys)
    return open_stream(data, 1, depth=1, vision=vision)


def epoch(stream: Stream, rows: int, micro: int) -> list[PackedBatch]:
    state, batches = stream.initial_state(), []
    while state.samples < len(stream.datasets[0]):
        read, state = stream.read(state, rows, 0, 1, micro)
        batches += read
        state = stream.advance(state, rows)
    stream.close()
    return batches


def test_batches_hold_the_patches_of_their_images(dataset: Path) -> None:
    """By one process or two bit-equal; and what each image becomes alone, at the places of its placeholders."""
    plain, ahead = epoch(open_one(dataset), 4, 2), epoch(open_one(dataset, workers=2), 4, 2)
    rule = image_rule(read_manifest(dataset))
    assert rule is not None and len(plain) == len(ahead) > 10
    counts, turned = [], 0
    for one, two in zip(plain, ahead, strict=True):
        for name in ("patches", "grids", "image_index", "inputs"):
            a, b = getattr(one, name), getattr(two, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name
        assert one.patches.dtype == torch.uint8 and one.patches.shape[1:] == (3, 14, 14)
        assert one.grids.dtype == one.image_index.dtype == torch.int64
        parts, places = [], []
        for image, grid in zip(one.images, one.grids.tolist(), strict=True):
            shown = decode(image.data)[1]
            parts.append(cut(shown, rule))
            assert rule.grid(*shown.size) == tuple(grid) == image.grid
            turned += shown.size != Image.open(io.BytesIO(image.data)).size
            places += range(image.start, image.start + image.tokens)
        assert np.array_equal(one.patches.numpy(), np.concatenate(parts) if parts else np.zeros((0, 3, 14, 14)))
        assert one.image_index.tolist() == places
        assert (one.inputs[0, one.image_index] == rule.placeholder_id).all()
        assert len(places) == int((one.inputs[0] == rule.placeholder_id).sum()), "and at no other place"
        assert one.patches.shape[0] == 4 * len(places)
        counts.append(len(parts))
    assert min(counts) == 0 and max(counts) > 3 and turned > 5


def test_what_a_context_parallel_rank_takes_keeps_images_whole(dataset: Path) -> None:
    batch = next(batch for batch in epoch(open_one(dataset), 4, 2) if len(batch.images) > 1)
    index = torch.arange(batch.positions.numel()).view(2, -1)[1]
    part = batch.take(index).to("cpu")
    assert torch.equal(part.patches, batch.patches) and torch.equal(part.image_index, batch.image_index)
    mine = torch.isin(index, batch.image_index)
    assert torch.equal(mine, part.inputs[0] == batch.inputs[0, batch.image_index[0]]), "features at `index` are its own"


def test_without_a_tower_nothing_is_decoded(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*of: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(row_images.images, "decode", refuse)
    for vision in (None, schema.Vision()):
        batches = epoch(open_one(dataset, vision=vision), 4, 2)
        assert sum(len(batch.images) for batch in batches) > 30
        for batch in batches:
            assert batch.patches.shape == (0, 3, 14, 14) and batch.patches.dtype == torch.uint8
            assert batch.grids.shape == (0, 2) and batch.image_index.shape == (0,)
    with pytest.raises(AssertionError, match="decoded"):
        epoch(open_one(dataset), 4, 2)


def test_validation_shows_images_too(dataset: Path) -> None:
    how: dict[str, Any] = {"micro_batch_size": 2, "depth": 0, "document_mask": True}
    opened = PackedDataset(dataset)
    parts = [list(valid_batches(opened, dp_rank=r, dp_size=2, vision=TOWER, **how)) for r in (0, 1)]
    blind = [batch for batch, _ in valid_batches(opened, dp_rank=0, dp_size=2, **how)]
    assert sum(batch.patches.shape[0] for rank in parts for batch, _ in rank) >= opened.patches.sum()
    assert [b.sample_ids for b in blind] == [b.sample_ids for b, _ in parts[0]]
    assert not any(batch.patches.numel() for batch in blind)


def test_a_tower_of_other_patches_is_refused(dataset: Path) -> None:
    with pytest.raises(
        InputError, match=r"patches of 14 pixels, 2 a side .* the tower reads 16 and 2; set vision\.patch"
    ):
        open_one(dataset, vision=schema.Vision(num_layers=1, patch_size=16))


# ---------------------------------------------------------------- damage


def row_of(number: int, data: bytes, ending: str, grid: tuple[int, int]) -> Row:
    tokens = np.full(SEQ_LEN, 1 + number % 5, "<u2")
    held = RULE.tokens(grid)
    tokens[3 : 3 + held] = 7
    bounds = np.array([0, SEQ_LEN], "<i4")
    image = RowImage(data, ending, 3, held, grid)
    piece = {"doc": number, "source": "a", "start": 0, "tokens": SEQ_LEN, "of": SEQ_LEN, "bytes": 9}
    docs = json.dumps([{**piece, "continues": False, "continued": False, "repeat": False}]).encode()
    return Row(f"{number:09d}", tokens, bounds, np.ones(SEQ_LEN, "u1"), docs, (image,))


def encoded(width: int, height: int, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(out, "PNG", exif=exif)
    return out.getvalue()


def damaged_dataset(folder: Path, bad: bytes, grid: tuple[int, int]) -> Path:
    """Row 3 of 8 is whole by its CRC-32, but not its image."""
    rows = [row_of(i, encoded(40, 30), "png", (4, 4)) for i in range(8)]
    rows[3] = row_of(3, bad, "png", grid)
    return write_dataset(folder, rows, SEQ_LEN, 100, rows_per_shard=4, images=RULE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_its_rows_damage(tmp_path: Path, workers: int) -> None:
    path = damaged_dataset(tmp_path / "data", encoded(40, 30)[:900], (4, 4))
    assert len(epoch(open_one(path, workers, vision=None), 8, 1)) == 8, "a language model does not look at it"
    with pytest.raises(DamageError, match=r"shard-000000\.tar/000000003: image 0: a png image that cannot be decoded"):
        epoch(open_one(path, workers), 8, 1)
    stream = open_one(path, workers, on_damage="quarantine")
    batches, state = stream.read(stream.initial_state(), 8, 0, 1, 1)
    (entry,) = state.quarantine
    assert (entry["row"], entry["replaced_by"]) == (3, 4) and "image 0" in entry["reason"]
    assert all(batch.patches.shape[0] == 16 for batch in batches)
    stream.close()


def test_an_image_of_another_grid_than_its_row_says(tmp_path: Path) -> None:
    """As a dataset would hold that took the header's size for the upright one's."""
    path = damaged_dataset(tmp_path / "data", encoded(90, 30, orientation=6), RULE.grid(90, 30))
    says = r"image 0: a png of 30 x 90 pixels once upright, kept as \.png with 4 x 8 patches"
    with pytest.raises(DamageError, match=rf"000000003: {says}"):
        epoch(open_one(path), 8, 1)
    (damage,) = verify(read_manifest(path), open_store(str(path))).damage
    assert damage.sample == "000000003" and re.match(says, damage.what)


def test_packing_keeps_the_grid_of_the_upright_image(tmp_path: Path, tokenizer_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("1.png", encoded(90, 30, 8)),
            ("1.txt", b"turned"),
            ("2.png", encoded(90, 30, 3)),
            ("2.txt", b"not"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pack([str(tmp_path / "a.tar")], tmp_path / "data", tokenizer_path, SEQ_LEN)
    grids = sorted(image.grid for row in PackedDataset(tmp_path / "data") for image in row.images)
    assert grids == [(4, 8), (8, 4)]
    assert not verify(read_manifest(tmp_path / "data"), open_store(str(tmp_path / "data"))).damage


def test_a_manifest_of_monstrous_patches_is_no_dataset(tmp_path: Path) -> None:
    rows = [row_of(0, encoded(40, 30), "png", (4, 4))]
    for number, rule in enumerate(
        (ImageRule(7, patch_size=1 << 20), ImageRule(7, merge_size=99), ImageRule(7, patch_limit=0))
    ):
        path = write_dataset(tmp_path / str(number), rows, SEQ_LEN, 100, images=rule)
        with pytest.raises(InputError, match="images are"):
            PackedDataset(path)
