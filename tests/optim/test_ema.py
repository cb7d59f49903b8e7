"""The average of the weights: by its formula and as torch has it, in every layout, in checkpoints, and exported."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import carry_ranks
import ema_ranks as ranks
import hf_folders as folders
import pytest
import torch
from click.testing import CliRunner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perilune.parallel.workers import Workers
from perilune.pretrain.cli import main
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.hf.export import export
from perilune.pretrain.hf.table import blocks
from perilune.pretrain.hf.verify import verify
from perilune.pretrain.plan.ranks import bytes_per_rank
from perilune.pretrain.rules import part_of
from perilune.pretrain.schema import Config, Optim

AVERAGE, MASTER = "optimizer.state.ema.", "optimizer.state.param."
CONFIGS = {
    "one muon": ranks.config_of(name="muon"),
    "dp2 muon": ranks.config_of(name="muon"),
    "tp2 muon": ranks.config_of(name="muon", tp=2),
    "ep2 bf16": ranks.config_of("bf16", ep=2),
    "ep2 bf16 plain": ranks.config_of("bf16", ep=2, zero1=False),
}


def tensors_of(path: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The whole global tensors of a checkpoint, put together by torch's own tool."""
    dcp_to_torch_save(path, scratch / "whole.pt")
    return torch.load(scratch / "whole.pt", weights_only=True)


def averages_in(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}


def weights_in(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is averaged: masters, or the weights where they are in fp32."""
    return {name: state.get(MASTER + name, state[name]) for name in averages_in(state)}


def apart(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The largest difference of two averages, beside how far they have come."""
    return max(float((got[n] - want[n]).norm() / (want[n] - start[n]).norm()) for n in want)


class Trained:
    """What the ranks of a run tell, and the whole tensors of its checkpoints."""

    def __init__(self, by_rank: list[ranks.Run], scratch: Path) -> None:
        self.by_rank, self.paths = by_rank, by_rank[0].paths
        self.states = [tensors_of(path, scratch) for path in self.paths]
        self.averages = [averages_in(state) for state in self.states]
        self.weights = [weights_in(state) for state in self.states]


@pytest.fixture(scope="module")
def trained(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("run")
        found[name] = Trained(workers.run(1 if name.startswith("one") else 2, ranks.trained, config, folder), folder)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_formula_of_the_weights_and_torch_s(name: str, trained: dict[str, Trained]) -> None:
    run = trained[name]
    live = {n for n in run.states[0] if not n.startswith("optimizer.") and "expert_bias" not in n}
    assert run.averages[0].keys() == live
    names = sorted(live)
    module = torch.nn.ParameterList([run.weights[0][n].clone() for n in names])
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ranks.DECAY))
    formula = {n: run.weights[0][n].double() for n in names}
    for step, (weights, averages) in enumerate(zip(run.weights, run.averages, strict=True)):
        with torch.no_grad():
            for parameter, n in zip(module, names, strict=True):
                parameter.copy_(weights[n])
        theirs.update_parameters(module)  # the first time it copies
        for n, of_torch in zip(names, theirs.module, strict=True):
            if step:
                formula[n] = ranks.DECAY * formula[n] + (1 - ranks.DECAY) * weights[n].double()
            assert averages[n].dtype is torch.float32
            torch.testing.assert_close(averages[n], of_torch.detach(), rtol=3e-7, atol=1e-9, msg=n)
            torch.testing.assert_close(averages[n].double(), formula[n], rtol=1e-6, atol=1e-8, msg=n)
    assert all(not torch.equal(run.averages[-1][n], run.weights[-1][n]) for n in names)


@pytest.mark.parametrize("name", ["dp2 muon", "tp2 muon"])
def test_a_layout_has_the_average_of_one_rank(name: str, trained: dict[str, Trained]) -> None:
    got, want = trained[name].averages, trained["one muon"].averages
    assert got[-1].keys() == want[-1].keys()
    assert apart(got[-1], want[-1], want[0]) < 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skipped_step_leaves_it(name: str, trained: dict[str, Trained]) -> None:
    for run in trained[name].by_rank:
        assert run.skipped and run.left and run.average_bytes
        assert run.digests[0]["averages"] != run.digests[1]["averages"]


