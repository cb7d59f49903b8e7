"""The images cannot be built on every machine: their text is held to setup.py, and to what an image must not do."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "launch" / "images"
INSTALL = (IMAGES / "install.sh").read_text()
PINS = dict(re.findall(r"^([A-Z_0-9]+)=(\S+)", INSTALL, re.MULTILINE))
TOP = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
FOLDERS = {"pretrain", "parallel", "moe", "vision", "kernels", "launch"}
INSTRUCTIONS = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "CMD"}


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, words) in their order: comments out, continued lines as one."""
    lines = [line for line in (IMAGES / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def sections() -> dict[str, list[str]]:
    """The Apptainer recipe: its header as `header`, and each %section's lines."""
    found: dict[str, list[str]] = {"header": []}
    name = "header"
    for line in (IMAGES / "perilune.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name].append(line.strip())
    return found


def asked() -> dict[str, Requirement]:
    found = [Requirement(text) for text in metadata.requires("perilune") or []]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.parametrize(
    ("pin", "name"),
    [
        ("TORCH", "torch"),
        ("MEGATRON_CORE", "megatron-core"),
        ("TRANSFORMER_ENGINE", "transformer-engine"),
        ("FLASH_ATTN_4", "flash-attn-4"),
    ],
)
def test_versions_are_those_of_setup_py(pin: str, name: str) -> None:
    assert asked()[name].specifier.contains(Version(PINS[pin]), prereleases=True)


def test_all_of_transformer_engine_is_installed() -> None:
    extras = ",".join(sorted(asked()["transformer-engine"].extras, reverse=True))
    assert f'"transformer-engine[{extras}]==$TRANSFORMER_ENGINE"' in INSTALL


def test_the_torch_that_extensions_are_compiled_against_stays() -> None:
    code = re.sub(r"\\\n\s*", "", INSTALL)
    pips = [
        line for line in code.splitlines() if re.search(r"\bpip install", line) and not line.strip().startswith("#")
    ]
    assert len(pips) == 5
    for line in pips:
        assert '-c "$VENV/constraints.txt"' in line or "--no-deps" in line, line


def test_apex_is_nvidias_at_a_commit() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", PINS["APEX_COMMIT"])
    assert "https://github.com/NVIDIA/apex" in INSTALL
    code = [line for line in INSTALL.splitlines() if not line.strip().startswith("#")]
    assert not any(re.search(r"pip install\b.*\bapex\b", line) for line in code), "PyPI's is another project"


def test_the_script_is_bash_and_says_how_it_is_used() -> None:
    assert subprocess.run(["bash", "-n", IMAGES / "install.sh"], check=False).returncode == 0
    done = subprocess.run([IMAGES / "install.sh"], capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode == 2 and "install.sh system | dependencies | perilune DIR" in done.stderr


def test_the_dockerfile_is_made_of_known_instructions_and_what_is_there() -> None:
    assert {name for name, _ in dockerfile()} == INSTRUCTIONS
    copied = set()
    for name, words in dockerfile():
        if name == "COPY" and not words.startswith("--from=build"):
            *sources, target = shlex.split(words)
            assert target.startswith("/") and all((ROOT / source).exists() for source in sources), words
            copied |= set(sources)
    assert copied == TOP | FOLDERS | {"launch/images/install.sh"}


def test_both_have_one_base_and_it_is_pinned() -> None:
    (base,) = [words.partition("=")[2] for name, words in dockerfile() if name == "ARG"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu24\.04", base)
    assert sections()["header"] == ["Bootstrap: docker", f"From: {base}"]
    assert all(words.split()[0] == "${BASE}" for name, words in dockerfile() if name == "FROM")
    assert base.split(":")[1].split(".")[0] == "13" and "core_cu13" in INSTALL


def test_the_apptainer_recipe_installs_the_same() -> None:
    found = sections()
    files = dict(line.split() for line in found["files"])
    assert set(files) == TOP | FOLDERS | {"launch/images/install.sh"}
    assert all((ROOT / source).exists() and target.startswith("/") for source, target in files.items())
    assert [line.split()[-1] for line in found["post"][:2]] == ["system", "dependencies"]
    assert set(found) == {"header", "files", "post", "environment", "runscript", "test"}


def test_the_container_runs_as_no_root() -> None:
    (user,) = [words for name, words in dockerfile() if name == "USER"]
    last = max(i for i, (name, _) in enumerate(dockerfile()) if name in ("RUN", "COPY"))
    assert user == "perilune" and dockerfile().index(("USER", user)) > last


def test_no_secret_goes_in() -> None:
    text = INSTALL + (IMAGES / "Dockerfile").read_text() + "\n".join(sections()["post"])
    assert not re.search(r"(?i)(token|password|_key)\s*=", text)
    assert not any(words.startswith((".", "/ ")) for name, words in dockerfile() if name == "COPY"), (
        "never a whole folder"
    )
    rules = [line for line in (IMAGES / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything stays out"
    assert {rule[1:] for rule in rules if rule[0] == "!"} == TOP | FOLDERS
    out = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    for name in (".git", ".env", ".netrc", "site.env", "id.pem", "tls.key", "__pycache__"):
        assert any(fnmatch.fnmatch(name, rule) for rule in out), name


@pytest.mark.parametrize("file", ["Dockerfile", "perilune.def", "install.sh"])
def test_each_says_that_it_was_not_built(file: str) -> None:
    assert "not built" in (IMAGES / file).read_text().lower()
