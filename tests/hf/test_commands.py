"""`perilune export` and `perilune import` as a user runs them, with a tokenizer; their exit codes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import hf_folders as folders
import pytest
import torch
from click.testing import CliRunner, Result

from perilune.parallel.workers import Workers
from perilune.pretrain import checkpoint_files
from perilune.pretrain import config as configs
from perilune.pretrain.cli import main
from perilune.pretrain.data.pack import pack
from perilune.pretrain.data.tokenizer import train_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import verify as checks
from perilune.pretrain.hf.export import export
from perilune.pretrain.hf.importing import import_hf
from perilune.pretrain.schema import Config, Data


def run(*words: str | Path, **variables: str) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env=variables)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`x` from transformers, `ck` imported by the command."""
    home = tmp_path_factory.mktemp("commands")
    folders.write(home / "x", folders.MODELS["mtp 1"])
    done = run("import", home / "x", "--out", home / "ck", "model.seq_aux_loss_alpha=0.001")
    assert done.exit_code == 0, done.output
    assert f"--init-from {home / 'ck'}" in done.output
    return home


def test_import_is_for_any_preset(home: Path) -> None:
    config = configs.resolve("demo", yaml_file=home / "ck/config.yaml")
    assert config.model.hidden_size == folders.TINY.hidden_size and config.model.seq_aux_loss_alpha == 0.001
    assert config.train == configs.resolve("demo").train


