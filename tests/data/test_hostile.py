"""Input made to harm: bombs are refused before they unfold, links never followed, code never loaded or run."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.inspect_verify import check_docs, verify
from perilune.pretrain.data.manifest import read_manifest, write_manifest
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.shard import Row, ShardWriter, decode_row, encode_row
from perilune.pretrain.data.sources import documents
from perilune.pretrain.data.storage import open_store
from perilune.pretrain.data.tokenizer import Tokenizer
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import MAX_PIXELS, ImageRule, image_size
from perilune.vision.images import verify_image

KEY = "000000000"


class Evil:
    """Pickled, it leaves a file behind wherever it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """What runs inside may hold no more than that at once, as Python and NumPy allocate."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20, f"{peak / 2**20:.1f} MiB were held"


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar of files, or of whatever a TarInfo says."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        for name, member in members.items():
            info = tarfile.TarInfo(name) if isinstance(member, bytes) else member
            info.name = name
            if isinstance(member, bytes):
                info.size = len(member)
            out.addfile(info, io.BytesIO(member) if isinstance(member, bytes) else None)
    return path


def special(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def good_row(**changes: Any) -> Row:
    docs = [{"doc": 0, "source": "a.txt", "start": 0, "tokens": 8, "of": 8, "bytes": 8, "continues": False,
             "continued": False, "repeat": False}]  # fmt: skip
    row = Row(KEY, np.arange(8, dtype="<u2"), np.array([0, 8], "<i4"), np.ones(8, "u1"), json.dumps(docs).encode())
    return Row(**{**vars(row), **changes})


# ---------------------------------------------------------------- code in disguise


def test_pickles_and_code_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    evil = pickle.dumps(Evil(witness))
    good = encode_row(good_row())
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(witness)] * 8, dtype=object), allow_pickle=True)
    for ending, data in {
        "tokens.npy": objects.getvalue(), "loss_mask.npy": evil, "evil.pyd": evil, "evil.pth": evil, "x.pickle": evil,
        "x.npz": evil, "docs.json": evil, "__init__.py": b"import os; os.mkdir('ran')",
    }.items():  # fmt: skip
        members = dict(_members(good))
        members[f"{KEY}.{ending}"] = data
        with pytest.raises(ValueError, match=r"not one of plain integers|not a \.npy|none of the format|JSON"):
            check_docs(decode_row(_raw(members), KEY))
    assert not witness.exists()
    pickle.loads(evil)
    assert witness.exists(), "the bait works where it is loaded"


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        for info in tar:
            stream = tar.extractfile(info)
            assert stream is not None
            yield info.name, stream.read()


def _raw(members: dict[str, bytes]) -> bytes:
    out = b""
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        out += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    return out


def test_pickles_and_code_beside_samples_are_passed_over_unread(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    evil = pickle.dumps(Evil(witness))
    tar_of(tmp_path / "x.tar", {"a.txt": b"text", "a.pyd": evil, "a.pth": evil, "a.npy": evil, "b.pickle": evil})
    with pytest.raises(InputError, match=r"x\.tar:b"):
        list(documents([str(tmp_path / "x.tar")]))
    tar_of(tmp_path / "x.tar", {"a.txt": b"text", "a.pyd": evil, "a.pth": evil, "a.npy": evil})
    for name in ("evil.pth", "evil.pyd", "conftest.so", "evil.pickle"):
        (tmp_path / name).write_bytes(evil)
    assert [document.text for document in documents([str(tmp_path)])] == ["text"]
    assert not witness.exists()


@pytest.mark.parametrize(
    "spec", ["pipe:touch ran", "pipe:touch ran |", "| touch ran", "$(touch ran)", "`touch ran`.txt"]
)
def test_a_source_that_is_a_command_is_a_missing_file(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        list(documents([spec]))
    with pytest.raises(InputError):
        PackedDataset(spec)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- links and paths


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_never_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_text("never read")
    tar_of(tmp_path / "x.tar", {"a.txt": special(kind, str(secret))})
    with pytest.raises(InputError, match=r"x\.tar: member 'a\.txt' at byte 0 is a link or device"):
        list(documents([str(tmp_path / "x.tar")]))
    header = special(kind, str(secret))
    header.name = f"{KEY}.tokens.npy"
    with pytest.raises(ValueError, match="no regular tar member at byte 0"):
        decode_row(header.tobuf(tarfile.USTAR_FORMAT), KEY)


def test_devices_and_pipes_in_a_dataset_are_never_read(tmp_path: Path, packed: Path) -> None:
    """One never ends, the other never answers."""
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        folder = Path(shutil.copytree(packed, tmp_path / "copy"))
        (folder / "shard-000001.tar").unlink()
        make(folder / "shard-000001.tar")
        with pytest.raises(DamageError, match=r"shard-000001\.tar: this shard is missing"):
            PackedDataset(folder)
        with pytest.raises(DamageError, match="not a regular file"):
            PackedDataset(folder, whole=False)[53]
        found = verify(read_manifest(folder), open_store(folder))
        assert len(found.damage) == 1 and "not a regular file" in str(found.damage[0])
        (folder / "manifest.json").unlink()
        make(folder / "manifest.json")
        with pytest.raises(InputError, match=r"manifest\.json cannot be read: not a regular file"):
            read_manifest(folder)
        shutil.rmtree(folder)


def test_paths_that_climb_are_names_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    names = ["../../a.txt", "/b.txt", "x/../../c.txt", "./d.txt"]
    tar_of(folder / "x.tar", {name: name.encode() for name in names})
    assert [document.text for document in documents([str(folder)])] == names
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/side", "in/side/x.tar"]
    assert not Path("/b.txt").exists()


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"10 size=9\n", "sets 'size'"),
        (b"19 GNU.sparse.\xff\xfe=1\n", "sets 'GNU.sparse."),
        (b"9" * 5000 + b" path=a.txt\n", "cannot be read"),
        (b"0 path=a.txt\n", "cannot be read"),
        (b"-5 path=a.txt\n", "cannot be read"),
        (b"99 path=a.txt\n", "cannot be read"),
    ],
)
def test_names_that_lie_about_their_length(tmp_path: Path, record: bytes, says: str) -> None:
    """Extended headers can rename the next member or change its size, so that readers disagree on where it ends."""
    header = tarfile.TarInfo("extended")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    text = tarfile.TarInfo("a.txt")
    raw = header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512) + text.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "x.tar").write_bytes(raw + bytes(1024))
    with pytest.raises(InputError, match=rf"x\.tar: the pax header at byte 0 .*{says}"):
        list(documents([str(tmp_path / "x.tar")]))


def test_a_folder_that_contains_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [document.text for document in documents([str(tmp_path)])] == ["once"]


# ---------------------------------------------------------------- bombs


def test_arrays_are_no_larger_than_their_bytes() -> None:
    for shape in ("(999999999999,)", "(999999999999, 9)", "(99999999999999999999999,)", "(-8,)", "()"):
        members = dict(_members(encode_row(good_row())))
        head = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        members[f"{KEY}.tokens.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + head.encode()
        with at_most(1), pytest.raises(ValueError, match=r"tokens says|plain integers|the shape"):
            decode_row(_raw(members), KEY)
    lie = tarfile.TarInfo(f"{KEY}.tokens.npy")
    lie.size = 7 << 30
    with at_most(1), pytest.raises(ValueError, match="of which 0 are there"):
        decode_row(lie.tobuf(tarfile.USTAR_FORMAT), KEY)


def test_a_manifest_cannot_make_us_ask_for_more_than_is_there(packed: Path, tmp_path: Path) -> None:
    """Its checksum is right and its shard gigantic; so is the vocabulary's table."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    manifest = read_manifest(copy)
    shard = manifest["shards"][1]
    shard["bytes"] = 1 << 50
    shard["samples"][-1][2] = (1 << 50) - shard["samples"][-1][1]
    write_manifest(copy, {key: value for key, value in manifest.items() if key != "fingerprint"})
    with at_most(16):
        with pytest.raises(DamageError, match="the manifest says 1125899906842624"):
            PackedDataset(copy)
        assert inspect_command(str(copy), check=True) == 1


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pixel_bombs_are_refused_by_their_header() -> None:
    side = 23_000
    bomb = png(side, side, zlib.compress(bytes(side + 1) * 16, 9) * 8)
    assert len(bomb) < 1 << 15 and side * side > 500 << 20, "531 MB from a few kilobytes"
    jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65_000, 65_000) + b"\x03" + bytes(9)
    webp = b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00" + b"\xff\xff\xff" * 2
    for data in (bomb, jpeg, webp, png(1 << 31, 1), png(0, 5)):
        for look in (image_size, verify_image):
            with at_most(4), pytest.raises(ValueError, match=f"at least 1 and at most {MAX_PIXELS}"):
                look(data)
    with pytest.raises(ValueError, match="bytes; the limit is"):
        image_size(png(9, 9) + bytes(1 << 26))
    with pytest.raises(ValueError, match="fewer than 512"):
        ImageRule(placeholder_id=0, patch_limit=1 << 30).grid(100_000, 28)


