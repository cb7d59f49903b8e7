"""The command: what it says, what it hands on, how it exits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from perilune.pretrain import presets
from perilune.pretrain.cli import main
from perilune.pretrain.errors import InputError, Preempted
from perilune.pretrain.start import Start

HEAVY = ("torch", "megatron", "numpy", "pydantic", "yaml", "ray", "rich", "transformers", "tokenizers", "pyarrow")


class Recorder:
    """Stands in for a command's body: keeps what it was called with, then returns or raises `outcome`."""

    def __init__(self, outcome: Any = 0) -> None:
        self.outcome = outcome
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, outcome: Any = 0) -> Recorder:
    """The body `name` of `perilune.pretrain.<module>` exchanged, so that the command's words alone are tested."""
    recorder, fake = Recorder(outcome), ModuleType(f"perilune.pretrain.{module}")
    setattr(fake, name, recorder)
    monkeypatch.setitem(sys.modules, f"perilune.pretrain.{module}", fake)
    return recorder


def test_help_is_quick_and_imports_nothing_heavy(perilune: Any) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = perilune("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    for command in ("doctor", "tokenizer", "pack", "train", "demo"):
        assert f"\n  {command} " in done.stdout
    assert min(seconds) < 0.5
    code = f"import sys, perilune.pretrain.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("command", [["train"], ["pack"], ["tokenizer", "train"], ["doctor"], ["demo"]])
def test_every_command_has_help(command: list[str]) -> None:
    done = CliRunner().invoke(main, [*command, "--help"])
    assert done.exit_code == 0
    assert "Usage: " in done.output
    if command == ["train"]:
        assert all(name in done.output for name in presets.names())


def test_train_hands_on_every_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = stand_in(monkeypatch, "train_command", "train_command")
    file, weights = tmp_path / "mine.yaml", tmp_path / "step_00000002"
    file.touch()
    weights.mkdir()
    words = ["train", "tiny", "--config", str(file), "train.steps=3", "--run", "r", "--nproc", "2", "--dry-run"]
    words += ["--profile", "optim.lr=-1", "--init-from", str(weights), "--plot", "s.png"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    given = ("tiny", ("train.steps=3", "optim.lr=-1"), file, Path("r"), 2, True, True, Start(weights), Path("s.png"))
    assert body.args == given
    CliRunner().invoke(main, ["train", "tiny"])
    assert body.args == ("tiny", (), None, None, None, False, False, Start(), None)
    CliRunner().invoke(main, ["train", "demo_vlm", "stage=align", "--after", str(weights), "--after", str(tmp_path)])
    assert body.args[-2] == Start(after=(weights, tmp_path))


@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (75, 75, ""),
        (InputError("train.steps=x: no"), 2, "perilune: error: train.steps=x: no\n"),
        (Preempted("step 3"), 75, "perilune: preempted: step 3\n"),
        (KeyboardInterrupt(), 1, "Aborted!\n"),
        (RuntimeError("a fault"), 1, ""),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, outcome: Any, code: int, says: str) -> None:
    stand_in(monkeypatch, "train_command", "train_command", outcome)
    done = CliRunner().invoke(main, ["train", "tiny"])
    assert done.exit_code == code
    assert done.stderr.lstrip("\n") == says
    if isinstance(outcome, RuntimeError):  # a fault of ours keeps its traceback
        assert done.exception is outcome


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train"], "PRESET"),
        (["train", "tiny", "--train.steps=4"], "keys take no dashes"),
        (["train", "tiny", "--dryrun"], "--dry-run"),
        (["train", "tiny", "--config", "none.yaml"], "none.yaml"),
        (["train", "tiny", "--nproc", "0"], "nproc"),
        (["pack", "--out", "o", "--tokenizer", "none", "--seq-len", "64", "demo:stdlib"], "none"),
        (["pack", "--out", "o", "--tokenizer", ".", "--seq-len", "64"], "SRC"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_words_exit_2(monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    body = stand_in(monkeypatch, "train_command", "train_command")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert body.args == ()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "8", "parallel.tp=8"], "parallel.tp=8; of the degrees near it [1, 2, 4] divide"),
        (["train.global_batch_size=6", "train.micro_batch_size=4"], "near it are 4 and 8"),
        (["parallel.cuda_graphs=true"], "set it to false"),
    ],
)
def test_a_dry_run_says_what_would_be_possible(words: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["train", "tiny", "--dry-run", *words])
    assert done.exit_code == 2
    assert says in done.stderr
    assert ("length: " in done.stdout) == (words == ["parallel.cuda_graphs=true"])  # what is not built can be planned


def test_a_dry_run_names_the_stages_and_data_that_are_not_there(tmp_path: Path) -> None:
    away = [f"data.path={tmp_path}/away", "valid.every=0"]
    done = CliRunner().invoke(main, ["train", "demo_vlm", *away, "--dry-run", "--nproc", "2"])
    assert done.exit_code == 0, done.stderr
    assert "stage: joint of text, vit, align, joint, cooldown, long; stage=NAME" in done.stdout
    assert f"{tmp_path}/away: not seen from here" in done.stderr and done.stderr.count("\n") == 1
    assert "data.path=DIR" in CliRunner().invoke(main, ["train", "tiny", "--dry-run"]).stderr


