"""Ladders: what they plan, and what they refuse; nothing is trained here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.pretrain import config as configs
from perilune.pretrain import presets
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import flops_per_token, scaling_flops
from perilune.pretrain.scaling.ladder import Planned, fingerprints, plan, read_ladder
from perilune.pretrain.scaling.results import Book
from perilune.pretrain.scaling.sizes import scaled, size_of
from perilune.pretrain.schedule import total_tokens
from perilune.pretrain.schema import Model

BASE = """
preset: tiny
set: {data.path: packed/train}
budgets: [3.0e+9, 6.0e+9, 1.2e+10]
sizes:
  a: {model.num_layers: 2, model.hidden_size: 32}
  b: {model.num_layers: 2}
  c: {}
law: {batch: {k: 128, exponent: 0}}
lr: [0.5, 1, 2]
"""


def planned(folder: Path, text: str, world: int = 1) -> list[Planned]:
    file = folder / "ladder.yaml"
    file.write_text(text)
    return plan(read_ladder(file), world)


@pytest.fixture
def here(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "packed").symlink_to(packed.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_trial_is_an_allocation_of_its_budget(here: Path) -> None:
    trials = planned(here, BASE)
    assert len(trials) == 3 * (3 + 2), "the whole grid of learning rates at the middle size alone"
    assert len({trial.name for trial in trials}) == len(trials)
    tiny = presets.get("tiny")
    for trial in trials:
        config = configs.resolve("tiny", trial.words)  # what `train` is told is what was planned
        assert config == trial.config
        c = config.train
        assert (
            trial.tokens == c.steps * c.global_batch_size * 64 and trial.flops_per_token * trial.tokens == trial.compute
        )
        assert trial.compute == pytest.approx(trial.budget, rel=0.025)
        law = 0.3118 * trial.budget**-0.125
        assert min(abs(config.optim.lr / law / times - 1) for times in (0.5, 1, 2)) < 5e-3
        part = tiny.schedule.warmup_tokens / (tiny.train.steps * tiny.train.global_batch_size * 64)
        assert config.schedule.warmup_tokens == pytest.approx(part * trial.tokens, abs=1)
        assert config.valid.every == c.steps and Path(str(config.valid.path)) == (here / "packed" / "valid").resolve()
    assert [trial.budget for trial in trials] == sorted(trial.budget for trial in trials)


def test_the_example_of_the_help_can_be_planned(tmp_path: Path, perilune: Any) -> None:
    _, _, said = perilune("sweep", "--help").stdout.partition("says all keys:\n")
    example = textwrap.dedent(said.partition("\n\n")[0])
    (tmp_path / "ladder.yaml").write_text(example.replace("packed/train", "away/train, valid.path: away/valid"))
    trials = plan(read_ladder(tmp_path / "ladder.yaml"), 1, data_there=False)
    assert len(trials) == 3 * (5 + 4)


def test_batches_are_whole_on_every_data_parallel_rank(here: Path) -> None:
    text = (
        BASE.replace("k: 128, exponent: 0", "k: 320, exponent: 0").replace("3.0e+9, 6.0e+9, ", "")
        + "batch: [0.5, 1, 2]\ngrid: all\n"
    )
    for world in (1, 4):
        rows = {trial.config.train.global_batch_size for trial in planned(here, text, world)}
        assert rows == ({2, 5, 10} if world == 1 else {4, 8}), "0.5 and 1 of 5 rows are both 4 on four ranks"


def test_a_blend_counts_each_dataset(here: Path) -> None:
    half = BASE.replace(
        "data.path: packed/train", "valid.path: packed/valid, data.blend: {packed/train: 0.5, packed/valid: 0.5}"
    )
    with pytest.raises(InputError, match=r"from \S+/valid, which holds .*more tokens than the corpus holds"):
        planned(here, half)
    trials = planned(here, half + "passes: 100\n")
    assert json.loads(next(w for w in trials[0].words if w.startswith("data.blend=")).partition("=")[2]) == {
        str((here / "packed" / name).resolve()): 0.5 for name in ("train", "valid")
    }
    assert configs.resolve("tiny", trials[0].words) == trials[0].config


def test_the_schedule_of_a_blend_keeps_its_parts_in_every_trial(here: Path) -> None:
    """So that all trials are of the same data; and `perilune fit` may put ladders of other budgets beside them."""
    whole = total_tokens(presets.get("tiny").train, 64)
    blend = f"{{packed/train: {{0: 0.9, {whole // 4}: 0.5}}, packed/valid: 0.1}}"
    text = BASE.replace("data.path: packed/train", f"valid.path: packed/valid, data.blend: {blend}") + "passes: 100\n"
    trials = planned(here, text)
    for trial in trials:
        first, _ = trial.config.data.blend.values()
        assert first == {0: 0.9, round(trial.tokens * (whole // 4) / whole): 0.5}
        assert configs.resolve("tiny", trial.words) == trial.config
    assert len({fingerprints(trial.config)["data"] for trial in trials}) == 1
    assert json.loads(fingerprints(trials[0].config)["data"].partition(" ")[2]) == [{"0.0": 0.9, "0.25": 0.5}, 0.1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: [0.5, 1, 2]", "lrs: [1]", "unknown key 'lrs': did you mean lr?"),
        ("budgets: [3.0e+9, 6.0e+9, 1.2e+10]", "", "budgets must be there"),
        ("3.0e+9, 6.0e+9", "-1, 6.0e+9", "budgets: -1 is no number above 0"),
        ("3.0e+9, 6.0e+9", "6.0e+9, 6.0e+9", "each once"),
        ("3.0e+9,", "1.0e+8,", r"1e08_a_lr\S+ \(2 steps of 128 tokens\).*needs 20 steps or more"),
        ("1.2e+10]", "8.0e+10]", r"8e10_a_\S+ \(200,\d+ from \S+/train, which holds 7\d,\d+\).*passes: 2"),
        ("data.path: packed/train", "data.path: nowhere", "no packed dataset at .*: say valid.path under `set`$"),
        ("packed/train}", "packed/train, valid.every: 0}", "set: valid.every=0: a trial's loss is that of its validat"),
        ("data.path: packed/train", "model.num_layers: 2", "data.path or data.blend must stand under `set`"),
        ("packed/train}", "packed/train, optim.lr: 1}", "optim.lr is the ladder's own, by lr and law"),
        ("packed/train}", "packed/train, modle.x: 1}", "unknown key 'modle.x'"),
        ("c: {}", "c: {train.steps: 5}", "keys of the model alone"),
        ("c: {}", "c: {model.num_layers: 0}", "model.num_layers=0 must be at least 1"),
        ("law: {", "law: {lr: nowhere.json, ", "nowhere.json cannot be read as the fit.json"),
        ("law: {", "law: {rate: deepseek, ", "law: 'rate' is none of lr, batch, size"),
        ("lr: [0.5, 1, 2]", "grid: [d]", "grid=\\['d'\\]: middle, all, or a list of names of sizes"),
        ("preset: tiny", "preset: tinny", "did you mean tiny"),
        ("lr: [0.5, 1, 2]", "lr: [0.5, yes]", "lr: 'yes' is no number above 0"),
        ("c: {}", "scale: {}", "sizes: scale stands beside a, b, scale"),
        ("1.2e+10]", "1.2e+10, 1.2049e+10]", "two trials are named 1.2e10_"),
    ],
)
def test_what_cannot_be_is_refused(here: Path, old: str, new: str, message: str) -> None:
    assert old in BASE
    with pytest.raises(InputError, match=message):
        planned(here, BASE.replace(old, new))


def test_a_ladder_that_changed_is_refused(here: Path) -> None:
    trials = planned(here, BASE)
    known = fingerprints(trials[0].config)
    assert known["tokenizer"] == "random" and len(known["data"]) == 25
    Book(here / "sweep", trials, known).begin()
    Book(here / "sweep", trials, known)
    with pytest.raises(InputError, match=r"another ladder: 1.2e10_b_lr\S+ is gone.*and 3 more\. Take the ladder"):
        Book(here / "sweep", planned(here, BASE.replace("lr: [0.5, 1, 2]", "lr: [1]"))[:-1], known)
    with pytest.raises(InputError, match=r"valid\.steps=1"):
        Book(here / "sweep", planned(here, BASE.replace("train}", "train, valid.steps: 1}")), known)
    with pytest.raises(InputError, match=r"data: .* then, 'other' now"):
        Book(here / "sweep", trials, known | {"data": "other"})


def test_a_dry_run_prints_every_trial_with_its_cost(here: Path, perilune: Any) -> None:
    (here / "ladder.yaml").write_text(BASE)
    done = perilune("sweep", "ladder.yaml", "--out", "sweep", "--dry-run", "--rate", "2e9", "--at-once", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    trials = planned(here, BASE)
    for trial, line in zip(trials, lines[1:], strict=False):
        cells = line.split()
        assert cells[0] == trial.name and cells[5] == f"{trial.steps:,}" and cells[6] == "128", line
        work = trial.tokens * flops_per_token(trial.config.model, 64).training
        assert cells[-3:] == [f"{work / 2e9:.0f}", "s", "-"]
    total = sum(trial.compute for trial in trials)
    assert lines[-2].startswith(f"15 trials, {total:.3g} FLOPs") and lines[-1].startswith(
        f"{sum(t.work for t in trials) / 4e9:.0f} s"
    )
    assert not (here / "sweep").exists()
    found = json.loads(perilune("sweep", "ladder.yaml", "--out", "sweep", "--dry-run", "--json").stdout)
    assert [row["tokens"] for row in found["trials"]] == [trial.tokens for trial in trials]
    for words, message in (
        (["--", "--nodes", "2"], "no such option.*--nodes|No such option"),
        (["--", "--dry-run"], "--dry-run belongs to `perilune sweep`"),
        (["--on", "ray", "--", "--nodes", "2"], "--nodes needs --address"),
        (["--", "--restarts", "5"], r"--restarts \(it is --retries here\) belongs to `perilune sweep`"),
    ):
        bad = perilune("sweep", "ladder.yaml", "--out", "sweep", *words)
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1, (words, bad)
        assert re.search(message, bad.stderr), (message, bad.stderr)


def test_what_no_trial_could_be_launched_with_is_refused_before_the_first(here: Path, perilune: Any) -> None:
    (here / "ladder.yaml").write_text(BASE)
    (here / "nothing").mkdir()
    for words, message in (
        (["slurm"], "sbatch is not here"),
        (["slurm", "--", "--time", "5"], r"--time '5': write it as"),
        (["ray", "--", "--address", "ftp://head"], "--address ftp://head: the job server"),
        (["ray", "--", "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
    ):
        bad = perilune("sweep", "ladder.yaml", "--out", "sweep", "--on", *words, PATH=str(here / "nothing"))
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1, (words, bad)
        assert re.search(message, bad.stderr), (message, bad.stderr)
        assert not (here / "sweep").exists()


def test_help_and_dry_run_wait_for_nothing(here: Path, perilune: Any) -> None:
    (here / "ladder.yaml").write_text(BASE)
    code = """
