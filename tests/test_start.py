"""What a command imports before it answers: seconds that a user waits, asserted by what is in memory at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perilune.parallel import late_compile
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer

SEQ_LEN, VOCAB = 64, 512  # of the preset tiny


def imported(code: str, *names: str) -> list[str]:
    """Which of `names` are in memory at the end of `code`, in a process of its own."""
    code += f"\nimport sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = eval(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.md"
    text.write_text(Path(late_compile.__file__).read_text() * 2)
    train_tokenizer([str(text)], folder / "tok", VOCAB)
    pack([str(text)], folder / "packed", folder / "tok", SEQ_LEN)
    return folder / "packed"


@pytest.fixture(scope="module")
def first_step(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one step, and what of Megatron-core and the compiler it imported."""
    run = tmp_path_factory.mktemp("runs") / "run"
    code = f"""
import os
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="")
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from perilune.pretrain.cli import main
keys = ["data.path={packed}", "train.steps=1", "train.global_batch_size=1"]
try: main(["train", "tiny", *keys, "--run", {str(run)!r}])
except SystemExit as end: assert not end.code, end.code
"""
    return run, imported(code, "megatron.core", "torch._inductor.compile_fx")


def test_help_imports_neither_torch_nor_megatron_nor_numpy() -> None:
    code = "from perilune.pretrain.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert imported(code, "click", "torch", "megatron", "numpy", "yaml", "pydantic") == ["click"]


def test_the_launcher_checks_a_run_and_its_data_without_torch(packed: Path, tmp_path: Path) -> None:
    """It would wait for what each of its processes imports once more."""
    code = f"""
from perilune.launch import local
from perilune.pretrain.cli import main
local.run = lambda job, to_stderr, prepare_run: print("started", job.procs_per_node) or 0
try: main(["train", "tiny", "data.path={packed}", "train.steps=1", "--run", {str(tmp_path / "run")!r}])
except SystemExit as end: assert not end.code, end.code
"""
    assert imported(code, "perilune.pretrain.data.stream", "torch", "megatron") == ["perilune.pretrain.data.stream"]
    assert imported("import perilune.launch.agent", "torch", "perilune.launch.job") == ["perilune.launch.job"]


def test_a_training_process_starts_without_the_compiler() -> None:
    """And without this, Megatron-core imports it: if not, `parallel/late_compile.py` has become needless."""
    compilers = ("torch._inductor.compile_fx", "torch._dynamo.convert_frame")
    late = "from perilune.parallel.late_compile import import_megatron_core as late; late()\n"
    check = "import gc, torch; assert torch.compile.__module__ == 'torch' and gc.isenabled()\n"
    assert imported(f"{late}import perilune.pretrain.run\n{check}", "megatron.core", *compilers) == ["megatron.core"]
    assert imported("import megatron.core.models.gpt", *compilers) == list(compilers)


def test_what_is_compiled_late_is_compiled_once_and_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiler(function: Any, **options: Any) -> Any:
        asked.append((function.__name__, options))
        return lambda *arguments: ("compiled", function(*arguments))

    def double(x: int) -> int:
        "Twice."
        return 2 * x

    plain = late_compile._when_called(compiler, False, double)
    decorated = late_compile._when_called(compiler, False, dynamic=True)(double)
    assert asked == [] and plain.__doc__ == "Twice."
    assert [plain(1), plain(2), decorated(3)] == [("compiled", 2), ("compiled", 4), ("compiled", 6)]
    assert asked == [("double", {}), ("double", {"dynamic": True})]
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert plain(1) == 2, "inside of a function that is being compiled it is a part of that"
    assert late_compile._when_called(compiler, True, double) is double and len(asked) == 2


def test_a_first_step_on_a_cpu_compiles_nothing(first_step: tuple[Path, list[str]]) -> None:
    """TorchDynamo's front is imported by torch's optimizers; its back, TorchInductor, by nothing of a run."""
    run, found = first_step
    assert found == ["megatron.core"]
    assert (run / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_imports_no_torch(dtype: str, first_step: tuple[Path, list[str]], tmp_path: Path) -> None:
    """It takes longer than many an export. The run's tokenizer comes along."""
    words = ["export", str(first_step[0]), "--out", str(tmp_path / "hf"), "--dtype", dtype]
    code = f"""
from perilune.pretrain.cli import main
try: main({words})
except SystemExit as end: assert not end.code, end.code
"""
    modules = ("perilune.pretrain.hf.export", "tokenizers", "torch", "megatron", "transformers")
    assert imported(code, *modules) == ["perilune.pretrain.hf.export", "tokenizers"]
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "hf").iterdir()}


def test_text_is_generated_without_the_compiler(first_step: tuple[Path, list[str]]) -> None:
    code = f"""
from perilune.pretrain.cli import main
try: main(["generate", {str(first_step[0])!r}, "--prompt", "def", "--max-new-tokens", "2"])
except SystemExit as end: assert not end.code, end.code
"""
    assert imported(code, "megatron.core", "torch._inductor.compile_fx") == ["megatron.core"]