@pytest.mark.parametrize("name", ["dp2 muon", "ep2 bf16 plain"])
def test_a_resumed_run_goes_on_bitwise(name: str, trained: dict[str, Trained], workers: Workers) -> None:
    found = workers.run(2, ranks.resumed, CONFIGS[name], trained[name].paths[-1])
    assert found == [run.digests for run in trained[name].by_rank]


@pytest.mark.parametrize(
    ("name", "world", "config"),
    [
        ("dp2 muon", 1, ranks.config_of(name="muon", zero1=False)),
        ("one muon", 2, ranks.config_of(name="muon", tp=2, etp=2)),
    ],
)
def test_another_layout_loads_it(
    name: str, world: int, config: Config, trained: dict[str, Trained], workers: Workers, tmp_path: Path
) -> None:
    source = trained[name]
    again = tensors_of(workers.run(world, ranks.copied, config, source.paths[-1], tmp_path / "again")[0], tmp_path)
    assert again.keys() == source.states[-1].keys()
    assert all(torch.equal(again[key], value) for key, value in source.states[-1].items())


def test_it_may_end_and_begin_with_a_resumption(trained: dict[str, Trained], workers: Workers, tmp_path: Path) -> None:
    """One that is not wanted any more is left; where the checkpoint has none it begins as the masters."""
    source = trained["ep2 bf16 plain"]
    without = ranks.config_of("bf16", decay=0.0, ep=2, zero1=False)
    left = workers.run(2, ranks.copied, without, source.paths[-1], tmp_path / "left")[0]
    assert tensors_of(left, tmp_path).keys() == {key for key in source.states[-1] if not key.startswith(AVERAGE)}
    begun = tensors_of(workers.run(2, ranks.copied, CONFIGS["ep2 bf16"], left, tmp_path / "begun")[0], tmp_path)
    assert begun.keys() == source.states[-1].keys()
    assert all(torch.equal(value, source.weights[-1][name]) for name, value in averages_in(begun).items())


@pytest.mark.parametrize("name", ["ep2 bf16", "ep2 bf16 plain"])
def test_the_plan_counts_its_bytes(name: str, trained: dict[str, Trained]) -> None:
    config = CONFIGS[name]
    planned, without = (
        bytes_per_rank(config.model, config.parallel, 0, 2, "bf16", average=average).optimizer
        for average in (True, False)
    )
    for run in trained[name].by_rank:  # ranges of dense weights are cut where they are padded to
        assert run.average_bytes == pytest.approx(planned - without, rel=0.01)
        assert run.state_bytes == pytest.approx(planned, rel=0.01)


# ---------------------------------------------------------------- later stages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(" ".join(f"orbit {n * n}" for n in range(400)))
    tokenizer = train_tokenizer([str(folder / "a.txt")], folder / "tok", 300)
    pack([str(folder / "a.txt")], folder / "packed", tokenizer, 64)
    return folder / "packed"


def stage(name: str, *freeze: str) -> Config:
    config = carry_ranks.config_of(name, "bf16")
    return replace(config, optim=Optim(ema_decay=ranks.DECAY), train=replace(config.train, freeze=freeze))


def test_after_carries_it_on_with_the_weights_that_it_is_of(data: Path, workers: Workers, tmp_path: Path) -> None:
    def saved(name: str, config: Config, moments: bool = True) -> Path:
        return workers.run(1, carry_ranks.save_new, config, tmp_path / name, 3, data, 0, moments)[0]

    def after(name: str, config: Config, *sources: Path) -> tuple[dict[str, torch.Tensor], Path, list[str]]:
        found = workers.run(1, carry_ranks.take_over, config, list(sources), data, tmp_path / name)[0]
        return tensors_of(found["path"], tmp_path), found["path"], found["told"]

    config = stage("text")
    text = saved("text", config)
    other = saved("other", replace(config, train=replace(config.train, seed=11)), moments=False)
    of_text = averages_in(tensors_of(text, tmp_path))

    # The alignment trains all but the language model, whose average waits in the text run for the joint stage.
    align, path, told = after("align", stage("joint", "language_model"), text)
    assert {part_of(name) for name in averages_in(align)} == {"vision_tower", "multi_modal_projector"}
    assert any("averages begin as the weights: vision_tower, multi_modal_projector" in line for line in told)
    joint, _, told = after("joint", stage("joint"), text, path)
    assert any("averages of vision_tower, multi_modal_projector" in line for line in told)
    for name, value in averages_in(joint).items():
        expected = of_text[name] if part_of(name) == "language_model" else align[AVERAGE + name]
        assert torch.equal(value, expected), name

    # Another run's weights have another average, if any: it begins as they are.
    again, _, told = after("again", config, text, other)
    assert all(torch.equal(value, again[name].float()) for name, value in averages_in(again).items())
    assert any("averages begin as the weights: language_model" in line for line in told)