def test_bombs_and_strange_ids_never_reach_a_dataset(tmp_path: Path, tokenizer_path: Path) -> None:
    """Packing names the sample, and leaves nothing that could be taken for a dataset."""
    side = 23_000
    bomb = png(side, side, zlib.compress(bytes(side + 1) * 16, 9))
    tar_of(tmp_path / "x.tar", {"good.txt": b"text", "bad.png": bomb, "bad.txt": b"caption"})
    with at_most(64), pytest.raises(InputError, match=rf"x\.tar:bad.*{side} x {side} pixels"):
        pack([str(tmp_path / "x.tar")], tmp_path / "data", tokenizer_path, 64, workers=1)
    ids = np.array([1, 2, 400, 3], "<i4")  # the tokenizer of the tests has 400
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2) + struct.pack("<iqqq", 4, 0, 0, 1)
    for strange in (400, -1, 2**31 - 1):
        ids[2] = strange
        (tmp_path / "m.bin").write_bytes(ids.tobytes())
        (tmp_path / "m.idx").write_bytes(index)
        with pytest.raises(InputError, match=rf"m\.idx:0: .*{strange}"):
            pack([str(tmp_path / "m.idx")], tmp_path / "data2", tokenizer_path, 64, workers=1)
    for folder in ("data", "data2"):
        with pytest.raises(InputError, match="not a packed dataset"):
            PackedDataset(tmp_path / folder)


