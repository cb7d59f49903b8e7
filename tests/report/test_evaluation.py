"""The report's section on images: the newest evaluation, its pictures, and nothing that a file can do to the page."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import write_run

from perilune.pretrain.report.page import write_report

FIGURES = {
    "step": 20,
    "time": "2026-11-26T20:00:00+00:00",
    "captions": {"captions": 30, "exact_match": 0.5, "exact_match_stderr": 0.0928, "exact_match_blanked": 0.1,
                 "exact_match_blanked_stderr": None},
    "retrieval": {"images": 30, "texts": 20, "image_to_text": {"1": 0.25, "5": 0.75},
                  "text_to_image": {"1": 0.3, "5": 0.8}},
    "zero_shot": {"classes": 20, "images": 30, "left_out": 0, "accuracy": {"1": 0.25}},
}  # fmt: skip


def png(colour: int, side: int = 40) -> str:
    out = io.BytesIO()
    Image.new("RGB", (side, 2 * side), (colour, 0, 0)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def answer(number: int, right: bool, **changes: Any) -> dict[str, Any]:
    said = f"moon {number}" if right else f"sun {number}"
    return {"sample": f"shard-000000.tar/{number:09d}", "image": 0, "expected": f"moon {number}", "said": said,
            "blanked": "star", "right": right, "png": png(number), **changes}  # fmt: skip


def evaluated(run: Path, name: str, figures: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(figures))
    (run / "eval" / f"{name}.answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))


class Page(HTMLParser):
    """Elements of the page's section on images, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        found = re.search(r'<section id="evaluation">.*?</section>', text, re.DOTALL)
        self.feed(found[0] if found else "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", 20)


def page(*runs: Path) -> Page:
    return Page(write_report(runs[0], runs[1:]).read_text())


def test_figures_and_pictures_of_the_newest(run: Path) -> None:
    evaluated(run, "b", FIGURES | {"time": "2026-11-25T20:00:00+00:00", "step": 19}, [answer(9, False)])
    answers = [answer(n, n % 2 == 0) for n in range(40)] + [answer(99, True, png=None)]
    evaluated(run, "a", FIGURES, answers)
    evaluated(run, "c", {"step": 20, "time": "2026-11-27T20:00:00+00:00", "validation": {}}, [])  # of text alone
    found = page(run)
    text = " ".join(found.text)
    for part in ("50.0% ± 9.3%", "10.0%", "25.0%", "75.0%", "30.0%", "zero-shot among 20 classes, top 1", "30, 20"):
        assert part in text
    assert len(found.sources) == 24 and all(source.startswith("data:image/png;base64,") for source in found.sources)
    seen = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in found.sources]
    numbers = [image.convert("RGB").getpixel((0, 0))[0] for image in seen]  # type: ignore[index]
    assert numbers == [*range(0, 24, 2), *range(1, 24, 2)] and seen[0].size == (40, 80)
    assert "moon 5" in text and "sun 5" in text and "Right answers" in text and "Wrong answers" in text


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other, text = write_run(tmp_path / "other", 20), write_run(tmp_path / "text", 20)
    for number, one in enumerate((run, other)):
        figures = FIGURES | {"captions": FIGURES["captions"] | {"exact_match": 0.4 + 0.2 * number}}  # type: ignore[operator]
        evaluated(one, "a", figures, [answer(n, True) for n in range(20)])
    found = page(run, other, text)
    assert {"40.0% ± 9.3%", "60.0% ± 9.3%", "Right answers of run", "Right answers of other"} <= set(found.text)
    assert len(found.sources) == 8  # no more than of one run
    assert not page(text).tags


def test_hostile_files_do_nothing(run: Path) -> None:
    evil = '</dd></section><script>alert(1)</script><img src="http://x/">'
    turned = "\u202eevil\u0000"
    answers = [
        answer(0, True, expected=evil, said=evil, sample='"><script>'),
        answer(1, False, expected=turned + "long" * 999),
        answer(2, True, png="<svg onload=alert(1)>"),
        answer(3, True, png=base64.b64encode(b"<svg onload='alert(1)'></svg>").decode()),
        answer(4, True, png=png(4, 2000)),
    ]
    odd = {"captions": {"captions": evil, "exact_match": True, "exact_match_blanked": 10**400}, "retrieval": [1],
           "zero_shot": {"accuracy": {evil: 0.5}}, "time": evil}  # fmt: skip
    evaluated(run, "a", odd, answers)
    with (run / "eval" / "a.answers.jsonl").open("a") as stream:
        stream.write("[" * 100_000 + "\nnot json\n[1]\n")
    (run / "eval" / "broken.json").write_text("{")
    (run / "eval" / "list.json").write_text("[]")
    text = write_report(run).read_text()
    assert text.count("<script") == 2 and "<svg onload" not in text and "http://x/" in text
    found = Page(text)
    assert found.tags.count("img") == 3 and "script" not in found.tags
    assert "100.0%" not in " ".join(found.text)
    assert evil in found.text and "\\u{202e}evil␀" in " ".join(found.text)
    assert max(map(len, found.text)) <= 200
    big = Image.open(io.BytesIO(base64.b64decode(found.sources[1].partition(",")[2])))
    assert max(big.size) <= 256
    assert "eval/broken.json could not be read" in text and "eval/list.json could not be read" in text
