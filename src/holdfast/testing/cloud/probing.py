"""What machines can have of their own here: found out by running one, which takes some hundredths of a second."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from holdfast.core.errors import UsageError
from holdfast.core.launches import Pool
from holdfast.provider.local.wire import CreateRequest
from holdfast.testing.cloud.config import CloudConfig
from holdfast.testing.cloud.hosts import Hosts, Isolation
from holdfast.testing.cloud.keeper import keep
from holdfast.testing.cloud.life import Life
from holdfast.testing.cloud.spec import spec_file

__all__ = ["find_isolation"]

_STATUS = 7
_PROBE = "m-probe"


def find_isolation(folder: Path, config: CloudConfig) -> Isolation:
    """The best that this machine gives. UsageError where more is demanded than there is, and where it would be dangerous."""
    refused = ""
    if config.isolation != "process":
        networks = {"auto": (True, False), "own": (True,), "shared": (False,)}[config.network]
        for own_network in networks:
            for own_uptime in (True, False):
                wanted = Isolation(True, own_network, own_uptime)
                refused = _tried(folder, config, wanted)
                if not refused:
                    return wanted
    if config.isolation == "namespaces" or config.network == "own":
        raise UsageError(f"machines cannot have namespaces of their own here: {refused or 'they are switched off'}")
    if config.isolation == "auto" and os.geteuid() == 0:
        raise UsageError(
            f"machines cannot have namespaces of their own here ({refused}), and without them a machine that root runs could shut "
            f'this one down; start the cloud as another user, or set "isolation": "process" to take that risk'
        )
    return Isolation(False, False, False, refused)


def _tried(folder: Path, config: CloudConfig, isolation: Isolation) -> str:
    """Empty if a machine can be run like that, else what was said."""
    hosts = Hosts(folder, config, isolation)
    request = CreateRequest(
        token="", allowed=[], tags={}, user_data=f"#!/bin/sh\nexit {_STATUS}\n", lifetime_s=0, disk_gib=1,
        disk_type=None, image=None, network={}, role=None, scopes=[], local_ssd=False,
    )  # fmt: skip
    pool = Pool.named(config.pools[0].name)
    life = Life(_PROBE, request, pool, 0, 0, time.monotonic(), 0.0, 0)
    spec = hosts.furnish(life)
    child = os.fork()  # no new interpreter: before the cloud serves it has one thread
    if child == 0:
        status = 1
        with suppress(BaseException):
            os.setsid()
            status = keep(spec_file(folder, spec.id))
        os._exit(status)
    os.waitpid(child, 0)
    end = hosts.collect(_PROBE)
    (folder / "consoles" / f"{_PROBE}.log").unlink(missing_ok=True)
    return "" if (end.cause, end.code) == ("script", _STATUS) else end.said or f"it ended with {end.cause} {end.code}"
