"""`perilune report`: what it reads, what it says, and that nothing in a run can make the page do something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from report_runs import EXPERTS, LAYERS, entry, write_run

from perilune.pretrain import config as configs
from perilune.pretrain.cli import main
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan import vision_counts
from perilune.pretrain.plan.counts import flops_per_token
from perilune.pretrain.plan.frozen import training_flops
from perilune.pretrain.report import describe, environment, page, read, thin

# ---------------------------------------------------------------- short series


@given(
    values=st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=200),
    buckets=st.integers(1, 50),
)
def test_buckets_hold_every_step_once_and_keep_lowest_and_highest(values: list[float], buckets: int) -> None:
    n = len(values)
    columns = {"step": np.arange(1.0, n + 1), "tokens": np.arange(1.0, n + 1), "v": np.array(values), "w": np.ones(n)}
    frame = thin.frame(columns, ["v", "w", "absent"], {"v": 2.0}, buckets)
    assert frame is not None
    covered = [s for a, b in zip(frame["first"], frame["last"], strict=True) for s in range(a, b + 1)]
    assert covered == list(range(1, n + 1))
    assert len(frame["first"]) == min(n, buckets)
    if np.isnan(values).all():
        assert list(frame["series"]) == ["w"]
        return
    series = frame["series"]["v"]
    for i, (a, b) in enumerate(zip(frame["first"], frame["last"], strict=True)):
        inside = [2 * v for v in values[a - 1 : b] if v == v]
        if not inside:
            assert series["mean"][i] is None
            continue
        assert series["mean"][i] == pytest.approx(sum(inside) / len(inside), rel=1e-5, abs=1e-4)
        if "low" in series:
            assert series["low"][i] == pytest.approx(min(inside), rel=1e-5)
            assert series["high"][i] == pytest.approx(max(inside), rel=1e-5)
        else:
            assert n == len(frame["first"])


def test_neighbouring_steps_are_one_span() -> None:
    assert thin.spans(np.array([3.0, 4.0, 5.0, 9.0, 11.0])) == [[3, 5], [9, 9], [11, 11]]
    assert thin.spans(np.array([])) == []


# ---------------------------------------------------------------- reading


def test_lines_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    good = json.dumps(entry(4))
    lines = [good, '{"step": 5, "tok', "[1, 2]", '{"tokens": 3}', "\xff", json.dumps(entry(6)), '{"step": 7, "los']
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write("\n".join(lines).encode("latin-1"))
    got = read.read_run(run, "run", 10)
    assert got.columns["step"].tolist() == [1, 2, 3, 4, 6]
    assert got.notes == ["metrics.jsonl: 4 lines could not be read and left out, the first is line 5"]


def test_a_last_line_still_being_written_is_not_worth_a_word(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        with (run / name).open("a") as stream:
            stream.write('{"step": 4, "l')
    got = read.read_run(run, "run", 10)
    assert got.steps == 3 and not got.notes


def test_what_is_no_number_is_missing_and_a_step_without_loss_is_skipped(tmp_path: Path) -> None:
    changes = {
        2: {"loss": None, "grad_norm": None, "skipped": True},
        3: {"loss": "high", "lr": 10**400},
        4: {"mfu": [1]},
    }
    run = write_run(tmp_path / "run", 4, changes=changes)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "tokens": 20480, "loss": NaN, "lr": 1e999, "new": 7}\n')
    got = read.read_run(run, "run", 10)
    assert np.isnan(got.columns["loss"]).tolist() == [False, True, True, False, True]
    assert got.skipped.tolist() == [False, True, True, False, True]
    assert np.isnan(got.columns["lr"]).tolist() == [False, False, True, False, True]
    assert np.isnan(got.columns["mfu"]).tolist() == [False, False, False, True, True]
    assert got.columns["new"].tolist()[4] == 7 and np.isnan(got.columns["new"][:4]).all()


def test_a_step_that_stands_twice_counts_as_its_later_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(entry(4, loss=1.25)) + "\n")
    got = read.read_run(run, "run", 10)
    assert got.columns["step"].tolist() == [1, 2, 3, 4]
    assert got.columns["loss"][-1] == 1.25
    assert {len(column) for column in got.columns.values()} == {4}


@pytest.mark.parametrize(("steps", "spans"), [(5, 8), (8, 8), (9, 8), (100, 8), (37, 5), (3, 2)])
def test_expert_load_is_summed_over_spans_and_none_is_lost(tmp_path: Path, steps: int, spans: int) -> None:
    run = write_run(tmp_path / "run", steps)
    lines = [json.loads(line)["load"] for line in (run / "expert_load.jsonl").read_text().splitlines()]
    load = read.read_run(run, "run", spans).load
    assert load is not None and load.counts.shape[1:] == (LAYERS, EXPERTS)
    assert len(load.first) <= spans
    covered = [s for a, b in zip(load.first, load.last, strict=True) for s in range(a, b + 1)]
    assert covered == list(range(1, steps + 1))
    for i, (a, b) in enumerate(zip(load.first, load.last, strict=True)):
        inside = np.array(lines[a - 1 : b], dtype=float)
        np.testing.assert_array_equal(load.counts[i], inside.sum(0))
        np.testing.assert_allclose(load.max_vio[i], (inside.max(-1) / inside.mean(-1) - 1).mean(0), rtol=1e-5)


def test_of_a_long_load_file_evenly_spaced_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 500)
    monkeypatch.setattr(read, "WHOLE_LOAD_BYTES", 1000)
    got = read.read_run(run, "run", 20)
    assert got.load is not None and got.load.first[0] == 1 and got.load.last[-1] > 450
    assert np.diff(got.load.last).max() < 60
    assert "40 lines of it, evenly spaced, are shown" in got.notes[0]


def test_load_of_another_shape_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    with (run / "expert_load.jsonl").open("a") as stream:
        stream.write('{"step": 4, "load": [[1, 2]]}\n{"step": 5, "load": [[1], [2, 3]]}\n{"step": 6, "load": null}\n')
    got = read.read_run(run, "run", 10)
    assert got.load is not None and got.load.last == [1, 2, 3]
    assert "3 lines could not be read" in got.notes[0]


def test_codes_keep_load_to_two_percent_from_an_eighth_to_eight_times() -> None:
    ratio = np.array([0.125, 0.5, 0.97, 1.0, 1.41, 4.0, 8.0])
    back = 2.0 ** ((page.codes(ratio).astype(float) - 1) / 254 * 6 - 3)
    np.testing.assert_allclose(back, ratio, rtol=0.02)
    assert page.codes(np.array([0.0, 1e-9, 1e9])).tolist() == [0, 1, 255]


# ---------------------------------------------------------------- what is refused


def test_a_folder_that_is_no_run_ends_with_one_line_and_exit_code_2(
    perilune: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    done = perilune("report", "empty")
    assert (done.returncode, done.stdout) == (2, "")  # type: ignore[attr-defined]
    assert re.fullmatch(r"perilune: error: .*/empty: not a run directory, .*\n", done.stderr)  # type: ignore[attr-defined]


def test_compare_takes_the_folders_that_follow_it(tmp_path: Path) -> None:
    a, b, c, d = (write_run(tmp_path / name, 2) for name in "abcd")
    out = tmp_path / "out.html"
    for words in ([a, "--compare", b, c, "--out", out, "--compare", d], ["--out", out, a, "--compare", b, c, d]):
        done = CliRunner().invoke(main, ["report", *map(str, words)])
        assert (done.exit_code, done.output) == (0, f"report: {out}\n")
        assert [run["name"] for run in json.loads(_Page(out.read_text()).raw["json"])["runs"]] == ["a", "b", "c", "d"]
        out.unlink()
    done = CliRunner().invoke(main, ["report", str(a)])
    assert done.output == f"report: {a / 'report.html'}\n" and (a / "report.html").is_file()


def test_what_cannot_be_compared_or_written_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    for arguments, words in (
        ((run, [tmp_path / "run"]), "named twice"),
        ((tmp_path / "none", []), "no such folder"),
        ((run, [tmp_path / str(i) for i in range(8)]), "9 runs: a report compares at most 8"),
        ((run, [], tmp_path / "nowhere" / "x.html"), "cannot write"),
    ):
        with pytest.raises(InputError, match=words):
            page.write_report(*arguments)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "expert_load.jsonl", "metrics.jsonl"]


# ---------------------------------------------------------------- the page


class _Page(HTMLParser):
    """Elements and attributes as a browser's parser would see them, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self._in = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag if tag in ("script", "style") else ""
        if tag == "script" and dict(attrs).get("id"):
            self._in = "json"

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.raw[self._in] = self.raw.get(self._in, "") + data
        else:
            self.text.append(data)


