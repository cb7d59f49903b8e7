#!/usr/bin/env bash
# What both images install; the Dockerfile and perilune.def run it, so that their versions are one list.
# Not built where this was written (no daemon, no GPU): tests/launch/test_images.py reads it and no more.
#
#   install.sh system         as root: compilers and Python 3.12, which is Ubuntu 24.04's own
#   install.sh dependencies   into the virtual environment: torch, Megatron-core, Transformer Engine, flash-attn, apex
#   install.sh perilune DIR   Perilune itself, from its sources in DIR
set -euo pipefail

VENV=/opt/venv
TORCH=2.14.1                # PyPI's is built for CUDA 13.0, as the base image is: extensions must be compiled by that one
MEGATRON_CORE=0.19.2
TRANSFORMER_ENGINE=2.17.1   # setup.py's; all of it, as the core wheel alone breaks `import megatron.core`
FLASH_ATTN_4=4.0.0b36       # setup.py's lowest; a pre-release, which only an exact version lets pip take
APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d  # of NVIDIA's repository; it tags no releases for this torch
ARCHS="9.0;10.0"            # Hopper and Blackwell; fewer compile faster

case "${1:-}" in
system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv g++ git ninja-build ca-certificates
    rm -rf /var/lib/apt/lists/*
    ;;
dependencies)
    python3.12 -m venv "$VENV"
    export PATH="$VENV/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    # What comes later may not exchange the torch that extensions were compiled against.
    printf '%s\n' "torch==$TORCH" "megatron-core==$MEGATRON_CORE" >"$VENV/constraints.txt"
    pip install -c "$VENV/constraints.txt" torch megatron-core "setuptools>=77" wheel packaging ninja pybind11
    export TORCH_CUDA_ARCH_LIST="$ARCHS" MAX_JOBS="${MAX_JOBS:-8}"
    NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="${ARCHS//./}" pip install --no-build-isolation \
        -c "$VENV/constraints.txt" "transformer-engine[pytorch,core_cu13]==$TRANSFORMER_ENGINE"
    pip install -c "$VENV/constraints.txt" "flash-attn-4==$FLASH_ATTN_4"
    # NVIDIA's apex, for fused gradient accumulation. PyPI's `apex` is another project of that name: never `pip install apex`.
    git init -q /tmp/apex
    git -C /tmp/apex fetch -q --depth 1 https://github.com/NVIDIA/apex "$APEX_COMMIT"
    git -C /tmp/apex checkout -q FETCH_HEAD
    (cd /tmp/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$MAX_JOBS" \
        pip install --no-build-isolation --no-deps .)
    rm -rf /tmp/apex
    test -d "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/apex/optimizers"
    ;;
perilune)
    export PATH="$VENV/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    pip install -c "$VENV/constraints.txt" "$2"
    (cd / && perilune --version)
    ;;
*)
    echo "install.sh system | dependencies | perilune DIR" >&2
    exit 2
    ;;
esac
