#!/bin/sh
# Installs Slurm from Debian's archive, for the tests that have a real job preempted and requeued. They start their own daemons
# on loopback with a configuration of their own, so the packages' services are kept from starting.
# Without root or apt-get the tests that need it are skipped.
set -eu

if command -v slurmctld >/dev/null 2>&1 && command -v slurmd >/dev/null 2>&1 && command -v munged >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Slurm is installed through apt-get as root: the tests against it will be skipped" >&2
    exit 0
fi

# 101: "do nothing" to every package that wants to start its service; taken back at the end, unless it was there before.
POLICY=/usr/sbin/policy-rc.d
if [ ! -e "$POLICY" ]; then
    trap 'rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
fi
export DEBIAN_FRONTEND=noninteractive
if ! apt-get -o Acquire::Retries=3 -qq update ||
    ! apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 -qq install --yes --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null; then
    echo "Slurm could not be installed: the tests against it will be skipped" >&2
fi