def test_a_compressed_text_chunk_inside_an_image_does_not_unfold() -> None:
    """Pillow would unpack iTXt and zTXt chunks of any image that it opens."""
    text = zlib.compress(bytes(200 << 20), 9)
    body = b"zTXtcomment\x00\x00" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = png(8, 8, zlib.compress(bytes(9 * 8)))
    data = data[:33] + chunk + data[33:]
    with at_most(32), pytest.raises(ValueError, match="too large"):
        verify_image(data)


def test_a_gzip_bomb_of_one_sample(tmp_path: Path) -> None:
    """292 KB that unpack to 300 MB of blank lines are read in pieces; as one line they are beyond the limit."""
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b"\n" * (50 << 20)))
    with at_most(8):
        found = list(_first(documents([str(tmp_path / "x.jsonl.gz")]), 1))
    assert [document.text for document in found] == ["a"]


def _first(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        yield next(items)


# ---------------------------------------------------------------- documents


def test_documents_of_every_shape_come_back(tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    """NULs, control characters, the end of a document spelled out, nothing at all, and 300 kB in one: byte for byte."""
    texts = [
        "\0",
        "\0" * 500,
        "",
        "\x1b[2J\x1b]0;owned\x07",
        "<|eos|><|pad|>",
        "\ufeffbom",
        "\u202eturned",
        "orbit " * 50_000,
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    stats = pack([str(path)], tmp_path / "data", tokenizer_path, 64)["all"]
    assert stats["documents"] == len(texts) - 1 and stats["raw_bytes"] == sum(len(text.encode()) for text in texts)
    pieces: dict[int, dict[int, bytes]] = {}
    for row in (dataset := PackedDataset(tmp_path / "data")):
        for piece, begin, end in zip(row.docs, row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            if not piece["repeat"]:
                pieces.setdefault(piece["doc"], {})[piece["start"]] = row.tokens[begin:end]
    found = [np.concatenate([of[start] for start in sorted(of)]) for _, of in sorted(pieces.items())]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == [text for text in texts if text]
    assert all(ids[-1] == tokenizer.eos_id and (ids[:-1] != tokenizer.eos_id).all() for ids in found)
    assert inspect_command(str(tmp_path / "data"), check=True) == 0
    dataset.close()


def test_text_that_is_not_unicode_is_an_error_with_its_place(tmp_path: Path) -> None:
    for name, data, says in [
        ("x.txt", b"caf\xe9", r"x\.txt: not UTF-8 .*offset 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2: not UTF-8"),
        ("x.jsonl", b'{"text": "\\udc80"}\n', r"x\.jsonl:1: half a surrogate"),
        ("x.jsonl", b'{"text": "' + b"\xed\xa0\x80" + b'"}\n', r"x\.jsonl:1: not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says):
            list(documents([str(tmp_path / name)]))
    tar_of(tmp_path / "x.tar", {"a.txt": b"\xc3\x28"})
    with pytest.raises(InputError, match=r"x\.tar:a: not UTF-8"):
        list(documents([str(tmp_path / "x.tar")]))


def dataset_of(folder: Path, packed: Path, rows: list[Row]) -> Path:
    """A sound manifest over rows of any content: what somebody else's packer might have written."""
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns("*.tar"))
    writer = ShardWriter(folder, 100)
    for row in rows:
        writer.write(row)
    writer.close()
    manifest = {key: value for key, value in read_manifest(packed).items() if key != "fingerprint"}
    size = rows[0].tokens.size
    write_manifest(folder, {**manifest, "seq_len": size, "rows": len(rows), "tokens": len(rows) * size,
                            "packing": {}, "shards": writer.shards})  # fmt: skip
    return folder


def test_ids_outside_the_vocabulary_are_damage(tmp_path: Path, packed: Path) -> None:
    ids = np.array([0, 1, 2, 3, 4, 5, 6, 400], "<u2")  # the tokenizer of the tests has 400
    folder = dataset_of(tmp_path / "data", packed, [good_row(), good_row(key="000000001", tokens=ids)])
    dataset = PackedDataset(folder)
    assert dataset[0].tokens[7] == 7
    with pytest.raises(
        DamageError, match=r"shard-000000\.tar/000000001 at byte \d+: token id 400 lies outside the voc"
    ):
        dataset[1]
    assert inspect_command(str(folder), check=True) == 1


def test_what_inspect_shows_cannot_take_over_a_terminal_or_a_page(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and texts of documents are whatever their authors wrote."""
    source = "\x1b[2J<img src=x onerror=alert(1)>[red]\u202e</pre>\x9b31m"
    docs = json.loads(good_row().docs_json)
    docs[0]["source"] = source
    folder = dataset_of(tmp_path / "data", packed, [good_row(docs_json=json.dumps(docs).encode())])
    assert inspect_command(str(folder), check=True, sample=0, html=True) == 0
    shown = capsys.readouterr().out
    page = (folder / "inspect.html").read_text(encoding="utf-8")
    for text in (shown, page):
        assert not {"\x1b", "\x9b", "\u202e", "\0"} & set(text)
        assert "␛[2J" in text and "\\u{202e}" in text
    assert "<img" not in page and "&lt;img src=x" in page and "<script" not in page
    assert "[red]" in shown
