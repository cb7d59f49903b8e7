#!/usr/bin/env bash
# The checks that need one GPU, in one call of under eight minutes and without a network; the results go to one JSON.
#
#   tests/gpu/run.sh [FILE.json]     default: $OUT/gpu.json, or runs/gpu.json where OUT is not set
#
# It makes an environment on top of the machine's Python with torch, installs into it what is carried as wheels and
# this checkout, and runs pytest on tests/gpu. Nothing outside of that environment changes. What the JSON holds is in
# tests/gpu/gpu_result.py; a check that was not run is never among its results.
#
# PYTHON    interpreter >= 3.12 with torch (default: the first that is one of python3.12, python3, python, .venv's)
# VENV      folder for the environment, which is kept (default: a temporary one)
# WHEELS    folder of wheels (default: tests/gpu/wheels, filled by tests/gpu/carry.sh)
# LIMIT     seconds that all of it may take (default 450)
# REHEARSE  1: go on without a GPU, to see that everything installs; every check is then skipped
#
# Exit codes: 0 no check failed, or there is no GPU (the JSON says which); 1 a check failed; 2 it could not be set up;
# 3 it was cut off at LIMIT.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
json=$(realpath -m -- "${1:-${OUT:-$root/runs}/gpu.json}")
wheels=$(realpath -m -- "${WHEELS:-$here/wheels}")
limit=${LIMIT:-450}
# A safe path: the checkout's folders are not importable by their bare names. No settings of pip's but these.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { echo "tests/gpu/run.sh: $*" >&2; }

# The path of the first interpreter >= 3.12 for which the Python expression $1 holds; `u` is importlib.util.
find_python() {
    local one candidates=(python3.12 python3 python "$root/.venv/bin/python")
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for one in "${candidates[@]}"; do
        "$one" -c "import importlib.util as u, sys
sys.exit(1) if sys.version_info < (3, 12) or not ($1) else print(sys.executable)" 2>/dev/null && return
    done
    return 1
}

# The run ends here, for the reason $1.
fail_setup() {
    say "$1"
    "$python" "$here/gpu_result.py" end "$json" "not set up: $1"
    exit 2
}

if ! python=$(find_python 'u.find_spec("torch")') && ! python=$(find_python True); then
    reason="not set up: no Python 3.12 or newer among ${PYTHON:-python3.12, python3, python, .venv}; set PYTHON"
    say "$reason"
    mkdir -p "$(dirname "$json")"
    printf '{"outcome": "%s", "checks": [], "not_run": []}\n' "${reason//[\"\\]/_}" >"$json"
    exit 2
fi

code=0
"$python" "$here/gpu_result.py" begin "$json" || code=$?
if [ "$code" = 3 ] && [ "${REHEARSE:-0}" != 1 ]; then
    say "no GPU: nothing was run; $json says so"
    exit 0
fi
if [ "$code" != 0 ] && [ "$code" != 3 ]; then
    say "torch does not see the GPU, or $json cannot be written (exit code $code); PYTHON names another interpreter"
    exit 2
fi

temporary=$(mktemp -d)
trap 'rm -rf -- "$temporary"' EXIT
venv=$(realpath -m -- "${VENV:-$temporary/venv}")

say "environment $venv on $python"
"$python" -m venv --without-pip --system-site-packages "$venv" || fail_setup "no environment in $venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# An environment on top of another one sees only the packages of the interpreter below both: show it the other's.
"$python" - >"$site/machine.pth" <<'END'
import os, sys, sysconfig
own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
for entry in sys.path:
    if os.path.isdir(entry) and ("-packages" in entry or not any(entry.startswith(folder) for folder in own)):
        print(os.path.abspath(entry))
END
install=("$venv/bin/python" -m pip install --quiet --no-cache-dir --no-index --find-links "$wheels")
remedy="fill $wheels by tests/gpu/carry.sh where there is a network"
"${install[@]}" --no-deps -r "$here/needs_no_deps.txt" || fail_setup "pip could not install needs_no_deps.txt; $remedy"
"${install[@]}" -r "$here/needs.txt" || fail_setup "pip could not install needs.txt; $remedy"
"${install[@]}" --no-deps --no-build-isolation --editable "$root" || fail_setup "pip could not install $root"

left=$((limit - SECONDS))
if ((left <= 0)); then
    say "nothing of LIMIT=$limit s is left for the checks"
    "$python" "$here/gpu_result.py" end "$json" "cut off after $limit s, before any check"
    exit 3
fi
say "environment ready after $SECONDS s; the checks have $left s"
code=0
cd "$root"
PERILUNE_GPU_JSON=$json timeout --signal=INT --kill-after=15 "$left" \
    "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider --timeout=120 tests/gpu || code=$?
if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    "$python" "$here/gpu_result.py" end "$json" "cut off after $limit s"
    say "cut off after $limit s; $json names what was not run"
    exit 3
fi
"$python" "$here/gpu_result.py" end "$json" "pytest ended with exit code $code"
say "done after $SECONDS s: $json"
[ "$code" = 0 ] || exit 1
