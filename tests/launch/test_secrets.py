"""A canary for a secret: in the environment it is used from, and nowhere else."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from perilune.launch import job
from perilune.pretrain import secrets as kept
from perilune.pretrain.cli import main

NAMES = ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_TEST_TOKEN", "SLURM_JWT")


@pytest.fixture
def canary() -> str:
    return f"canary{secrets.token_hex(16)}"


@pytest.fixture
def held(canary: str) -> dict[str, str]:
    """The environment of somebody who has secrets."""
    return dict.fromkeys(NAMES, canary) | {"NCCL_PROXY_OF_TEST": f"http://me:{canary}@proxy:3128"}


def assert_nowhere(canary: str, folder: Path, *texts: str) -> None:
    """Nor in base64, whatever its offset there."""
    forms = [canary.encode(), *(base64.b64encode(b"x" * i + canary.encode())[4:-4] for i in range(3))]
    for text in texts:
        assert not any(form in text.encode() for form in forms), text
    for file in folder.rglob("*"):
        assert not any(form in str(file).encode() for form in forms), file
        if file.is_file():
            content = file.read_bytes()
            assert not any(form in content for form in forms), file


def test_a_run_writes_no_secret_down(
    packed: Path, canary: str, held: dict[str, str], perilune: Any, tmp_path: Path
) -> None:
    words = ["train", "tiny", f"data.path={packed}", "train.steps=2", "train.global_batch_size=2", "--run", "run"]
    done = perilune(*words, **held)
    assert done.returncode == 0, done.stderr
    page = perilune("report", "run", **held)
    assert page.returncode == 0, page.stderr
    names = {file.name for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert {"config.yaml", "environment.json", "report.html", "job.json", "where.json", "rank_0.log"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert_nowhere(canary, tmp_path, done.stdout, done.stderr, page.stdout, page.stderr)
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert start["variables"]["NCCL_PROXY_OF_TEST"] == "http://***@proxy:3128"
    assert "NCCL_TEST_TOKEN" not in start["variables"]


LAUNCHERS = {"local": ["--nproc", "2"], "slurm": ["--nodes", "2"], "ray": ["--procs-per-node", "2"]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_dry_run_of_a_launch_shows_no_secret(
    launcher: str, as_json: list[str], packed: Path, canary: str, held: dict[str, str], perilune: Any, tmp_path: Path
) -> None:
    options = [*LAUNCHERS[launcher], "--dry-run", *as_json, "--env", "SHOWN=yes"]
    done = perilune("launch", launcher, *options, "--", "train", "tiny", f"data.path={packed}", "--run", "run", **held)
    assert done.returncode == 0, done.stderr
    assert "SHOWN" in done.stdout
    assert_nowhere(canary, tmp_path, done.stdout, done.stderr)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", ["NAME_TOKEN", "WANDB_API_KEY", "db_password", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_by_env_is_refused(
    launcher: str, name: str, packed: Path, canary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    options = [*LAUNCHERS[launcher], "--dry-run", "--env", f"{name}={canary}"]
    done = CliRunner().invoke(main, ["launch", launcher, *options, "--", "train", "tiny", f"data.path={packed}"])
    assert done.exit_code == 2, done.output
    assert name in done.output and "export it in the environment" in done.output
    assert_nowhere(canary, tmp_path, done.output)


def test_a_proxy_with_its_password_by_env_is_refused(canary: str, tmp_path: Path) -> None:
    with pytest.raises(job.JobError, match="HTTPS_PROXY: its URL carries a secret") as refused:
        job.Job(("train", "tiny"), tmp_path, env={"HTTPS_PROXY": f"http://me:{canary}@proxy:3128"})
    assert canary not in str(refused.value)
    job.Job(("train", "tiny"), tmp_path, env={"HTTPS_PROXY": "http://proxy:3128", "TOKENIZERS_PARALLELISM": "false"})


URLS = (
    "https://me:{}@host/packed",
    "https://{}@host/packed",
    "s3://key:{}@bucket/packed",
    "https://bucket.s3.amazonaws.com/packed?X-Amz-Credential=a&X-Amz-Signature={}&X-Amz-Date=1",
    "https://storage.googleapis.com/packed?X-Goog-Signature={}",
    "https://account.blob.core.windows.net/packed?sv=2024&sig={}",
    "https://host/packed?access_token={}",
)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["data.path={}", "valid.path={}", "data.blend={{'{}': 1.0}}"])
def test_a_url_with_a_credential_is_refused_before_anything_is_written(
    url: str, key: str, canary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    word = key.format(url.format(canary))
    for words in (["train", "tiny", word], ["launch", "local", "--dry-run", "--", "train", "tiny", word]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2, done.output
        assert "carries a credential" in done.output and "***" in done.output
        assert_nowhere(canary, tmp_path, done.output)
    assert list(tmp_path.iterdir()) == []


def test_a_url_with_a_credential_in_a_file_of_keys_is_refused(canary: str, perilune: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "mine.yaml").write_text(f"data:\n  path: https://me:{canary}@host/packed\n")
    done = perilune("train", "tiny", "--config", "keys/mine.yaml", "--dry-run")
    assert done.returncode == 2 and canary not in done.stdout + done.stderr
    packing = perilune(
        "pack", "--out", "o", "--tokenizer", "keys", "--seq-len", "8", f"https://me:{canary}@host/a.jsonl"
    )
    assert packing.returncode == 2 and "carries a credential" in packing.stderr
    assert canary not in packing.stdout + packing.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize(
    "text",
    [
        "/data/me@home:1/packed",
        "s3://bucket/a@b:c",
        "https://host:8080/packed?version=3",
        "https://user@host/x",
        "a:b@c",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert kept.hidden(text) == text


def test_one_rule_for_names() -> None:
    """`launch` imports nothing of ours, so the pattern is written twice."""
    assert kept.NAME.pattern == job.SECRET.pattern


def test_a_secret_is_told_from_a_setting() -> None:
    for name in NAMES:
        assert name == "SLURM_JWT" or kept.NAME.search(name), name
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "NCCL_IB_HCA", "MONKEY"):
        assert not kept.NAME.search(name), name
