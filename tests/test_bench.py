"""The measurements' own code: one driver for all, and a rival that does the same work as we do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
sys.path.append(str(BENCH))

import rival_losses  # noqa: E402
import run as driver  # noqa: E402

from perilune.parallel.workers import Workers  # noqa: E402
from perilune.pretrain import presets  # noqa: E402
from perilune.pretrain.schema import Precision  # noqa: E402

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


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_rival_from_megatron_core_does_the_same_work(compute: str) -> None:
    """Its loss is ours at the first step, and after an update by its own optimizer."""
    proxy = presets.get("proxy_100m")
    model = replace(
        proxy.model, num_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=128,
        n_routed_experts=8, moe_intermediate_size=32, vocab_size=256, num_nextn_predict_layers=0,
        seq_aux_loss_alpha=0.0,
    )  # fmt: skip
    config = replace(
        proxy,
        model=model,
        precision=Precision(compute=compute),
        data=replace(proxy.data, seq_len=32),  # type: ignore[arg-type]
    )
    with Workers(1) as workers:
        found = workers.run(1, rival_losses.first_losses, config)[0]
    mine = found.pop("ours")
    assert mine[1] < mine[0] and found
    for losses in found.values():
        assert losses == pytest.approx(mine, rel={"fp32": 1e-5, "bf16": 1e-2}[compute])
