#!/usr/bin/env bash
# Makes .venv with the packages of requirements.txt; does nothing if they are in it already.
# Works from any folder. Used by scripts/test.sh and scripts/quickstart.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3.11
record=.venv/requirements.sha256

is_python311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

if [ -x .venv/bin/python ] && ! is_python311 .venv/bin/python; then
    echo "error: .venv was made with another Python than 3.11; remove it and run this again" >&2
    exit 1
fi
if ! [ -x .venv/bin/pip ]; then
    if ! is_python311 "$python"; then
        echo "error: $python was not found (or does not run). StructMAR needs Python 3.11: install it" \
            "(apt install python3.11 python3.11-venv, pyenv install 3.11, conda create -n py311 python=3.11)" \
            "so that '$python' is on the PATH" >&2
        exit 1
    fi
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

wanted=$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
if [ "$(cat "$record" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi
echo "setup: installing requirements.txt into .venv (a few minutes the first time; PyTorch is the largest part)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
echo "$wanted" >"$record"
echo "setup: .venv is ready"
