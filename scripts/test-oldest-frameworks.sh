#!/usr/bin/env bash
# Runs the adapters' tests with the oldest frameworks that they are made for, each in a folder in front of the environment's newer one.
# Usage: scripts/test-oldest-frameworks.sh .venv
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

with() { # name, tests, packages
    local folder="$PWD/$venv/oldest/$1" tests=$2
    shift 2
    [ -e "$folder/.installed" ] || { rm -rf "$folder"; "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder" "$@"; touch "$folder/.installed"; }
    # Old releases use what newer versions of others have deprecated.
    PYTHONPATH="$folder" "$venv/bin/pytest" -q -m "not long" -W ignore::DeprecationWarning -W ignore::FutureWarning tests/adapters -k "$tests"
}

with transformers huggingface transformers==5.3.0 tokenizers==0.22.2 huggingface-hub==1.33.0
with lightning lightning lightning==2.4.0 pytorch-lightning==2.4.0
with accelerate accelerate accelerate==1.0.1
