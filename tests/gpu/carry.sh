#!/usr/bin/env bash
# Fetches the wheels from which tests/gpu/run.sh installs on a machine without a network: Linux, Python 3.12, with torch.
#
#   tests/gpu/carry.sh [FOLDER]      default: tests/gpu/wheels, which git ignores
#
# PYTHON    interpreter whose pip fetches (default: the checkout's .venv, else python3)
# MACHINE   x86_64 (default) or aarch64
# LIMIT_MIB what the wheels and git's files of this checkout may take together, in one upload (default 64)
#
# Exit code 1 if something cannot be fetched or it is too much.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
wheels=${1:-$here/wheels}
machine=${MACHINE:-x86_64}
limit=$((${LIMIT_MIB:-64} << 20))
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

# pip takes a wheel only of the platforms that it is told: glibc's versions from 2.17 to that of Debian 13 and Ubuntu 24.
platforms=(--platform "manylinux2014_$machine")
for minor in $(seq 17 39); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done
fetch=("$PYTHON" -m pip download --quiet --disable-pip-version-check --no-input --dest "$wheels" --only-binary=:all:
    --implementation cp --python-version 3.12 "${platforms[@]}")

mkdir -p "$wheels"
rm -f -- "$wheels"/*.whl # two versions of a package would leave the choice to chance
"${fetch[@]}" -r "$here/needs.txt"
"${fetch[@]}" --no-deps -r "$here/needs_no_deps.txt"

ls -l -- "$wheels"
carried=$(cat -- "$wheels"/*.whl | wc -c)
tracked=$(cd "$root" && { git ls-files -z 2>/dev/null || true; } | xargs -0 -r cat -- | wc -c)
echo "$wheels: $carried bytes of wheels, beside $tracked bytes of files in git"
if ((carried + tracked > limit)); then
    echo "$((carried + tracked)) bytes are more than LIMIT_MIB=$((limit >> 20)): leave something out of needs.txt" >&2
    exit 1
fi