import sys
from perilune.pretrain.cli import main
try: main(["sweep", "ladder.yaml", "--out", "sweep", "--dry-run"])
except SystemExit as end: assert not end.code, end.code
print([name for name in ("torch", "megatron", "scipy", "ray", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert "A ladder; docs/scaling.md" in perilune("sweep", "--help").stdout
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5


def test_m_is_deepseek_llms_of_its_own_models() -> None:
    """72 n d^2 + 12 n d l, of a dense model with plain attention (arXiv 2401.02954, section 3.2; 7B: section 2.3).

    Ours has MLA, whose keys and values come through a latent: with one as wide as both, and the two products with it
    taken away again, it is plain attention.
    """
    n, d, length = 30, 4096, 4096
    model = Model(
        num_layers=n, hidden_size=d, num_attention_heads=32, q_lora_rank=None, kv_lora_rank=1, qk_nope_head_dim=126,
        qk_rope_head_dim=2, v_head_dim=128, intermediate_size=11008, first_k_dense_replace=n, n_routed_experts=0,
        num_nextn_predict_layers=0, vocab_size=102400,
    )  # fmt: skip
    latent = 6 * n * (d * (1 + 2) + 32 * (126 + 128))
    plain = scaling_flops(model, length) - latent + 6 * n * 2 * d * d
    formula = 72 * n * d**2 + 12 * n * d * length
    # The published FFN, 11008, is 0.8% wider than 8/3 d, of which the formula is.
    assert plain == formula + 6 * n * 3 * d * (11008 - 8 * d / 3)
    assert plain == pytest.approx(formula, rel=5e-3)
    assert formula * 2e12 == pytest.approx(8.46e22, rel=1e-3), "the compute of 7B on 2T tokens"


def test_m_counts_the_experts_that_a_token_meets() -> None:
    tiny = presets.get("tiny").model
    more = replace(tiny, n_routed_experts=2 * tiny.n_routed_experts, n_group=2 * tiny.n_group)
    layers = tiny.num_layers - tiny.first_k_dense_replace
    router = 6 * layers * tiny.n_routed_experts * tiny.hidden_size
    assert scaling_flops(more, 64) == scaling_flops(tiny, 64) + router
    assert scaling_flops(replace(tiny, num_nextn_predict_layers=0), 64) == scaling_flops(tiny, 64)
    assert scaling_flops(replace(tiny, vocab_size=9999), 64) == scaling_flops(tiny, 64)


@pytest.mark.parametrize("preset", ["tiny", "demo", "proxy_100m", "moonlight_16b_a3b", "deepseek_v3"])
def test_models_are_scaled_to_a_size(preset: str) -> None:
    config = presets.get(preset)
    base, length = config.model, config.data.seq_len
    coarse = 0.25 if preset == "tiny" else 0.15  # of two layers, heads and widths go in large steps
    for per in ("flops_per_token", "params"):
        whole = size_of(base, length, per)
        assert scaled(base, length, whole, per) == base, "times one changes nothing"
        for factor in (0.3, 3, 20):
            model = scaled(base, length, factor * whole, per)
            assert size_of(model, length, per) == pytest.approx(factor * whole, rel=coarse)
            assert model.n_routed_experts == base.n_routed_experts and model.vocab_size == base.vocab_size
            ratio = (model.hidden_size / model.num_layers) / (base.hidden_size / base.num_layers)
            assert 0.6 < ratio < 1.5, "depth and width grow together"
    with pytest.raises(InputError, match="no model near"):
        scaled(base, length, 1e-9 * size_of(base, length, "params"), "params")
