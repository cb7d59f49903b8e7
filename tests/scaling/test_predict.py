"""Predictions from laws that are known: DeepSeek LLM's own, and fits of trials that were drawn from one."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from perilune.pretrain import config as configs
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.errors import InputError
from perilune.pretrain.plan.counts import scaling_flops
from perilune.pretrain.plan.hardware import flops_per_s
from perilune.pretrain.scaling.laws import read_fit
from perilune.pretrain.scaling.predict import Prediction, Value, predict, run_of, told_of_corpus
from perilune.pretrain.scaling.sizes import size_of
from perilune.pretrain.schema import Config

# DeepSeek LLM's laws (arXiv 2401.02954, section 3; trials of 1e17 to 3e20 FLOPs), as docs/scaling.md has them.
DOCS = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
PUBLISHED: dict[str, Any] = json.loads(DOCS.partition("```json\n")[2].partition("```")[0])


def write(folder: Path, found: dict[str, Any]) -> Path:
    file = folder / "fit.json"
    file.write_text(json.dumps(found))
    return file


@pytest.mark.parametrize(
    ("layers", "hidden", "lr", "batch", "off_lr", "off_batch"),
    [
        (30, 4096, 4.2e-4, 2304 * 4096, 0.015, 0.03),  # 7B
        # 67B: the formula says 3.12e-4 and 20.6M tokens, the paper took 3.2e-4 and 18.9M.
        (95, 8192, 3.2e-4, 4608 * 4096, 0.03, 0.10),
    ],
)
def test_deepseek_llms_formulas_give_its_settings(
    tmp_path: Path, layers: int, hidden: int, lr: float, batch: int, off_lr: float, off_batch: float
) -> None:
    """Of 7B and 67B on 2T tokens (section 2.3): 1.1% and -2.3% off; -2.5% and +9.4%. How it rounded is not said."""
    compute = (72 * layers * hidden**2 + 12 * layers * hidden * 4096) * 2e12
    found = predict(read_fit(write(tmp_path, PUBLISHED)), compute)
    assert found.lr.value == pytest.approx(lr, rel=off_lr)
    assert found.batch_tokens.value == pytest.approx(batch, rel=off_batch)
    assert found.size.value * found.tokens.value == pytest.approx(compute)
    assert found.size.value == pytest.approx(0.1715 * compute**0.5243) and found.lr.interval is None
    # D_opt is published as a law of its own, 5.8316 C^0.4757.
    assert found.tokens.value == pytest.approx(5.8316 * compute**0.4757, rel=1e-3)
    factor = compute / 3e20
    assert f"{factor:,.0f} times the largest trial's 3e+20" in found.warnings[0]


def test_the_docs_show_what_is_printed(tmp_path: Path, perilune: Any) -> None:
    """DeepSeek LLM's laws asked for its 7B on 2T tokens."""
    (tmp_path / "deepseek.json").write_text(json.dumps(PUBLISHED))
    _, _, shown = DOCS.partition("$ perilune predict deepseek.json")
    words, _, said = shown.partition("```")[0].partition("\n")
    done = perilune("predict", "deepseek.json", *words.split())
    assert done.returncode == 0 and done.stdout == said


def test_intervals_are_those_of_the_draws(tmp_path: Path) -> None:
    """Of constants that follow each other the product is known far better than the constants' box says."""
    draws = [[0.1715 * 1e20 ** (-e), 0.5243 + e] for e in (-0.02, -0.01, 0.0, 0.01, 0.02)]
    box = {"k": {"value": 0.1715, "low": 0.06, "high": 0.45}, "exponent": {"value": 0.5243, "low": 0.5, "high": 0.55}}
    with_draws = predict(read_fit(write(tmp_path, PUBLISHED | {"m_opt": box, "draws": {"m_opt": draws}})), 1e20)
    boxed = predict(read_fit(write(tmp_path, PUBLISHED | {"m_opt": box})), 1e20)
    assert with_draws.size.interval == pytest.approx([with_draws.size.value] * 2, rel=1e-9)
    assert boxed.size.interval == pytest.approx((0.06 * 1e20**0.5, 0.45 * 1e20**0.55))
    assert not with_draws.warnings
    told = predict(read_fit(write(tmp_path, PUBLISHED | {"m_opt": box, "warnings": ["alpha cannot be told"]})), 1e20)
    assert told.warnings == ("alpha cannot be told",)
    low, high = boxed.tokens.interval or (0, 0)
    assert (low, high) == pytest.approx((1e20 / (0.45 * 1e20**0.55), 1e20 / (0.06 * 1e20**0.5)))


