#!/bin/sh
# Installs `ip` from Debian's archive, for the tests that cut a node off from the others: each node is a network namespace.
# Without root or apt-get those tests are skipped.
set -eu

if command -v ip >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "ip is installed through apt-get as root: the tests with network namespaces will be skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! apt-get -o Acquire::Retries=3 -qq update ||
    ! apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 -qq install --yes --no-install-recommends \
        iproute2 >/dev/null; then
    echo "ip could not be installed: the tests with network namespaces will be skipped" >&2
fi