@pytest.mark.parametrize("launcher", [["local"], ["ray"], ["slurm"], ["slurm", "--image", "a.sif"]])
def test_a_launch_without_data_is_refused(launcher: list[str], tmp_path: Path) -> None:
    words = ["launch", *launcher, "--dry-run", "--", "train", "tiny", "--run", str(tmp_path / "run")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "no data are named: set data.path=DIR" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "."], "names no validation set: name a packed dataset by --data"),
        (["eval", ".", "--tasks", "bad.jsonl"], "bad.jsonl:1: keys ['task']; a line is an object with exactly task"),
        (["eval", ".", "--tasks", "bad.jsonl", "--classes", "bad.jsonl"], "bad.jsonl:1: keys"),
        (["eval", ".", "--classes", "bad.jsonl", "--data", "."], 'a line is {"label": "...", "prompts"'),
        (["eval", "folder"], "folder is neither a run with a complete checkpoint"),
        (["generate", "folder", "--prompt", "x"], "folder is neither a run with a complete checkpoint"),
        (["predict", "config.json", "--compute", "1e9"], "it is not JSON"),
        (["predict", "config.json", "--compute", "1e9"], "name the fit.json"),
        (["fit", "absent.csv", "--out", "o"], "cannot be read as CSV: No such file or directory; name a table"),
    ],
)
def test_cheap_errors_come_before_the_imports(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"task": "t"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "perilune.pretrain.evaluate.load", None)  # importing it raises
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and says in done.stderr


@pytest.mark.parametrize("asked", [{}, {"PYTHONWARNINGS": "default"}])
def test_a_quiet_process_warns_of_nothing_unless_asked(asked: dict[str, str]) -> None:
    code = "from perilune.parallel.quiet import quiet; import warnings; quiet(); warnings.warn('news')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert ("news" in done.stderr) == bool(asked)


def test_parity_refuses_a_folder_that_cannot_be_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["parity", "--max-procs", "1", "--out", str(tmp_path / "file" / "parity")])
    assert done.exit_code == 2
    assert "cannot be made" in done.stderr


@pytest.mark.parametrize(
    "words, named", [(["--model", "dense"], "--model dense"), (["--model", "vlm", "--only", "tp2"], "--only 'tp2'")]
)
def test_parity_without_a_layout_to_compare_says_so(words: list[str], named: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["parity", "--max-procs", "1", *words, "--out", str(tmp_path / "parity")])
    assert done.exit_code == 2 and named in done.stderr and "--max-procs" in done.stderr
    assert not (tmp_path / "parity").exists()


def test_an_input_error_is_one_line_in_a_process_of_its_own(perilune: Any) -> None:
    done = perilune("pack", "--out", "o", "--tokenizer", ".", "--seq-len", "64", "missing.txt")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("perilune: error: ")
    assert done.stderr.count("\n") == 1


def test_pack_and_tokenizer_hand_on_every_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = {"rows": 1234, "tokens": 5, "documents": 6, "raw_bytes": 7, "seconds": 0.5, "already_there": False}
    body = stand_in(monkeypatch, "data.pack", "pack", {"train": {**part, "path": "o/train"}})
    words = ["--out", "o", "--tokenizer", str(tmp_path), "--seq-len", "64", "--valid-fraction", "0.5", "a", "b"]
    done = CliRunner().invoke(main, ["pack", *words, "--shuffle", "3", "--rows-per-shard", "9"])
    assert done.exit_code == 0, done.output
    assert body.args == (["a", "b"], Path("o"), tmp_path, 64)
    defaults = {"fim_rate": 0.0, "patch_limit": 4096, "max_patches": None, "workers": None, "buffer_tokens": 1 << 25}
    assert body.kwargs == {"valid_fraction": 0.5, "shuffle_seed": 3, "rows_per_shard": 9, **defaults}
    assert "train: 1,234 rows" in done.output
    assert "o/train" in done.output

    body = stand_in(monkeypatch, "data.tokenizer", "train_tokenizer", Path("t"))
    done = CliRunner().invoke(main, ["tokenizer", "train", "--out", "t", "--vocab-size", "512", "a", "b"])
    assert done.exit_code == 0, done.output
    assert body.args == (["a", "b"], Path("t"), 512)


def test_doctor_and_demo_pass_their_exit_code_on(monkeypatch: pytest.MonkeyPatch) -> None:
    body = stand_in(monkeypatch, "doctor", "main", 1)
    assert CliRunner().invoke(main, ["doctor", "--json"]).exit_code == 1
    assert body.args == (True,)
    body = stand_in(monkeypatch, "demo", "main", 75)
    assert CliRunner().invoke(main, ["demo", "--run", "here"]).exit_code == 75
    assert body.args == (Path("here"),)


def test_the_packed_words_fit_the_real_functions() -> None:
    """The stand-ins above would hide a change of the functions that they stand for."""
    import inspect

    from perilune.pretrain.data.pack import pack
    from perilune.pretrain.data.tokenizer import train_tokenizer

    inspect.signature(pack).bind(["a"], Path("o"), Path("t"), 64, valid_fraction=0.5, shuffle_seed=3, rows_per_shard=9)
    inspect.signature(train_tokenizer).bind(["a"], Path("t"), 512)