def test_the_parametric_law_alone_says_size_and_loss(tmp_path: Path) -> None:
    """Hoffmann et al., arXiv 2203.15556: at Gopher's budget, 5.76e23, the third approach says 40B (table 3)."""
    theta = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    found = {
        "per": "params",
        "compute": {"least": 6e18, "most": 3e21},
        "parametric": {k: {"value": v} for k, v in theta.items()},
    }
    said = predict(read_fit(write(tmp_path, found)), 5.76e23)
    assert said.size.value == pytest.approx(40e9, rel=0.2) and said.size.by == "L(N, D)"
    n, d = said.size.value, said.tokens.value
    assert 6 * n * d == pytest.approx(5.76e23)
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    assert said.losses[0].value == pytest.approx(loss)
    for other in (0.8, 1.25):
        assert loss < 1.69 + 406.4 / (n * other) ** 0.34 + 410.7 / (d / other) ** 0.28, "it is the least"
    assert [("DeepSeek LLM" in w and "stands in" in w) for w in said.warnings] == [False, True, True]


def test_numbers_that_cannot_be_held_are_refused(tmp_path: Path) -> None:
    for exponent, message in (("nan", "nan.* must be finite"), (5000.0, "no number that can be held at 1e\\+20")):
        steep = {"k": {"value": 1.0}, "exponent": {"value": exponent}}
        with pytest.raises(InputError, match=message):
            predict(read_fit(write(tmp_path, PUBLISHED | {"m_opt": steep})), 1e20)


def test_laws_of_the_loss_that_disagree_are_told(tmp_path: Path) -> None:
    theta = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    row = list(theta.values())
    for k, apart in ((2.0, True), (2.43, False)):
        law = {"k": {"value": k, "low": 0.99 * k, "high": 1.01 * k}, "exponent": {"value": 0.0}}
        found = PUBLISHED | {"parametric": {name: {"value": value} for name, value in theta.items()}, "loss": law}
        said = predict(read_fit(write(tmp_path, found | {"draws": {"parametric": [row, row]}})), 1e20)
        assert any("disagree by more than their intervals" in warning for warning in said.warnings) == apart, said
        assert any("has no floor" in warning for warning in said.warnings) == apart
    law = {"k": {"value": 1.0}, "exponent": {"value": -0.1}, "E": {"value": 1.69, "low": 1.6, "high": 1.7}}
    said = predict(read_fit(write(tmp_path, found | {"loss": law, "draws": {"parametric": [row, row]}})), 1e20)
    (told,) = [warning for warning in said.warnings if "disagree by more than their intervals" in warning]
    assert "by E + k C^exponent" in told and "no floor" not in told


def test_a_law_with_a_floor(tmp_path: Path) -> None:
    """Its draws hold three constants; without them all corners of the three intervals are possible."""
    law = {
        "k": {"value": 10.0},
        "exponent": {"value": -0.05, "low": -0.06, "high": -0.04},
        "E": {"value": 1.5, "low": 1.0, "high": 2.0},
    }
    said = predict(read_fit(write(tmp_path, PUBLISHED | {"loss": law})), 1e20)
    (loss,) = said.losses
    assert (loss.value, loss.by) == (pytest.approx(1.5 + 10 * 0.1), "E + k C^exponent")
    assert loss.interval == pytest.approx((1 + 10 * 1e20**-0.06, 2 + 10 * 1e20**-0.04))
    rows = [[10.0, -0.05, 1.4], [10.0, -0.05, 1.6]]
    drawn = predict(read_fit(write(tmp_path, PUBLISHED | {"loss": law, "draws": {"loss": rows}})), 1e20)
    assert drawn.losses[0].interval == pytest.approx((2.4 + 0.025 * 0.2, 2.6 - 0.025 * 0.2))
    plain = {name: constant for name, constant in law.items() if name != "E"}
    assert predict(read_fit(write(tmp_path, PUBLISHED | {"loss": plain})), 1e20).losses[0].by == "k C^exponent"
    with pytest.raises(InputError, match=r"draws\.loss: each row has the 2 constants k, exponent"):
        read_fit(write(tmp_path, PUBLISHED | {"loss": plain, "draws": {"loss": rows}}))