# ---------------------------------------------------------------- export and eval


def expected(state: dict[str, torch.Tensor], config: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An export of the averages in `dtype`, by the hub's names; router biases are the live ones, in fp32."""
    averages = {key: value.to(dtype) for key, value in averages_in(state).items()}
    return {
        b.theirs: b.to_theirs((state[b.ours] if b.fp32 else averages[b.ours])[b.index]) for b in blocks(config.model)
    }


@pytest.mark.parametrize(
    ("name", "asked", "dtype"),
    [
        ("tp2 muon", None, torch.float32),
        ("ep2 bf16", None, torch.bfloat16),
        ("ep2 bf16 plain", "fp32", torch.float32),
    ],
)
def test_an_export_holds_it_exactly(
    name: str, asked: str | None, dtype: torch.dtype, trained: dict[str, Trained], workers: Workers, tmp_path: Path
) -> None:
    """One of them is loaded by transformers besides, and its logits compared."""
    run = trained[name]
    said: list[str] = []
    verified = partial(verify, workers=workers, say=said.append) if dtype is torch.bfloat16 else None
    export(run.paths[-1], tmp_path / "y", dtype=asked, average=True, verified_by=verified)
    want, got = expected(run.states[-1], CONFIGS[name], dtype), folders.all_tensors(tmp_path / "y")
    assert got.keys() == want.keys()
    assert all(got[key].dtype is value.dtype and torch.equal(got[key], value) for key, value in want.items())
    assert any("largest difference" in line for line in said) == (verified is not None)
    assert (
        f"| Weights | their exponential moving average, decay {ranks.DECAY} |" in (tmp_path / "y/README.md").read_text()
    )
    export(run.paths[-1], tmp_path / "last", dtype=asked)
    last = folders.all_tensors(tmp_path / "last")
    assert all(torch.equal(last[key], value) == key.endswith("bias") for key, value in got.items())


def test_an_evaluation_reads_it(trained: dict[str, Trained], workers: Workers) -> None:
    run = trained["ep2 bf16"]
    (found,) = workers.run(1, ranks.evaluated, run.paths[-1])
    assert len(found) > 20
    for key, value in found.items():
        want = run.states[-1][key] if "expert_bias" in key else run.averages[-1][key].bfloat16()
        assert torch.equal(value, want), key


def test_without_it_a_run_is_the_same_and_an_export_of_it_refused(
    trained: dict[str, Trained], workers: Workers, tmp_path: Path
) -> None:
    (without,) = workers.run(1, ranks.trained, ranks.config_of(name="muon", decay=0.0), tmp_path / "run")
    path, state = without.paths[-1], tensors_of(without.paths[-1], tmp_path)
    with_it = {key: value for key, value in trained["one muon"].states[-1].items() if not key.startswith(AVERAGE)}
    assert state.keys() == with_it.keys() and all(torch.equal(state[key], value) for key, value in with_it.items())
    for words in (["export", str(path), "--out", str(tmp_path / "y"), "--ema"], ["eval", str(path), "--ema"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2 and "--ema" in done.output and "optim.ema_decay=0;" in done.output
    assert not (tmp_path / "y").exists()
    export(path, tmp_path / "y")
    done = CliRunner().invoke(main, ["eval", str(tmp_path / "y"), "--ema"])
    assert done.exit_code == 2 and "holds one set of weights" in done.output
