"""Every kind of damage is found by the reader before a model sees it, and by `inspect --verify` in one pass; named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.inspect_verify import Verified, verify
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import DamageError, PackedDataset
from perilune.pretrain.data.storage import open_store
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError

FIRST, SHARD, LAST = "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"
ROWS = 50  # a shard, as tests/data/conftest.py packs them


@pytest.fixture
def copy(tmp_path: Path, packed: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@dataclass(frozen=True)
class Place:
    """Sample 3 of the second shard, row 53."""

    folder: Path
    key: str
    offset: int
    length: int

    @property
    def path(self) -> Path:
        return self.folder / SHARD

    def edit(self, change: Callable[[bytearray], Any]) -> None:
        data = bytearray(self.path.read_bytes())
        change(data)
        self.path.write_bytes(data)

    def cut(self, at: int) -> None:
        self.edit(lambda data: data.__delitem__(slice(self.offset + at, None)))

    def flip(self, at: int) -> None:
        self.edit(lambda data: data.__setitem__(self.offset + at, data[self.offset + at] ^ 4))

    def zero(self, begin: int, end: int) -> None:
        self.edit(lambda data: data.__setitem__(slice(self.offset + begin, self.offset + end), bytes(end - begin)))


@pytest.fixture
def place(copy: Path) -> Place:
    key, offset, length, *_ = read_manifest(copy)["shards"][1]["samples"][3]
    return Place(copy, key, offset, length)


def verified(folder: Path) -> Verified:
    return verify(read_manifest(folder), open_store(folder))


def read_all(folder: Path) -> list[str]:
    """What the reader says of the rows that it refuses."""
    dataset = PackedDataset(folder)
    refused = []
    for index in range(len(dataset)):
        try:
            assert dataset[index].tokens.size == dataset.seq_len
        except DamageError as error:
            refused.append(str(error))
    dataset.close()
    return refused


def test_what_is_whole_is_called_whole(packed: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = verified(packed)
    manifest = read_manifest(packed)
    assert not found.damage and not found.lost_rows and found.rows == manifest["rows"]
    assert found.bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert found.counts["documents"] == len(texts)
    assert sum(counts["bytes"] for counts in found.sources.values()) == sum(len(text.encode()) for text in texts)
    assert not read_all(packed)
    assert inspect_command(str(packed), check=True) == 0 and "whole: " in capsys.readouterr().out


ONE_ROW: dict[str, tuple[Callable[[Place], None], str]] = {
    "bit in a tar header": (lambda p: p.flip(3), "CRC-32"),
    "bit in a member's size": (lambda p: p.flip(134), "CRC-32"),
    "bit in an array's header": (lambda p: p.flip(530), "CRC-32"),
    "bit in the tokens": (lambda p: p.flip(700), "CRC-32"),
    "bit in the last byte": (lambda p: p.flip(p.length - 1), "CRC-32"),
    "member zeroed": (lambda p: p.zero(1024, 2048), "CRC-32"),
    "header zeroed": (lambda p: p.zero(0, 512), "no regular tar member at byte 0"),
    "sample zeroed": (lambda p: p.zero(0, p.length), "no regular tar member at byte 0"),
}


@pytest.mark.parametrize("kind", ONE_ROW)
def test_damage_to_one_sample_costs_that_sample(kind: str, place: Place) -> None:
    change, says = ONE_ROW[kind]
    change(place)
    [refused] = read_all(place.folder)
    assert f"{SHARD}/{place.key} at byte {place.offset}: CRC-32" in refused
    found = verified(place.folder)
    [damage] = found.damage
    assert (damage.shard, damage.sample, damage.offset) == (SHARD, place.key, place.offset) and says in damage.what
    assert found.lost_rows == 1 and found.rows == read_manifest(place.folder)["rows"] - 1


@pytest.mark.parametrize(
    ("at", "there"), [(0, 0), (100, 100), (512, 512), (600, 600), (1024, 1024)],
    ids=["sample boundary", "mid-header", "after a header", "mid-payload", "member boundary"],
)  # fmt: skip
def test_a_shard_cut_short(place: Place, at: int, there: int) -> None:
    place.cut(at)
    with pytest.raises(DamageError, match=rf"{SHARD}: .*lost from {SHARD}/{place.key} at byte {place.offset} on"):
        PackedDataset(place.folder)
    found = verified(place.folder)
    [damage] = found.damage
    assert (damage.shard, damage.sample, damage.offset) == (SHARD, place.key, place.offset)
    assert f"{there} of {place.length} bytes are there" in damage.what and "47 samples are not whole" in damage.what
    assert found.lost_rows == ROWS - 3, "every other row is told whole"


def test_damage_where_no_sample_lies(place: Place) -> None:
    """The tar's end is no sample's: stock readers would stumble over it, ours reads on, and --verify tells."""
    whole = place.path.read_bytes()
    *_, (_, offset, length, *_) = read_manifest(place.folder)["shards"][1]["samples"]
    end = offset + length
    place.path.write_bytes(whole[:end] + bytes([0, 0, 7]) + whole[end + 3 :])
    [damage] = verified(place.folder).damage
    assert (damage.sample, damage.offset) == (None, end + 2) and "not zero" in damage.what
    place.path.write_bytes(whole[:-512])
    [damage] = verified(place.folder).damage
    assert (damage.sample, damage.offset) == (None, len(whole) - 512) and "No sample is lost" in damage.what
    with pytest.raises(DamageError, match=SHARD):
        PackedDataset(place.folder)
    place.path.write_bytes(whole + b"more")
    [damage] = verified(place.folder).damage
    assert (damage.sample, damage.offset) == (None, len(whole)) and "4 bytes more" in damage.what


def test_swapped_shards(copy: Path) -> None:
    (copy / FIRST).rename(copy / "aside")
    (copy / SHARD).rename(copy / FIRST)
    (copy / "aside").rename(copy / SHARD)
    assert [(d.shard, d.what) for d in verified(copy).damage] == [
        (FIRST, f"these are the bytes of {SHARD}"),
        (SHARD, f"these are the bytes of {FIRST}"),
    ]
    try:
        said = read_all(copy)
    except DamageError as error:  # of another size
        said = [str(error)]
    assert said and all(FIRST in one or SHARD in one for one in said)


def test_missing_shard(copy: Path) -> None:
    (copy / SHARD).unlink()
    [damage] = verified(copy).damage
    assert (damage.shard, damage.sample, damage.offset) == (SHARD, f"{ROWS:09d}", 0) and "50 samples" in damage.what
    with pytest.raises(DamageError, match=f"{SHARD}: this shard is missing"):
        PackedDataset(copy)


def test_all_damage_is_told_in_one_pass(copy: Path, place: Place, perilune: Callable[..., Any], tmp_path: Path) -> None:
    place.flip(700)
    (copy / FIRST).unlink()
    with (copy / LAST).open("r+b") as stream:
        stream.truncate(1000)
    done = perilune("inspect", "copy", "--verify")
    assert done.returncode == 1 and f"{SHARD}/{place.key} at byte {place.offset}: CRC-32" in done.stdout
    assert f"{FIRST}/000000000 at byte 0: this shard is missing" in done.stdout
    assert f"{LAST}/{2 * ROWS:09d} at byte 0: 1000 of " in done.stdout and "damaged: 3 findings; " in done.stdout


def test_any_bit_of_a_shard_is_vouched_for(copy: Path) -> None:
    """A hundred single bits anywhere in a shard: each is found, in the sample that holds it."""
    manifest = read_manifest(copy)
    shard = manifest["shards"][1]
    manifest["shards"] = [shard]
    whole = (copy / SHARD).read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        at = rng.randrange(len(whole))
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        (copy / SHARD).write_bytes(data)
        [damage] = verify(manifest, open_store(copy)).damage
        inside = [key for key, offset, length, *_ in shard["samples"] if offset <= at < offset + length]
        assert (damage.shard, damage.sample) == (SHARD, inside[0] if inside else None), at


def test_any_bit_of_the_manifest_is_vouched_for(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(100):
        data = bytearray(whole)
        at = rng.randrange(len(data) - 1)  # the last is a newline, which JSON does not mind
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"manifest\.json"):
            read_manifest(copy)
    for at in range(0, len(whole) - 1, len(whole) // 20):
        path.write_bytes(whole[:at])
        with pytest.raises(InputError, match=r"manifest\.json: not JSON"):
            read_manifest(copy)


def test_manifest_of_another_tokenizer_or_version(
    copy: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards under a manifest that is sound but not theirs: no row of them is believed."""
    other = train_tokenizer([corpus], tmp_path / "other-tok", 300)
    pack([corpus], tmp_path / "other", other, 64, rows_per_shard=50)
    theirs = (tmp_path / "other" / "manifest.json").read_bytes()
    mine = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(theirs)
    with pytest.raises(InputError, match=r"token_bytes\.npy: damaged"):
        PackedDataset(copy)
    with pytest.raises(InputError, match=r"token_bytes\.npy: damaged"):
        inspect_command(str(copy), check=True)
    shutil.copy(tmp_path / "other" / "token_bytes.npy", copy)
    with pytest.raises(DamageError, match=r"shard-00000\d\.tar"):
        read_all(copy)
    assert inspect_command(str(copy), check=True) == 1 and FIRST in capsys.readouterr().out
    assert verified(copy).rows == 0
    (copy / "manifest.json").write_bytes(mine)
    with pytest.raises(InputError, match=r"this tokenizer's fingerprint is .*, the dataset's is"):
        inspect_command(str(copy), sample=0, tokenizer=other)
    version = json.loads(mine)["format_version"]
    changed = mine.replace(b'"format_version":%d' % version, b'"format_version":%d' % (version + 1))
    (copy / "manifest.json").write_bytes(changed)
    with pytest.raises(InputError, match=f"format version {version + 1}; this Perilune reads {version}"):
        inspect_command(str(copy))