def test_each_law_is_told_to_be_asked_beyond_its_own_budgets(tmp_path: Path) -> None:
    """One line a range, not a law; ends of one budget are the same."""
    ends = {"m_opt": (1e18, 1.02e20), "lr_opt": (1e17, 2.95e20), "batch_opt": (1e18, 1e20)}
    found = PUBLISHED | {
        name: PUBLISHED[name] | {"compute": {"least": least, "most": most}} for name, (least, most) in ends.items()
    }
    laws = read_fit(write(tmp_path, found))
    assert laws.laws["m_opt"].to_dict()["compute"] == found["m_opt"]["compute"]
    assert predict(laws, 1e20).warnings == ()
    size = "times the largest budget in the law of the best size and the batch size, 1.02e+20: intervals hold if"
    (within,) = predict(laws, 2e20).warnings
    assert within.startswith(f"2e+20 FLOPs are 2 {size}")
    both = predict(laws, 3e21).warnings
    assert [one.partition(": ")[0] for one in both] == [
        "3e+21 FLOPs are 10 times the largest trial's 3e+20",
        "3e+21 FLOPs are 29 times the largest budget in the law of the best size and the batch size, 1.02e+20",
    ]
    assert predict(laws, 3.1e26).warnings[0].startswith("DO NOT USE THESE NUMBERS: 3.1e+26 FLOPs are 1,033,333 times")
    assert not any("DO NOT" in warning for warning in predict(laws, 2.9e26).warnings)
    assert " are 100 times the largest trial's" in predict(laws, 2.99999e22).warnings[0]
    (below,) = predict(laws, 5e17).warnings
    assert below.endswith("2 times below the smallest budget in the law of the best size and the batch size, 1e+18")


def test_a_loss_without_a_floor_is_told_beyond_its_budgets(tmp_path: Path) -> None:
    wider = {"compute": {"least": 1e17, "most": 1e21}}
    for law, beyond in (({}, True), ({"E": {"value": 1.5}}, False), (wider, False)):
        loss = {"k": {"value": 10.0}, "exponent": {"value": -0.05}} | law
        laws = read_fit(write(tmp_path, PUBLISHED | {"loss": loss}))
        assert any("no floor: too low far beyond" in one for one in predict(laws, 6e20).warnings) == beyond
        assert not predict(laws, 1e20).warnings


# Keys that say a number of tokens of the run, which another length stretches; and those that speak of tokens otherwise:
# of a row, of a part of the run, of what a loss is a mean over.
STRETCHED = {"train.tokens", "train.batch_ramp_tokens", "schedule.warmup_tokens", "data.blend"}
OTHERWISE = {
    "model.num_nextn_predict_layers", "vision.merge_size", "vision.token_share", "contrastive.caption_weight",
    "train.global_batch_size", "data.seq_len", "schedule.bias_freeze_ratio", "parallel.overlap_ep",
}  # fmt: skip


def test_every_key_in_tokens_is_stretched_to_the_length_of_the_run() -> None:
    """A new key that speaks of tokens must be in one of the lists above."""
    found = {
        f"{section}.{name}"
        for section, kind in get_type_hints(Config).items()
        if is_dataclass(kind)
        for line in inspect.getsource(kind).splitlines()
        if ("token" in line or "dict[" in line) and (name := line.strip().split(":")[0]) in kind.__dataclass_fields__
    }
    assert found == STRETCHED | OTHERWISE
    words = [
        "train.steps=0", "train.tokens=1000000", "train.batch_ramp_tokens=200000", "train.batch_ramp_start=2",
        "schedule.warmup_tokens=10000", "data.blend={web: {0: 0.9, 600000: 0.5}, code: 0.1}", "valid.every=0",
    ]  # fmt: skip
    base = configs.resolve("tiny", words)
    size = size_of(base.model, 64, "flops_per_token")
    for times in (0.01, 1, 30):
        said = [Value(value, None, "") for value in (size, times * 1e6, 512, 1e-3)]
        longer = run_of(Prediction(size * times * 1e6, "flops_per_token", *said, (), ()), base, 1)
        assert longer.train.tokens == pytest.approx(times * 1e6)
        assert longer.train.batch_ramp_tokens == pytest.approx(times * 2e5)
        assert longer.schedule.warmup_tokens == pytest.approx(times * 1e4)
        assert longer.data.blend == {"web": {0: 0.9, round(times * 6e5): 0.5}, "code": 0.1}


