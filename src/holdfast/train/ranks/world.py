"""Who this process is among the ranks of its job, and the way to rank 0.

The process group's store is used once, to tell members where the hub is; everything else goes over the hub (hub.py).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from holdfast.core.errors import UsageError

__all__ = ["World", "find_world", "publish", "reachable_host", "whereabouts"]

_ANSWER = timedelta(minutes=5)
_runs_opened = 0


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of the job (`rank` of `size`), and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_alone(self) -> bool:
        return self.size == 1


def find_world(environ: Mapping[str, str]) -> World:
    """From the process group, where there is one. Raises UsageError where a launcher has started several processes and the script
    has not joined them yet."""
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local_size = int(environ.get("LOCAL_WORLD_SIZE") or size)
        return World(rank, size, int(environ.get("LOCAL_RANK") or rank % local_size), local_size)
    started = int(environ.get("WORLD_SIZE") or 1)
    if started > 1:
        raise UsageError(
            f"a launcher has started {started} processes, and this script has not joined them: call "
            "torch.distributed.init_process_group() before the run is restored or its first loop begins"
        )
    return World()


def reachable_host(environ: Mapping[str, str]) -> str:
    """The address of this machine that the others of the job reach: that of the interface towards the rendezvous."""
    target = environ.get("MASTER_ADDR") or "127.0.0.1"
    for family, kind, protocol, _, address in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return "127.0.0.1"


def publish(host: str, port: int, secret: str) -> None:
    """Rank 0 says where its hub is."""
    _group_store().set(_key(), f"{secret} {port} {host}")


def whereabouts() -> tuple[str, int, str]:
    """Host, port and secret, once rank 0 has said them. Raises UsageError when it does not within five minutes."""
    store, key = _group_store(), _key()
    try:
        store.wait([key], _ANSWER)
        secret, port, host = store.get(key).decode().split(" ", 2)
    except (RuntimeError, dist.DistError) as error:
        raise UsageError(
            f"rank 0 has not opened this run within {_ANSWER.seconds} s ({error}). Every rank must make the same holdfast.Run and "
            "restore it, or loop, at the same place"
        ) from None
    return host, int(port), secret


def next_run() -> None:
    """One more run is opened by this process: all ranks open them in the same order."""
    global _runs_opened
    _runs_opened += 1


def _key() -> str:
    return f"holdfast/hub/{_runs_opened}"


def _group_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