def _words(parsed: _Page) -> str:
    return " ".join(" ".join(parsed.text).split())


def test_nothing_in_the_page_refers_to_a_network(tmp_path: Path) -> None:
    parsed = _Page(page.write_report(write_run(tmp_path / "run", 30)).read_text())
    assert {tag for tag, _ in parsed.elements} & {"img", "iframe", "object", "embed", "base", "form", "video"} == set()
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name) in (None, "data:,"), f"<{tag} {name}={attributes[name]}>"
        assert not [name for name in attributes if name.startswith("on")], "scripts stand in the script alone"
    assert not re.search(r"url\(|@import|//", parsed.raw["style"])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|sendBeacon|WebSocket|innerHTML|eval\(", parsed.raw["script"])
    assert set(re.findall(r"\w+://[^\"'\s]*", parsed.raw["script"])) == {"http://www.w3.org/2000/svg"}  # a name
    policy = next(a["content"] for t, a in parsed.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none';")


def test_text_that_is_not_unicode_is_spelled_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, starts=[{"step": 0, "cpu": "A\udcffB"}])
    assert "A\\udcffB" in _words(_Page(page.write_report(run).read_text()))


EVIL = "<img src=x onerror=alert(1)>'\"&amp;</script><script>alert(2)<!--"


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    name = EVIL.replace("/", "\N{FRACTION SLASH}")
    start = {"step": 1, "cpu": EVIL, "command": [EVIL], "versions": {EVIL: EVIL}}
    run = write_run(tmp_path / name, 3, f"data.path={EVIL}", starts=[start], changes={2: {EVIL: 1.0}})
    other = write_run(tmp_path / "b" / "<b>", 3, "optim.lr=1e-3")
    for compare in ([], [other]):
        parsed = _Page(page.write_report(run, compare, tmp_path / "out.html").read_text())
        tags = [tag for tag, _ in parsed.elements]
        assert tags.count("script") == 2 and not {"img", "b"} & set(tags)
        figures = json.loads(parsed.raw["json"])
        assert figures["runs"][0]["name"] == name
        assert EVIL in json.dumps(figures["sections"], ensure_ascii=False).replace('\\"', '"')
        assert _words(parsed).count("alert(2)") >= 4


def test_the_first_figures_are_the_runs(tmp_path: Path) -> None:
    changes = {15: {"loss": None, "skipped": True}, 20: {"loss": 3.25, "mtp_loss": 3.5, "memory": 3 << 29}}
    run = write_run(tmp_path / "mine", 20, planned=40, changes=changes)
    words = _words(_Page(page.write_report(run).read_text()))
    for expected in (
        "mine", "preset demo", "not complete: at step 20", "Steps 20 of 40 planned", "Tokens 81.92 k 81,920",
        "Training loss 3.2500 nats/token, step 20", "MTP loss 3.5000 nats/token, step 20",
        "Validation loss 2.5000 nats/token, step 20", "Validation 1.0980 bits/byte, step 20", "MFU 20.0% median",
        "Memory 1.50 GiB peak of the largest rank", "Skipped 1 step loss or gradient not finite",
        "Throughput 2,903 tokens/s, median",
    ):  # fmt: skip
        assert expected in words


def test_a_run_without_a_step_without_experts_or_with_only_nulls_has_a_page(tmp_path: Path) -> None:
    none = write_run(tmp_path / "none", 0)
    (none / "metrics.jsonl").unlink()
    assert "Nothing to draw yet: no step is recorded." in _words(_Page(page.write_report(none).read_text()))
    keys = [key for key in entry(1) if key not in ("step", "tokens")]
    nulls = write_run(tmp_path / "nulls", 3, changes={step: dict.fromkeys(keys) for step in (1, 2, 3)})
    (nulls / "expert_load.jsonl").write_text("")
    words = _words(_Page(page.write_report(nulls, [none]).read_text()))
    assert "Skipped loss or gradient not finite 3 steps" in words
    dense = write_run(tmp_path / "dense", 30, changes={s: {"mfu": None, "aux_loss": None} for s in range(1, 31)})
    (dense / "expert_load.jsonl").unlink()
    words = _words(_Page(page.write_report(dense).read_text()))
    assert "Not recorded, hence not drawn: sequence-wise balance loss, MFU, expert load." in words


def test_a_hundred_thousand_steps_are_a_small_page_that_keeps_every_spike(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    line = json.dumps(entry(0))
    with (run / "metrics.jsonl").open("w") as stream:
        for step in range(1, 100_001):
            spike = line.replace('"loss": 8.0,', '"loss": 99.5,') if step == 61_803 else line
            stream.write(spike.replace('"step": 0, "tokens": 0', f'"step": {step}, "tokens": {step * 4096}') + "\n")
    file = page.write_report(run)
    assert file.stat().st_size < 1_000_000
    (frame,) = json.loads(_Page(file.read_text()).raw["json"])["runs"][0]["frames"]
    at = next(i for i, last in enumerate(frame["last"]) if last >= 61_803)
    assert frame["series"]["loss"]["high"][at] == 99.5 and frame["series"]["loss"]["low"][at] == 8
    assert frame["last"][-1] == 100_000


def test_the_largest_comparison_stays_below_five_megabytes(tmp_path: Path) -> None:
    """Eight runs of DeepSeek-V3's shape: 58 expert layers and MTP's, 256 experts."""
    layers, experts = 59, 256
    (run,) = read.read_runs([write_run(tmp_path / "run", 1500)], page.SPANS)
    counts = np.random.default_rng(0).integers(0, 99, (page.SPANS, layers, experts)).astype(np.float32)
    ends = list(range(1, page.SPANS + 1))
    load = read.Load(ends, ends, counts, counts.max(-1))
    many = [read.Run(**{**vars(run), "load": load, "name": f"run {i}"}) for i in range(page.MAX_RUNS)]
    text = page.render(many)
    assert len(text.encode()) < 5_000_000
    shown = json.loads(_Page(text).raw["json"])["runs"][0]["load"]
    assert len(shown["last"]) >= 10 and shown["last"][-1] == page.SPANS and shown["first"][0] == 1
    assert len(shown["layers"]) == layers


def test_layers_are_named_as_in_checkpoints(tmp_path: Path) -> None:
    parsed = _Page(page.write_report(write_run(tmp_path / "run", 3)).read_text())
    load = json.loads(parsed.raw["json"])["runs"][0]["load"]
    assert load["layers"] == ["layer 1", "layer 2", "layer 3", "MTP layer 1"]


# ---------------------------------------------------------------- facts


def test_differences_are_those_of_the_configurations(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", 3, "optim.lr=0.004")
    b = write_run(tmp_path / "b", 5, "optim.lr=0.001", "model.q_lora_rank=null")
    runs = read.read_runs([a, b], 10)
    expected = configs.diff(runs[0].config, runs[1].config)
    assert list(expected) == ["model.q_lora_rank", "train.steps", "optim.lr"]
    table = describe.differences(runs)
    assert table.head == ["key", "a", "b"]
    assert table.rows == [
        ["model.q_lora_rank", "96", "null"],
        ["train.steps", "3", "5"],
        ["optim.lr", "0.004", "0.001"],
    ]
    assert [row[0] for row in describe.differences(runs[:1]).rows] == ["train.steps"]


def test_counts_have_the_tower_and_are_of_what_trains(tmp_path: Path) -> None:
    """A run of images says how large its tower is, and one with frozen parts what its training costs."""
    vision = "vision.num_layers=2"
    whole = write_run(tmp_path / "whole", 3, vision)
    frozen = write_run(tmp_path / "frozen", 3, vision, "train.freeze=[language_model]")
    runs = read.read_runs([whole, frozen], 10)
    rows = {row[0]: row[1:] for row in describe.counts(runs).rows}
    config = runs[0].config
    seeing = vision_counts.parameters(config.vision, config.model.hidden_size)
    assert rows["vision tower, besides"] == [f"{seeing.tower:,}"] * 2 and seeing.tower > 0
    assert rows["projector, besides"] == [f"{seeing.projector:,}"] * 2
    tokens = 3 * 4096
    costs = [training_flops(run.config).token for run in runs]
    assert rows["so far, images apart"] == [describe.flop(cost * tokens) for cost in costs]
    assert costs[0] == flops_per_token(config.model, config.data.seq_len).training > 1.4 * costs[1]
    plain = describe.counts(read.read_runs([write_run(tmp_path / "plain", 3)], 10))
    assert not [row for row in plain.rows if "tower" in str(row[0])]


def test_the_data_are_the_packed_ones(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name, n in (("news/a.txt", 30), ("news/b.txt", 10), ("code/c.py", 20)):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(f"the {name} moon and its lunar orbit, number {n}; " * n)
    tokenizer = train_tokenizer([str(corpus)], tmp_path / "tok", 300)
    packed = pack([str(corpus)], tmp_path / "packed", tokenizer, 64)["all"]
    size = sum(file.stat().st_size for file in corpus.rglob("*.*"))
    run = write_run(tmp_path / "run", 3, f"data.path={tmp_path / 'packed'}")
    sources, lengths = describe.data(read.read_runs([run], 10))
    assert [row[0] for row in sources.rows] == ["news/a.txt", "code/c.py", "news/b.txt"]
    assert (
        f"3 documents, {size:,} bytes of text, {packed['tokens']:,} tokens in {packed['rows']:,} rows of 64"
        in sources.note
    )
    assert f"Read so far: run 12,288 tokens ({12288 / packed['tokens']:.3g} epochs)." in sources.note
    assert sum(int(row[1].text) for row in lengths.rows if isinstance(row[1], describe.Bar)) == 3
    (tmp_path / "packed" / "manifest.json").write_text("{}")
    (broken,) = describe.data(read.read_runs([run], 10))
    assert not broken.rows and broken.note.startswith("not shown: ")


def test_many_files_are_grouped_by_their_first_folder() -> None:
    files = [{"name": f"top/{group}/{i}.txt", "bytes": size} for group, size in (("a", 1), ("b", 5)) for i in range(12)]
    files.append({"name": "top/x.txt", "bytes": 7})
    manifest = {
        "recipe": {"files": files}, "tokens": 64, "rows": 1, "seq_len": 64, "tokenizer": {"vocab_size": 9},
        "packing": {"documents": 25, "raw_bytes": 79, "document_tokens": 40}, "fingerprint": "f" * 64,
    }  # fmt: skip
    rows = describe._sources("x", manifest).rows
    assert [row[:3] for row in rows] == [["top/b/", "12", "60"], ["top/a/", "12", "12"], ["top/*", "1", "7"]]


def test_each_start_of_a_run_is_recorded_and_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20)
    environment.record(run, world=2, step=0)
    environment.record(run, world=4, step=10)
    starts = environment.read(run)
    assert [(start["world_size"], start["step"]) for start in starts] == [(2, 0), (4, 10)]
    assert starts[0]["versions"]["torch"] and starts[0]["cores"] >= 1 and starts[0]["memory_bytes"] > 1 << 20
    parsed = _Page(page.write_report(run).read_text())
    assert json.loads(parsed.raw["json"])["runs"][0]["starts"] == [0, 10]
    assert "processes 4" in _words(parsed) and f"torch {starts[0]['versions']['torch']}" in _words(parsed)


MALFORMED = [  # inner types of a start that the report takes apart
    {"gpus": 1},
    {"gpus": [{"name": "a"}]},
    {"gpus": [{"name": "a", "memory_bytes": "80 GB"}]},
    {"command": "perilune train"},
    {"command": [1]},
    {"versions": ["torch"]},
    {"variables": None},
    {"memory_bytes": [1]},
    {"memory_bytes": 10**400},
]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"starts": [1]}', '{"starts": {}}', *(json.dumps({"starts": [start]}) for start in MALFORMED)],
)
def test_a_damaged_record_of_the_environment_is_named_not_lost(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", 2)
    (run / environment.NAME).write_text(text)
    with pytest.raises(InputError, match="not a record of environments"):
        environment.record(run, world=1, step=0)
    assert (run / environment.NAME).read_text() == text
    assert "not a record of environments" in _words(_Page(page.write_report(run).read_text()))