def test_a_run_that_reads_its_corpus_twice_is_told(packed: Path, tmp_path: Path) -> None:
    def told(path: Path, tokens: int) -> list[str]:
        return told_of_corpus(configs.resolve("tiny", [f"data.path={path}", f"train.tokens={tokens}", "train.steps=0"]))

    held = 64 * int(read_manifest(packed)["rows"])
    (warning,) = told(packed, 3 * held)
    assert (
        f"({3 * held:,} from {packed}, which holds {held:,}). What is read again" in warning and "pack more" in warning
    )
    assert not told(packed, held) and not told(tmp_path / "elsewhere", 3 * held)
    assert not told_of_corpus(configs.resolve("tiny", []))


def test_the_command_writes_a_configuration_of_that_size(tmp_path: Path, perilune: Any) -> None:
    write(tmp_path, PUBLISHED | {"compute": {"least": 1e11, "most": 1e13}})
    words = [
        "predict",
        "fit.json",
        "--compute",
        "1e14",
        "--preset",
        "demo",
        "--out",
        "next.yaml",
        "data.path=/data/train",
    ]
    done = perilune(*words)
    assert done.returncode == 0, done.stderr
    assert "10 times the largest trial's 1e+13" in done.stdout
    _, _, following = done.stdout.partition("next: perilune ")
    assert following == "train demo --config next.yaml valid.path=DIR --nproc 2 --dry-run\n"
    config = configs.resolve("demo", (), tmp_path / "next.yaml")
    m = scaling_flops(config.model, 512)
    assert m == pytest.approx(0.1715 * 1e14**0.5243, rel=0.05)
    assert m * config.train.tokens == pytest.approx(1e14) and config.data.path == "/data/train"
    assert config.optim.lr == pytest.approx(0.3118 * 1e14**-0.125, rel=5e-3)
    assert config.train.global_batch_size == round(0.2920 * 1e14**0.3271 / 512 / 4) * 4  # two ranks of two rows
    plain = perilune(*following.replace("DIR", "/data/valid").split())
    assert plain.returncode == 0, plain.stderr
    assert "never" not in plain.stderr and f"{config.train.tokens:,} tokens" in plain.stdout
    assert "is not written over" in perilune(*words).stderr


def test_a_cluster_for_some_days_is_a_budget(tmp_path: Path, perilune: Any) -> None:
    write(tmp_path, PUBLISHED)
    done = perilune("predict", "fit.json", "--gpus", "64", "--gpu", "h800", "--days", "2", "--mfu", "0.5", "--json")
    assert json.loads(done.stdout)["compute"] == pytest.approx(64 * 989e12 * 0.5 * 2 * 86400)
    assert flops_per_s("A100") == 312e12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--compute C, or --gpus N --gpu NAME --days D; missing: --gpus, --gpu, --days"),
        (["--gpus", "8", "--gpu", "H100"], "missing: --days"),
        (["--gpus", "8", "--gpu", "Voodoo", "--days", "1"], "--gpu Voodoo: its rate is not known.*H100"),
        (["--compute", "1e20", "--days", "3"], "give C, or --gpus"),
        (["--compute", "nan"], "nan is not finite"),
        (["--compute", "inf"], "inf is not finite"),
        (["--gpus", "8", "--gpu", "H100", "--days", "nan"], "nan is not finite"),
        (["--compute", "1e20", "--out", "x.yaml"], "--out needs --preset"),
        (["--compute", "1e20", "--preset", "demo"], "say --out"),
        (["--compute", "1e20", "--preset", "demo", "--out", "x.yaml", "optim.lr=0.1"], "optim.lr is what the fit says"),
    ],
)
def test_questions_that_cannot_be_answered(tmp_path: Path, perilune: Any, words: list[str], message: str) -> None:
    write(tmp_path, PUBLISHED)
    done = perilune("predict", "fit.json", *words)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute": None}, "is no fit.json"),
        ({"m_opt": {"k": {"value": -1}, "exponent": {"value": 0.5}}}, "-1 must be above 0"),
        ({"m_opt": {"k": {}, "exponent": {"value": 0.5}}}, "'value' is missing"),
        ({"per": "apples"}, "per='apples' is neither"),
    ],
)
def test_a_fit_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_fit(write(tmp_path, PUBLISHED | change))


def test_a_fit_without_a_best_size_is_refused(tmp_path: Path) -> None:
    alone = {key: value for key, value in PUBLISHED.items() if key != "m_opt"}
    with pytest.raises(InputError, match="says no best size"):
        predict(read_fit(write(tmp_path, alone)), 1e20)