def test_export_options(home: Path, tmp_path: Path) -> None:
    done = run("export", home / "ck", "--out", tmp_path / "y", "--dtype", "bf16", "--max-shard-size", "40KB")
    assert done.exit_code == 0, done.output
    x, y = folders.all_tensors(home / "x"), folders.all_tensors(tmp_path / "y")
    for name in x:
        assert torch.equal(y[name], x[name] if name.endswith("bias") else x[name].bfloat16())
    assert len(list((tmp_path / "y").glob("*.safetensors"))) > 2
    config = json.loads((tmp_path / "y/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "words, said",
    [
        (["export", "ck", "--out", "x"], "is there already"),
        (["export", "x", "--out", "y"], "neither a run with a complete checkpoint"),
        (["export", "ck", "--out", "x/config.json/y"], "cannot be made"),
        (["import", "x", "--out", "x/config.json/y"], "cannot be made"),
        (["eval", ".", "--max-rows", "1"], "nor a Hugging Face folder"),
        (["export", "ck", "--out", "y", "--max-shard-size", "lots"], "--max-shard-size 'lots'"),
        (["import", "x", "--out", "ck"], "is there already"),
        (["import", "ck", "--out", "y"], "config.json is missing"),
        (["import", "x", "--out", "y", "model.vocab_size=3"], "by config.json"),
    ],
)
def test_bad_input_is_exit_code_2(words: list[str], said: str, home: Path) -> None:
    words = [str(home / word) if word.partition("/")[0] in ("x", "y", "ck", ".") else word for word in words]
    done = run(*words)
    assert done.exit_code == 2 and said in done.output and done.output.startswith("perilune: error: ")
    assert not (home / "y").exists()


def test_failed_verification_is_exit_code_1(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise checks.VerifyError("logits differ")

    monkeypatch.setattr(checks, "verify", fails)
    done = run("export", home / "ck", "--out", tmp_path / "y", "--verify")
    assert done.exit_code == 1 and "logits differ" in done.output and list(tmp_path.iterdir()) == []


def test_verify_without_transformers_is_refused_before_the_export(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("perilune.pretrain.hf.export.export", lambda *_, **__: pytest.fail("it was written"))
    done = run("export", home / "ck", "--out", tmp_path / "y", "--verify")
    assert done.exit_code == 2 and "--verify needs transformers" in done.output


def test_one_process_of_torchrun_does_it(home: Path, tmp_path: Path) -> None:
    done = run("export", home / "ck", "--out", tmp_path / "y", RANK="1", WORLD_SIZE="2")
    assert done.exit_code == 0 and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def with_data(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint is `ck` and whose data was packed with a tokenizer of 512 tokens."""
    base = tmp_path_factory.mktemp("with_data")
    text = base / "text.md"
    text.write_text((Path(checks.__file__).read_text() + Path(configs.__file__).read_text()) * 2)
    train_tokenizer([str(text)], base / "tok", 512)
    pack([str(text)], base / "packed", base / "tok", 64)
    step = base / "run" / "checkpoints" / "step_00000000"
    shutil.copytree(home / "ck", step)
    model = configs.load(step / "config.yaml").model
    configs.save(Config(model=model, data=Data(path=str(base / "packed"))), step / "config.yaml")
    body = checkpoint_files.read_manifest(step)
    body.pop("format")
    body["files"] |= checkpoint_files.describe(step, ["config.yaml"])
    body["run_state"] = {"step": 0}
    checkpoint_files.write_manifest(step, body)
    return base


def test_tokenizer_of_the_run(with_data: Path, tmp_path: Path, pool: Workers) -> None:
    """It is copied, transformers loads it, and a text is compared as well as random tokens."""
    from transformers import AutoTokenizer, GenerationConfig

    said: list[str] = []
    export(with_data / "run", tmp_path / "y", verified_by=partial(checks.verify, workers=pool, say=said.append))
    assert [line.split(" of ")[1].split(":")[0] for line in said] == ["random tokens", "a text"]
    ours = AutoTokenizer.from_pretrained(tmp_path / "y")
    text = "The perilune, naïvely: 漢字 🙂\n\treturn 1"
    assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    config = json.loads((tmp_path / "y/config.json").read_text())
    ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ids == [ours.bos_token_id, ours.eos_token_id, ours.pad_token_id] == [0, 1, 2]
    assert GenerationConfig.from_pretrained(tmp_path / "y").eos_token_id == 1
    import_hf(tmp_path / "y", tmp_path / "again")  # and comes along where the folder it was imported from is there
    export(tmp_path / "again", tmp_path / "z")
    assert (tmp_path / "z/tokenizer.json").read_bytes() == (with_data / "tok/tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_damaged_tokenizer_of_imported_weights_is_left_out(text: str | None, home: Path, tmp_path: Path) -> None:
    x = shutil.copytree(home / "x", tmp_path / "x")
    (x / "tokenizer.json").write_text("{}")
    if text is not None:
        (x / "tokenizer_config.json").write_text(text)
    import_hf(x, tmp_path / "ck")
    said: list[str] = []
    export(tmp_path / "ck", tmp_path / "y", say=said.append)
    assert "no tokenizer in the export" in said[1] and "tokenizer_config.json" in said[1]
    assert not list((tmp_path / "y").glob("tokenizer*"))
    done = run("generate", x, "--prompt", "a")
    assert done.exit_code == 2 and "tokenizer_config.json" in done.output


def test_the_card_holds_what_the_run_measured_at_that_step(with_data: Path, tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 9.0}, {"step": 0, "loss": 2.5, "valid_loss": 2.0, "valid_bpb": 1.25}]
    (with_data / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 0')
    export(with_data / "run", tmp_path / "y")
    card = (tmp_path / "y/README.md").read_text()
    assert "| Training loss | 2.5000 nats a token, in the last step |" in card
    assert "| Validation | 1.2500 bits a byte, 2.0000 nats a token |" in card
    shutil.copytree(with_data / "run" / "checkpoints" / "step_00000000", tmp_path / "moved")
    export(tmp_path / "moved", tmp_path / "z")
    assert "Training loss" not in (tmp_path / "z/README.md").read_text()


def test_another_tokenizer_is_refused(with_data: Path, tmp_path: Path) -> None:
    base = shutil.copytree(with_data / "tok", tmp_path / "kept")
    try:
        tokenizer = json.loads((with_data / "tok/tokenizer.json").read_text())
        tokenizer["model"]["merges"].pop()
        (with_data / "tok/tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(InputError, match="fingerprint differs"):
            export(with_data / "run", tmp_path / "y")
    finally:
        shutil.copy(base / "tokenizer.json", with_data / "tok/tokenizer.json")
