"""Images beside a jsonl and inside Parquet: documents as from tars, and nothing read that lies elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from perilune.pretrain.data import source_jsonl, source_parquet
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.sources import documents
from perilune.pretrain.errors import InputError


def encoded(kind: str, width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 9)).save(out, kind)
    return out.getvalue()


JPEG, PNG, WEBP = encoded("JPEG", 30, 20), encoded("PNG", 40, 60), encoded("WEBP", 50, 50)
LINES: list[dict[str, Any]] = [
    {"text": "a literal <image> stays", "id": 1},
    {"parts": [{"image": "pictures/1.jpg"}, {"text": "naïve 漢字 <image>"}]},
    {"parts": [{"text": "up\n"}, {"image": "2.png"}, {"text": ""}, {"text": "mid"}, {"image": "./pictures/3.webp"}]},
    {"parts": []},
]
PARTS = [
    ("a literal <image> stays",),
    (JPEG, "naïve 漢字 <image>"),
    ("up\n", PNG, "mid", WEBP),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of one jsonl and its images, and a picture outside it."""
    folder = tmp_path / "corpus"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "1.jpg").write_bytes(JPEG)
    (folder / "2.png").write_bytes(PNG)
    (folder / "pictures" / "3.webp").write_bytes(WEBP)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return folder


def only(folder: Path, *parts: object) -> str:
    """A jsonl of one plain line and one of these parts."""
    (folder / "y.jsonl").write_text('{"text": "first"}\n' + json.dumps({"parts": parts}) + "\n", encoding="utf-8")
    return str(folder / "y.jsonl")


