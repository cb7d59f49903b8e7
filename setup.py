"""Perilune installs its top-level folders under one import name, `perilune` (a namespace package without a root)."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("pretrain", "parallel", "moe", "vision", "kernels", "launch")
packages = [f"perilune.{name}" for top in FOLDERS for name in (top, *(f"{top}.{p}" for p in find_packages(top)))]

setup(
    name="perilune",
    version="0.1.0",
    description="Distributed pretraining of MoE language and vision-language models, equal in every layout it accepts",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",  # megatron-core 0.19 needs it; on 3.11 pip silently falls back to 0.16
    packages=packages,
    package_dir={"perilune": "."},
    package_data={
        "": ["py.typed"],
        "perilune.pretrain.report": ["*.html", "*.css", "*.js"],
        "perilune.pretrain.parity": ["*.html"],
        "perilune.pretrain.data": ["*.html"],
        "perilune.pretrain.scaling": ["*.html"],
        "perilune.launch": ["*.j2"],
    },
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.19,<0.20",  # the layer specs and the patch list of parallel/cpu.py are for 0.19
        "numpy",
        "ml_dtypes>=0.5",  # bfloat16 for numpy: an export does without torch
        "packaging",
        "pydantic>=2.7",
        "pyyaml",
        "click>=8.1",
        "rich>=13",
        "psutil",  # Megatron-core's checkpoint writer imports it without declaring it
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "webdataset>=0.2.100",
        "tensorboard",
        "jinja2>=3.1",
        "zstandard",
        "pyarrow",
        "fsspec[http]",
        "pillow",  # images are decoded once while they are packed, so that none that is damaged gets into a row
        "ray[default]>=2.50",
    ],
    extras_require={
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "glyphs": ["matplotlib"],  # its fonts, for `demo:glyphs`
        # Transformer Engine: install all of it or none; the core wheel alone breaks `import megatron.core`.
        "gpu": ["transformer-engine[pytorch,core_cu13]==2.17.1", "flash-attn-4>=4.0.0b36"],
        "scaling": ["matplotlib"],  # `perilune fit`
        "dev": [
            "matplotlib",
            "scipy",
            "transformers>=5.23,<6",
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "selenium>=4.20",  # the report in a browser; without chromium and its driver that test is skipped
            "import-linter",
        ],
    },
    entry_points={"console_scripts": ["perilune = perilune.pretrain.cli:main"]},
)
