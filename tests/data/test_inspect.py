"""`perilune inspect`: what it tells is what was packed; a decoded row is the text; the page needs nothing else."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from perilune.pretrain.data import storage
from perilune.pretrain.data.inspect_command import inspect_command
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.reader import PackedDataset
from perilune.pretrain.data.tokenizer import Tokenizer
from perilune.pretrain.errors import InputError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Capture = pytest.CaptureFixture[str]


def told(capsys: Capture, *words: str, **options: object) -> dict:
    assert inspect_command(*words, as_json=True, **options) == 0  # type: ignore[arg-type]
    return json.loads(capsys.readouterr().out)


def test_statistics_mixture_and_lengths(packed: Path, texts: list[str], tokenizer: Tokenizer, capsys: Capture) -> None:
    known = told(capsys, str(packed), check=True)
    sizes = [ids.size + 1 for ids in tokenizer.encode_batch(texts)]
    assert known["rows"] * known["seq_len"] == known["tokens"] == sum(sizes) + known["packing"]["repeat_tokens"]
    assert known["packing"]["documents"] == len(texts) and sum(known["document_lengths"].values()) == len(texts)
    for span, count in known["document_lengths"].items():
        low, high = map(int, span.split("-"))
        assert count == sum(low <= size <= high for size in sizes)
    assert sum(known["pieces_per_row"].values()) == known["rows"]
    [source] = known["mixture"].values()
    assert source == {"documents": len(texts), "tokens": sum(sizes), "bytes": sum(len(t.encode()) for t in texts)}
    assert known["shards"] == len(list(packed.glob("*.tar")))
    assert known["verified"]["bytes"] == known["bytes"] == sum(p.stat().st_size for p in packed.glob("*.tar"))
    by_src = told(capsys, str(packed))["mixture"]
    assert list(by_src.values()) == [source], "packing counted what the rows hold"


def test_a_decoded_row_is_its_documents_text(
    packed: Path, texts: list[str], tokenizer: Tokenizer, capsys: Capture
) -> None:
    dataset = PackedDataset(packed)
    whole = 0
    for index in (0, 53, len(dataset) - 1):
        row, known = dataset[index], told(capsys, str(packed), sample=index)["sample"]
        assert known["name"] == dataset.sample_id(index) and known["counted"] == int(row.loss_mask.sum())
        assert [[p["begin"], p["end"]] for p in known["pieces"]] == [
            [a, b] for a, b in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True)
        ]
        for piece in known["pieces"]:
            if piece["tokens"] == piece["of"]:
                assert piece["text"] == texts[piece["doc"]] + "<|eos|>"
                whole += 1
    assert whole > 3
    with pytest.raises(InputError, match=rf"--sample {len(dataset)}: .* holds rows 0 to {len(dataset) - 1}"):
        inspect_command(str(packed), sample=len(dataset))


def test_without_the_tokenizer_ids_are_shown(
    packed: Path, tokenizer_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The dataset outlives its tokenizer's folder; another tokenizer's text would be wrong and is refused elsewhere."""
    manifest = read_manifest(packed)
    assert manifest["tokenizer"]["path"] == str(tokenizer_path)
    hidden = tokenizer_path.rename(tokenizer_path.with_name("moved"))
    try:
        known = told(capsys, str(packed), sample=0)["sample"]
        assert "ids only: " in known["why_no_text"] and "--tokenizer" in known["why_no_text"]
        shown = [token for piece in known["pieces"] for token in piece["ids"]]
        assert shown == PackedDataset(packed)[0].tokens.tolist()
        assert "text" in told(capsys, str(packed), sample=0, tokenizer=hidden)["sample"]["pieces"][0]
    finally:
        hidden.rename(tokenizer_path)


def test_the_command(packed: Path, tmp_path: Path, perilune: Run) -> None:
    done = perilune("inspect", str(packed), "--verify", "--sample", "3", "--html", "--out", "page.html")
    assert done.returncode == 0, done.stderr
    assert "Mixture" in done.stdout and "Documents by length" in done.stdout and "whole: " in done.stdout
    assert "Row 3: shard-000000.tar/000000003" in done.stdout and "page: page.html" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and len(page) < 100_000
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "default-src 'none'" in policy[1] and "script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing from a network or another file"
    done = perilune("inspect", str(tmp_path))
    assert done.returncode == 2 and "no manifest.json" in done.stderr and "Traceback" not in done.stderr


def test_images_of_a_row(tmp_path: Path, tokenizer_path: Path, capsys: Capture) -> None:
    """Shown as they were encoded, at their place in the text."""
    import tarfile

    picture = io.BytesIO()
    Image.new("RGB", (56, 30), (200, 30, 30)).save(picture, "PNG")
    about = json.dumps({"texts": ["before ", None, " after"], "images": [None, "0.png", None]}).encode()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {"a.json": about, "a.0.png": picture.getvalue()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = tmp_path / "data"
    pack([str(tmp_path / "x.tar")], data, tokenizer_path, 64)
    known = told(capsys, str(data), sample=0, check=True, html=True, out=tmp_path / "page.html")
    [image] = known["sample"]["images"]
    assert image["patches"] == [4, 4] and image["tokens"] == 4 and image["kind"] == "png"
    assert known["verified"]["rows"] == 1
    text = known["sample"]["pieces"][0]["text"]
    assert re.match(r"before .*⟨image 0: 4 x 4 patches, 4 tokens⟩.* after<\|eos\|>", text)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "56 x 30 pixels" in page


def test_a_host_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_RETRY_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"manifest\.json cannot be read: .*; tried [1-9] times in [01] s"):
        inspect_command("http://127.0.0.1:9/data")
    assert time.monotonic() - begun < 60