def test_images_beside_a_jsonl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named absolutely, relatively, through its folder, packed, and behind a link to the whole corpus."""
    found = list(documents([str(folder / "x.jsonl")]))
    assert [d.parts for d in found] == PARTS and found[1].source == f"{folder}/x.jsonl:2"
    assert [d.parts for d in documents([str(folder)])] == PARTS
    monkeypatch.chdir(folder)
    assert [d.parts for d in documents(["x.jsonl"])] == PARTS
    (folder.parent / "link").symlink_to(folder)
    (folder / "4.png").symlink_to("pictures/../2.png")
    assert [d.parts for d in documents([str(folder.parent / "link" / "x.jsonl")])] == PARTS
    assert list(documents([only(folder, {"image": "4.png"})]))[1].parts == (PNG,), "a link that stays inside"
    (folder / "x.jsonl.gz").write_bytes(gzip.compress((folder / "x.jsonl").read_bytes()))
    assert [d.parts for d in documents([str(folder / "x.jsonl.gz")])] == PARTS


def test_images_beside_a_remote_jsonl(folder: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        files.pipe(f"/images/in/{path.relative_to(folder)}", path.read_bytes())
    files.pipe("/images/secret.png", PNG)
    try:
        assert [d.parts for d in documents(["memory://images/in/x.jsonl"])] == PARTS
        for name in (
            "../secret.png",
            "%2e%2e/secret.png",
            "memory://images/secret.png",
            "/images/secret.png",
            "2.png?x",
        ):
            files.pipe("/images/in/y.jsonl", json.dumps({"parts": [{"image": name}]}).encode())
            with pytest.raises(InputError, match=r"in/y\.jsonl:1: image .* must be a path relative"):
                list(documents(["memory://images/in/y.jsonl"]))
        files.pipe("/images/in/y.jsonl", b'{"parts": [{"image": "none.png"}]}')
        with pytest.raises(InputError, match=r"in/y\.jsonl:1: image 'none.png': cannot be read"):
            list(documents(["memory://images/in/y.jsonl"]))
    finally:
        files.rm("/images", recursive=True)


@pytest.mark.parametrize(
    "name", ["../secret.png", "pictures/../../secret.png", "{outside}", "file://{outside}", "", ".", "..\\secret.png",
             "2.png\0", "//etc/passwd", "s3://bucket/2.png"]
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    name = name.replace("{outside}", str(folder.parent / "secret.png"))
    with pytest.raises(InputError, match=r"y\.jsonl:2: image .*must be a path relative to the folder"):
        list(documents([only(folder, {"image": name})]))


def test_links_devices_and_pipes_are_refused(folder: Path) -> None:
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(InputError, match=r"y\.jsonl:2: image .*secret\.png, out of .*corpus; copy"):
            list(documents([only(folder, {"image": name})]))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    for name, says in {
        "pipe.png": "not a regular file",
        "pictures": "not a regular file",
        "zero.png": "out of",
    }.items():
        with pytest.raises(InputError, match=rf"y\.jsonl:2: image .*{says}"):
            list(documents([only(folder, {"image": name})]))
    with pytest.raises(InputError, match=r"y\.jsonl:2: image 'none\.png': cannot be read: .*No such file"):
        list(documents([only(folder, {"image": "none.png"})]))


@pytest.mark.parametrize(
    "line",
    [
        '{"parts": "a"}', '{"parts": [], "text": "a"}', '{"parts": [{"text": 1}]}', '{"parts": ["a"]}',
        '{"parts": [{"text": "a", "image": "2.png"}]}', '{"parts": [{"image": null}]}', '{"images": ["2.png"]}', "[]",
    ],
)  # fmt: skip
def test_lines_of_another_form(folder: Path, line: str) -> None:
    (folder / "y.jsonl").write_text('{"text": "first"}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=r"y\.jsonl:2: .*the line must be an object with"):
        list(documents([str(folder / "y.jsonl")]))


def test_limits_of_images_beside_a_jsonl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="an empty file"):
        list(documents([only(folder, {"image": "empty.png"})]))
    monkeypatch.setattr(source_jsonl, "MAX_SAMPLE_BYTES", 2 * len(PNG) - 1)
    assert len(list(documents([only(folder, {"image": "2.png"})]))) == 2
    with pytest.raises(InputError, match=r"y\.jsonl:2: images of more than"):
        list(documents([only(folder, {"image": "2.png"}, {"image": "2.png"})]))
    monkeypatch.setattr(source_jsonl, "MAX_IMAGE_BYTES", len(PNG) - 1)
    with pytest.raises(InputError, match=r"y\.jsonl:2: image '2\.png': more than"):
        list(documents([only(folder, {"image": "2.png"})]))


# ---------------------------------------------------------------- Parquet

STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})  # an Image feature's storage


def write(path: Path, text: pyarrow.Array, image: pyarrow.Array) -> str:
    """As `Dataset.to_parquet` writes: with the features in the schema's metadata, in row groups of few rows."""
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pyarrow.table({"image": image, "n": [0] * len(text), "text": text}).replace_schema_metadata(about)
    with pyarrow.parquet.ParquetWriter(path, table.schema) as out:
        out.write_table(table, row_group_size=2)
    return str(path)


