#!/bin/sh
# Installs azurite, the emulator of Azure Blob Storage, into the virtual environment, where the tests look for it.
# Without npm the tests that need it are skipped (HOLDFAST_REQUIRE_SERVERS=1 makes that a failure).
set -eu

# 3.35 is the newest that runs on Node.js 20 and older.
VERSION=3.35.0
TOOLS="${1:-.venv}/tools"

if ! command -v npm >/dev/null 2>&1; then
    echo "npm is not installed: the tests against azurite (Azure Blob Storage) will be skipped" >&2
    exit 0
fi
if grep -qs "\"version\": \"$VERSION\"" "$TOOLS/node_modules/azurite/package.json"; then
    exit 0
fi
# Scripts of packages are not run: azurite needs none of them.
npm install --prefix "$TOOLS" --no-audit --no-fund --ignore-scripts --omit=dev --loglevel=error "azurite@$VERSION"
