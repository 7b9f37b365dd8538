"""What `--rdzv-endpoint`, `--rdzv-id` and `--rdzv-conf` say, and what they lead to: the store, and this node's address.

| --rdzv-conf | default | |
|---|---|---|
| keep_alive_interval | 5 | seconds between a node's heartbeats |
| keep_alive_max_attempt | 3 | a node is given up when it has missed so many |
| last_call_timeout | 30 | a job begins so long after `min` nodes are there, or with `max` nodes at once |
| regroup_timeout | 5 | the same when nodes have gone or come |
| join_timeout | 600 | a node that finds no round in this time gives up |
| close_timeout, heartbeat_timeout | 30, 5 | limits of these two operations |
| poll | 1 | seconds for which a node goes by what it has read last |
"""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.elastic.rendezvous.api import RendezvousParameters
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousSettings, RendezvousTimeout

from holdfast.core.clock import SystemClock
from holdfast.core.contract import ENV_RUN
from holdfast.core.errors import UsageError
from holdfast.core.ids import random_token
from holdfast.store.base import is_key
from holdfast.store.open import normalise_url, open_store
from holdfast.store.probe import probe_conditional_writes
from holdfast.train.elastic.backend import ObjectStoreBackend
from holdfast.train.elastic.journal import Journal

__all__ = ["Options", "job_prefix", "open_backend", "own_address", "read_options"]

_DEFAULTS_S: Mapping[str, float] = {
    "keep_alive_interval": 5, "keep_alive_max_attempt": 3, "last_call_timeout": 30, "regroup_timeout": 5,
    "join_timeout": 600, "close_timeout": 30, "heartbeat_timeout": 5, "poll": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """`url`: where the rendezvous lies. `regroup`: the last call of every round but the first of a job's life."""

    url: str
    settings: RendezvousSettings
    regroup: timedelta
    poll_s: float

    @property
    def dead_after(self) -> timedelta:
        """A node that was not heard of for so long is given up."""
        return self.settings.keep_alive_interval * self.settings.keep_alive_max_attempt


def read_options(parameters: RendezvousParameters, environ: Mapping[str, str]) -> Options:
    """Raises UsageError for what makes no sense."""
    url = parameters.endpoint or environ.get(ENV_RUN, "")
    if not url:
        raise UsageError(
            f"--rdzv-backend=holdfast needs --rdzv-endpoint: the URL of the run (s3://bucket/runs/x), or ${ENV_RUN}"
        )
    # `rank` comes from torchrun's --node-rank, which has no meaning here.
    unknown = sorted(set(parameters.config) - set(_DEFAULTS_S) - {"rank", "timeout"})
    if unknown:
        raise UsageError(f"--rdzv-conf: {', '.join(unknown)} is not known; there are {', '.join(_DEFAULTS_S)}")
    number = {name: _number(parameters, name, default) for name, default in _DEFAULTS_S.items()}
    settings = RendezvousSettings(
        parameters.run_id,
        parameters.min_nodes,
        parameters.max_nodes,
        RendezvousTimeout(
            **{
                name: timedelta(seconds=number[f"{name}_timeout"])
                for name in ("join", "last_call", "close", "heartbeat")
            }
        ),
        keep_alive_interval=timedelta(seconds=number["keep_alive_interval"]),
        keep_alive_max_attempt=math.ceil(number["keep_alive_max_attempt"]),
    )
    return Options(normalise_url(url), settings, timedelta(seconds=number["regroup_timeout"]), number["poll"])


def open_backend(options: Options, job: str) -> ObjectStoreBackend:
    """The rendezvous of `job`. Raises StoreUnsafe where two nodes could both win, UsageError, and what the store raises."""
    store = open_store(options.url)
    probe_conditional_writes(store, random_token())
    journal = Journal(store, job_prefix(job), clock=SystemClock(), tokens=random_token)
    # Two calls, one after the other, must fit into the time after which the others give a node up.
    return ObjectStoreBackend(journal, patience_s=options.dead_after.total_seconds() / 2)


def job_prefix(job: str) -> str:
    """Where a job's records lie. An id that no object can be named after is hashed."""
    is_plain = is_key(job) and "/" not in job
    return f"rendezvous/{job if is_plain else 'id-' + hashlib.sha256(job.encode()).hexdigest()[:32]}/"


def own_address() -> str:
    """An address of this machine that others may reach: of the interface that leads out, else its name.

    Connecting a UDP socket sends nothing; 192.0.2.1 is nobody's (RFC 5737).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.getfqdn()


def _number(parameters: RendezvousParameters, name: str, default: float) -> float:
    said = parameters.get(name, default)
    try:
        value = float(said)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < 1e9:
        raise UsageError(f"--rdzv-conf {name}={said}: a number greater than zero is expected")
    return value