def of(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


@pytest.mark.parametrize("kind", [STRUCT, pyarrow.binary(), pyarrow.large_binary()])
def test_pairs_in_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    images = [JPEG, PNG, None, WEBP]
    values = [None if data is None else of(data, "/nowhere/1.jpg") if kind == STRUCT else data for data in images]
    path = write(tmp_path / "x.parquet", pyarrow.array(["naïve\r\n", "two", "alone", ""]), pyarrow.array(values, kind))
    found = list(documents([path]))
    assert [d.parts for d in found] == [(JPEG, "naïve\r\n"), (PNG, "two"), ("alone",), (WEBP,)]
    assert [d.source for d in found] == [f"{path}:{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("many", [pyarrow.list_, pyarrow.large_list])
def test_interleaved_in_parquet(tmp_path: Path, many: Any) -> None:
    """A slice of a longer table too, whose lists begin inside their values."""
    text = pyarrow.array([["x"], ["up", None, "mid", None], [None, "end"], []], many(pyarrow.string()))
    rows = [[None], [None, of(JPEG), None, of(PNG)], [of(WEBP), None], []]
    image = pyarrow.array(rows, many(STRUCT))
    path = write(tmp_path / "x.parquet", text, image)
    wanted = [("x",), ("up", JPEG, "mid", PNG), (WEBP, "end")]
    assert [d.parts for d in documents([path])] == wanted
    assert [d.parts for d in documents([write(tmp_path / "y.parquet", text[1:], image[1:])])] == wanted[1:]
    flat = pyarrow.array(["two of them", "none", None], pyarrow.string())
    lists = pyarrow.array([[JPEG, PNG], [], None], many(pyarrow.binary()))
    found = list(documents([write(tmp_path / "z.parquet", flat, lists)]))
    assert [d.parts for d in found] == [(JPEG, PNG, "two of them"), ("none",)]


TEXT = pyarrow.array(["a", "b"])


@pytest.mark.parametrize(
    ("text", "image", "says"),
    [
        (TEXT, pyarrow.array([of(PNG), of(None, "/etc/passwd")], STRUCT), r":2: an image without bytes.*not followed"),
        (TEXT, pyarrow.array([of(PNG), of(b"")], STRUCT), ":2: an image without bytes"),
        (pyarrow.array(["a", None]), pyarrow.array([PNG, PNG]), ":2: 1 images and no `text`"),
        (TEXT, pyarrow.array([[PNG], [None]]), ":2: image 0 of 1 is null"),
        (pyarrow.array([["a"], ["b"]]), pyarrow.array([[None], []], pyarrow.list_(STRUCT)), ":2: 1 texts and 0 images"),
        (pyarrow.array([["a"], ["b"]]), pyarrow.array([[None], [PNG]]), ":2: place 0 holds a text and an image"),
        (pyarrow.array([["a"], ["b"]]), pyarrow.array([PNG, PNG]), "a list of strings beside a list of images"),
        (TEXT, pyarrow.array(["1.png", "2.png"]), "`image` is string; it must be binary"),
        (TEXT, pyarrow.array([{"path": "1.png"}] * 2), "it must be binary"),
        (TEXT, pyarrow.array([[[PNG]], [[PNG]]]), "it must be binary"),
        (pyarrow.array([1, 2]), pyarrow.array([PNG, PNG]), "`text` is int64"),
    ],
)
def test_rows_and_columns_that_are_none(tmp_path: Path, text: pyarrow.Array, image: pyarrow.Array, says: str) -> None:
    path = write(tmp_path / "x.parquet", text, image)
    with pytest.raises(InputError, match=rf"x\.parquet.*{says}"):
        list(documents([path]))


def test_limits_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "x.parquet", pyarrow.array(["a"]), pyarrow.array([[of(PNG), of(PNG)]], pyarrow.list_(STRUCT))
    )
    for name, limit, says in [
        ("MAX_SAMPLE_BYTES", 2 * len(PNG), r"x\.parquet:1: .* bytes in one document"),
        ("MAX_IMAGE_BYTES", len(PNG) - 1, r"x\.parquet:1: an image of"),
        ("MAX_ROW_GROUP_BYTES", len(PNG), r"x\.parquet: row group 0 unpacks to .* bytes of text and image"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(source_parquet, name, limit)
            with pytest.raises(InputError, match=says):
                list(documents([path]))
    assert len(list(documents([path]))) == 1


def test_every_cut_of_a_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", TEXT, pyarrow.array([of(PNG), of(JPEG)], STRUCT)))
    data = path.read_bytes()
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"x\.parquet"):
            list(documents([str(path)]))


def test_both_pack_to_the_same_rows(folder: Path, tokenizer_path: Path) -> None:
    lines = [{"parts": [{"image": "2.png"}, {"text": "a moon"}]}, {"parts": [{"image": "2.png"}, {"text": "an orbit"}]}]
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    parquet = write(folder / "x.parquet", pyarrow.array(["a moon", "an orbit"]), pyarrow.array([of(PNG)] * 2, STRUCT))
    rows = []
    for i, source in enumerate((str(folder / "x.jsonl"), parquet)):
        pack([source], folder / f"{i}", tokenizer_path, 32, workers=1)
        dataset = PackedDataset(folder / f"{i}")
        rows.append([(r.tokens.tolist(), r.loss_mask.tolist(), [im.data for im in r.images]) for r in dataset])
        dataset.close()
    assert rows[0] == rows[1] and any(images for *_, images in rows[0])
