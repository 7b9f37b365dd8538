#!/bin/sh
# Makes .venv-bench: the peers that benchmarks/checkpoint.py compares with, and holdfast itself, editable. Run again after a change
# of benchmarks/requirements.txt; otherwise it does nothing. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-bench
stamp=$venv/.installed
if [ -f "$stamp" ] && [ "$stamp" -nt benchmarks/requirements.txt ] && [ "$stamp" -nt constraints.txt ]; then
    exit 0
fi
"${PYTHON:-python3}" -m venv "$venv"
echo '*' > "$venv/.gitignore"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    -c constraints.txt -r benchmarks/requirements.txt -e '.[demo]' ministack
touch "$stamp"
