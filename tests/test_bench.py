"""The measurements' own code: one driver for all, and a rival that does the same work as we do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
sys.path.append(str(BENCH))

import floors  # noqa: E402
import overlap  # noqa: E402
import rival_losses  # noqa: E402
import run as driver  # noqa: E402
import step  # noqa: E402

from perilune.parallel.workers import Workers  # noqa: E402
from perilune.pretrain import presets  # noqa: E402
from perilune.pretrain.plan import counts  # noqa: E402
from perilune.pretrain.plan.counts import flops_per_token  # noqa: E402
from perilune.pretrain.schema import Config, Precision  # noqa: E402

GOOD: dict[str, Any] = {"name": "pack_vs_tokenizers", "ours": 2.0, "rival": 4.0, "ratio": 0.5, "unit": "MB/s"}
WRITES = "import pathlib, sys; pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text({text!r})\n"


def bench(folder: Path, name: str, text: str, after: str = "") -> None:
    (folder / f"{name}.py").write_text(WRITES.format(text=text) + after)


def drive(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[int, Any]:
    monkeypatch.setattr(driver, "HERE", folder)
    monkeypatch.setattr(driver, "BENCHES", names)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(folder / "bench.json")])
    return driver.main(), json.loads((folder / "bench.json").read_text())


def test_one_that_fails_is_named_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path, "breaks", json.dumps([GOOD]), "sys.exit(3)")
    bench(tmp_path, "garbles", "[1]")
    bench(tmp_path, "empty", "[]")
    bench(tmp_path, "nan", json.dumps([GOOD | {"ratio": float("nan")}]))
    bench(tmp_path, "good", json.dumps([GOOD]))
    (tmp_path / "silent.py").write_text("")
    code, entries = drive(tmp_path, monkeypatch, "breaks", "garbles", "empty", "nan", "silent", "good")
    assert code == 1 and entries == [GOOD]
    said = capfd.readouterr().out
    for name, why in (("breaks", "exit code 3"), ("garbles", "keys"), ("empty", "no list"), ("nan", "finite"),
                      ("silent", "no JSON")):  # fmt: skip
        line = next(line for line in said.splitlines() if f"{name}.py" in line and "failed" in line)
        assert why in line


def test_what_is_left_out_is_a_row_with_its_goal_and_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left_out = {"name": "step_bf16_vs_megatron", "not_measured": "this CPU cannot"}
    bench(tmp_path, "one", json.dumps([GOOD, left_out]))
    code, entries = drive(tmp_path, monkeypatch, "one")
    assert code == 0 and entries == [GOOD]
    assert "keys" in driver.wrong([left_out | {"ratio": 1.0}])
    said = capfd.readouterr().out
    row = next(line for line in said.splitlines() if "step_bf16_vs_megatron" in line)
    assert row.strip("│ ").endswith("not measured here") and ">= 2" in row
    assert "\nnot measured here: this CPU cannot\n" in said


def test_a_step_gives_every_entry_that_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "slow_bf16", lambda: False)
    given = step.names("fp32") + step.names("bf16")
    assert len(set(given)) == len(given)
    assert {
        "step_fp32_vs_transformers", "step_bf16_vs_transformers", "step_fp32_vs_megatron", "step_bf16_vs_megatron",
        "step_rss_vs_transformers", "step_fp32_matmul_fraction", "step_bf16_matmul_fraction",
        "step_fp32_vs_transformers_keep_freed", "step_fp32_vs_megatron_keep_freed",
        "step_rss_recompute_full_vs_none", "step_rss_recompute_v3_vs_none",
    } <= set(given)  # fmt: skip
    monkeypatch.setattr(step, "slow_bf16", lambda: True)
    aimed_at = {name for name in (*driver.AT_LEAST, *driver.AT_MOST) if name.startswith("step_")}
    assert aimed_at <= {*step.names("fp32"), *step.names("bf16")}


def test_a_missed_goal_is_shown_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path, "one", json.dumps([GOOD]))
    bench(tmp_path, "two", json.dumps([GOOD | {"name": "unknown"}, GOOD | {"name": "help_seconds"}]))
    code, entries = drive(tmp_path, monkeypatch, "one", "two")
    assert code == 0 and [one["name"] for one in entries] == ["pack_vs_tokenizers", "unknown", "help_seconds"]
    said = capfd.readouterr().out.splitlines()
    verdict = {name: next(line for line in said if name in line) for name in ("pack_vs", "unknown", "help_seconds")}
    assert "missed" in verdict["pack_vs"] and ">= 0.8" in verdict["pack_vs"]
    assert "met" in verdict["help_seconds"]
    assert "met" not in verdict["unknown"] and "missed" not in verdict["unknown"]


def test_every_bench_is_there() -> None:
    scripts = {path.stem for path in BENCH.glob("*.py")} - {"run", "megatron_local", "matmul", "ablations"}
    assert scripts <= set(driver.BENCHES)


@pytest.fixture(scope="module")
def alone() -> Iterator[Workers]:
    with Workers(1) as workers:
        yield workers


def small(compute: str) -> Config:
    proxy = presets.get("proxy_100m")
    model = replace(
        proxy.model, num_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=128,
        n_routed_experts=8, moe_intermediate_size=32, vocab_size=256, num_nextn_predict_layers=0,
        seq_aux_loss_alpha=0.0,
    )  # fmt: skip
    precision = Precision(compute=compute)  # type: ignore[arg-type]
    return replace(proxy, model=model, precision=precision, data=replace(proxy.data, seq_len=32))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_rival_from_megatron_core_does_the_same_work(compute: str, alone: Workers) -> None:
    """Its loss is ours at the first step, and after an update by its own optimizer."""
    found = alone.run(1, rival_losses.first_losses, small(compute))[0]
    mine = found.pop("ours")
    assert mine[1] < mine[0] and found
    for losses in found.values():
        assert losses == pytest.approx(mine, rel={"fp32": 1e-5, "bf16": 1e-2}[compute])


def test_the_floors_of_a_step_count_all_of_its_work(alone: Workers) -> None:
    """By our own count of a model's FLOPs; and every operation is met, in whatever it is called by now."""
    config = small("fp32")
    found = alone.run(1, rival_losses.counted, config)[0]
    rest = found.pop(floors.REST)
    assert set(found) == set(floors.NAMES) and rest.seconds > 0 and rest.flops == rest.bytes == 0
    assert all(cost.seconds > 0 and cost.flops + cost.bytes > 0 for cost in found.values()), found
    tokens = rival_losses.ROWS * config.data.seq_len
    counted = tokens * flops_per_token(config.model, config.data.seq_len).training
    assert sum(cost.flops for cost in found.values()) == pytest.approx(counted, rel=1e-12)
    # AdamW reads and writes seven numbers of each parameter, and setting its gradient to zero writes one.
    parameters = counts.parameters(config.model).total - config.model.n_routed_experts  # the bias of the one router
    assert found["AdamW"].bytes == 28 * parameters and found["gradients set to zero"].bytes == 4 * parameters


def test_overlap_is_measured_on_the_same_work(alone: Workers) -> None:
    found = alone.run(1, overlap.race, small("fp32"), 1, 1)[0]
    names = ["overlap_grad_reduce_vs_none", "overlap_param_gather_vs_none"]
    assert [one["name"] for one in overlap.entries(found)] == names
    seconds = {"none": 3.0, "grad_reduce": 2.0, "param_gather": 1.5}
    made = overlap.entries({name: [(taken, 1.0)] for name, taken in seconds.items()})
    assert [one["ratio"] for one in made] == [1.5, 2.0]
    with pytest.raises(ValueError, match="grad_reduce"):
        overlap.entries({**found, "grad_reduce": [(1.0, 0.5)]})
