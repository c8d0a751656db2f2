#!/usr/bin/env bash
# Environment (if needed), ruff, mypy, pytest. Fails if any of them does; pytest's closing line comes last.
#   bash scripts/test.sh                 everything but tests marked slow
#   bash scripts/test.sh -m slow         arguments go to pytest
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh || exit 1

# Small operations on few cores: more threads would wait for each other, tests also start processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

status=0

echo "== ruff check"
.venv/bin/ruff check || status=1

echo "== mypy"
typed=()
for path in util models engine main_mar.py main_rl.py scripts; do
    [ -e "$path" ] && typed+=("$path")
done
.venv/bin/mypy "${typed[@]}" || status=1

echo "== pytest"
[ $status -eq 0 ] || echo "(ruff or mypy failed above: the exit status will not be 0)"
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
.venv/bin/python -m pytest -q "$@" || status=1
exit $status
