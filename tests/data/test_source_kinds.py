"""Tars, Megatron datasets and stores behind fsspec: the same documents from everywhere, damage and tricks refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image

from perilune.pretrain.data import source_tar, storage
from perilune.pretrain.data.source_file import SourceFile, describe
from perilune.pretrain.data.sources import documents, find_files, read_placed
from perilune.pretrain.data.storage import StoreError
from perilune.pretrain.errors import InputError

TEXTS = ["one\r\ntwo\n", "naïve 漢字 🙂", " lead and trail "]


def encoded(kind: str, width: int = 30, height: int = 20) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 9)).save(out, kind)
    return out.getvalue()


JPEG, PNG, WEBP = encoded("JPEG"), encoded("PNG", 40, 60), encoded("WEBP", 50, 50)


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


SAMPLES = {
    "a/1.jpg": JPEG, "a/1.txt": TEXTS[0].encode(), "a/1.json": b'{"url": "x"}',  # as img2dataset writes them
    "a/2.png": PNG, "a/2.json": json.dumps({"caption": TEXTS[1]}).encode(), "a/2.cls": b"7",
    "a/3.0.webp": WEBP, "a/3.1.jpg": JPEG,
    "a/3.json": b'{"texts": ["up", null, "mid", null, ""], "images": [null, "1.jpg", null, "0.webp", null]}',
    "b" * 120 + "/4.txt": TEXTS[2].encode(),
}  # fmt: skip
PARTS = [(JPEG, TEXTS[0]), (PNG, TEXTS[1]), ("up", JPEG, "mid", WEBP), (TEXTS[2],)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pairs_and_interleaved_documents(tmp_path: Path, kind: int) -> None:
    path = write_tar(tmp_path / "x.tar", SAMPLES, format=kind)
    found = list(documents([str(path)]))
    assert [d.parts for d in found] == PARTS
    assert found[0].source == f"{path}:a/1" and len({d.source for d in found}) == 4
    assert {d.split for d in documents([str(path)], None, 0.5)} == {"train", "valid"}


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as out:
        for i, text in enumerate(TEXTS):
            out.write({"__key__": f"{i:06d}", "jpg": JPEG, "txt": text})
    assert [d.parts for d in documents([str(tmp_path / "x.tar")])] == [(JPEG, text) for text in TEXTS]


def test_every_cut_and_every_flipped_bit_of_a_header_is_an_error(tmp_path: Path) -> None:
    """`tarfile` ends quietly at most of these."""
    data = write_tar(tmp_path / "x.tar", {"1.txt": b"one", "2.txt": b"two"}).read_bytes()
    path = tmp_path / "bad.tar"
    end = 4 * 512 + 1024
    for cut in (*range(0, end, 100), 1024, 2048, 2560):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match="Fetch it again"):
            list(documents([str(path)]))
    for byte in range(0, 512, 7):
        bad = bytearray(data)
        bad[1024 + byte] ^= 4
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"tar header at byte 1024"):
            list(documents([str(path)]))
    path.write_bytes(data[:1024] + bytes(512) + data[1536:])
    with pytest.raises(InputError, match="a zeroed block at byte 1024"):
        list(documents([str(path)]))


def test_members_without_a_key_or_an_ending_are_of_no_sample(tmp_path: Path) -> None:
    """What archivers add, and people; stock webdataset passes over the same."""
    members = {"README": b"read me", "._1.txt": b"\0\5\x16", "1.txt": b"one", ".DS_Store": b"", "2.txt": b"two"}
    path = write_tar(tmp_path / "x.tar", members | {"a/LICENSE": b"", "a/3.txt": b"three"})
    stock = [(sample["__key__"], sample["txt"].decode()) for sample in webdataset.WebDataset(str(path), shardshuffle=0)]
    assert [(d.source.removeprefix(f"{path}:"), d.text) for d in documents([str(path)])] == stock
    assert [text for _, text in stock] == ["one", "two", "three"]
    with pytest.raises(InputError, match=r"no member has a name of the form KEY.ENDING, as '1' has not"):
        list(documents([str(write_tar(tmp_path / "y.tar", {"1": b"one", "2": b"two"}))]))


def special(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(out: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        out.addfile(info)

    return add


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        special("1.txt", kind, "/etc/passwd")(out)
    with pytest.raises(InputError, match=r"'1.txt' at byte 0 is a link or device"):
        list(documents([str(tmp_path / "x.tar")]))


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.jpg": JPEG}, r":1: members \['jpg'\]; a sample is"),
        ({"1.pth": b"\x80\x04K\x01."}, r":1: members \[\]; a sample is"),
        ({"1.jpg": JPEG, "1.png": PNG, "1.txt": b"x"}, "a sample is"),
        ({"1.txt": b"caf\xe9"}, ":1: not UTF-8"),
        ({"1.json": b"[" * 100_000}, "cannot be read"),
        ({"1.json": b'{"texts": ["a"], "images": []}'}, "1 texts and 0 images"),
        ({"1.json": b'{"texts": [null], "images": ["../../etc/passwd"]}'}, "place 0 holds None"),
        ({"1.0.jpg": JPEG, "1.json": b'{"texts": ["a"], "images": [null]}'}, r"\['0.jpg'\] stand at no place"),
        ({"1.json": b'{"texts": ["\\ud800"], "images": [null]}'}, "surrogate"),
    ],
)
def test_samples_that_are_none(tmp_path: Path, members: dict[str, bytes], says: str) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(InputError, match=says):
        list(documents([str(path)]))


def test_limits_of_a_tar_hold_before_its_members_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPEG, "1.txt": b"x"})
    monkeypatch.setattr(source_tar, "MAX_SAMPLE_BYTES", len(JPEG))
    with pytest.raises(InputError, match=r"sample '1' has more than"):
        list(documents([str(path)]))
    monkeypatch.setattr(source_tar, "MAX_IMAGE_BYTES", len(JPEG) - 1)
    with pytest.raises(InputError, match=r"member '1.jpg' at byte 0.*the limit is"):
        list(documents([str(path)]))
    head = bytearray(path.read_bytes()[:512])
    head[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 256)
    path.write_bytes(head)
    with pytest.raises(InputError, match=f"{1 << 60} bytes; the limit is"):
        list(documents([str(path)]))


def write_megatron(prefix: Path, docs: list[list[int]], dtype: type = np.uint16) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in docs:
        half = len(ids) // 2  # two sequences each
        builder.add_item(torch.tensor(ids[:half]))
        builder.add_item(torch.tensor(ids[half:]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.idx")


def test_a_megatron_dataset_of_megatrons_own_builder(tmp_path: Path) -> None:
    ids = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    index = write_megatron(tmp_path / "x", ids, np.int32)
    for spec in (index, tmp_path / "x.bin", tmp_path):
        found = list(documents([str(spec)]))
        assert [d.parts[0].tolist() for d in found] == ids and found[1].source == f"{index}:1"
    before = describe(find_files([str(index)])[0])
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:-1] + b"\x07")
    assert describe(find_files([str(index)])[0]) != before
    (tmp_path / "x.bin").write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"x\.bin: .* bytes; the index places sequences"):
        list(documents([str(index)]))
    whole = index.read_bytes()
    for cut in (0, 8, 20, 33, 34, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"not the index of|it is cut"):
            list(documents([str(index)]))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(InputError, match=r"x\.bin: missing; a Megatron dataset is"):
        find_files([str(index)])


class Handler(BaseHTTPRequestHandler):
    """Files by ranges; `fail` requests for contents are answered 503 first, and `down` requests of any kind."""

    files: dict[str, bytes]
    fail = down = 0
    asked = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.down:
            type(self).down -= 1
            self.send_error(503)
            return
        data = self.files.get(self.path)
        whole = self.command == "HEAD" or "Range" not in self.headers
        if data is not None and not whole:
            type(self).asked += 1
            if self.fail >= self.asked:
                self.send_error(503)
                return
        if data is None:
            self.send_error(404)
            return
        first, last = 0, len(data) - 1
        if not whole:
            first, last = (int(place) for place in self.headers["Range"].removeprefix("bytes=").split("-"))
            last = min(last, len(data) - 1)
        self.send_response(200 if whole else 206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{len(data)}"')
        if not whole:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    files = {
        "x.jsonl": lines,
        "x.jsonl.gz": gzip.compress(lines),
        **{f"{i}.txt": t.encode() for i, t in enumerate(TEXTS)},
    }
    files |= {name: (tmp_path / name).read_bytes() for name in ("x.parquet", "x.tar")}
    Handler.files = {f"/d/{name}": data for name, data in files.items()}
    Handler.fail = Handler.asked = Handler.down = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/d"
        httpd.shutdown()
        thread.join(10)


def test_a_web_server_gives_the_same_documents(server: str) -> None:
    Handler.fail = 2  # asked again after a pause
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet", "x.tar"):
        found = list(documents([f"{server}/{name}"]))
        assert [d.text for d in found] == TEXTS, name
        assert found[0].source.startswith(f"{server}/{name}:")
    assert [d.text for i in range(3) for d in documents([f"{server}/{i}.txt"])] == TEXTS
    said = describe(SourceFile(f"{server}/x.jsonl", "x"))
    assert said == {
        "name": "x",
        "bytes": len(Handler.files["/d/x.jsonl"]),
        "version": {"etag": said["version"]["etag"]},
    }
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        describe(SourceFile(f"{server}/none.jsonl", "x"))


def test_a_web_server_that_is_down_is_no_missing_file(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(SourceFile(f"{server}/x.jsonl", "x"))
    Handler.down = 3  # fsspec asks twice, by HEAD and by GET
    assert describe(SourceFile(f"{server}/x.jsonl", "x")) == before and Handler.down == 0
    Handler.down = 3
    assert [d.text for d in documents([f"{server}/x.jsonl"])] == TEXTS
    monkeypatch.setattr(storage, "FIRST_RETRY_S", 0.3)
    Handler.down = 1000
    with pytest.raises(StoreError, match=r"x\.jsonl cannot be read: ClientResponseError: 503.*tried \d+ times"):
        describe(SourceFile(f"{server}/x.jsonl", "x"))
    Handler.down = 0
    with pytest.raises(StoreError, match=r"x\.jsonl cannot be read: ClientConnectorError"):
        describe(SourceFile("http://127.0.0.1:1/x.jsonl", "x"))


def test_stores_behind_fsspec(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for i, text in enumerate(TEXTS):
        files.pipe(f"/corpus/{i}.txt", text.encode())
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    files.pipe("/corpus/skip.png", PNG)
    try:
        for spec in ("memory://corpus", "memory://corpus/*.txt", f"file://{tmp_path}", f"file://{tmp_path}/*.txt"):
            assert [d.text for d in documents([spec])] == TEXTS, spec
        assert len(find_files(["memory://corpus", "memory://corpus/1.txt"])) == 3, "each once"
        one = find_files(["memory://corpus/1.txt"])[0]
        before = describe(one)
        files.pipe("/corpus/1.txt", b"another text")
        assert describe(one) != before
        with pytest.raises(InputError, match="nothing there"):
            find_files(["memory://corpus/*.jsonl"])
        with pytest.raises(InputError, match="nosuch://x/y cannot be opened"):
            find_files(["nosuch://x/y"])
    finally:
        files.rm("/corpus", recursive=True)


def test_reading_goes_on_after_any_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": ""}\n{"text": "a2"}\n')
    write_tar(tmp_path / "b.tar", {"1.txt": b"b1", "2.txt": b"b2"})
    (tmp_path / "c.txt").write_text("c")
    files = find_files([str(tmp_path)])
    everything = list(read_placed(files, None, 0.0))
    assert [d.text for _, _, d in everything] == ["a1", "a2", "b1", "b2", "c"]
    for i, (file, record, _) in enumerate(everything):
        assert list(read_placed(files, None, 0.0, (file, record))) == everything[i + 1 :]
