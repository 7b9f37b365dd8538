"""Orders to try things with, and a process that dies at a chosen call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import boto3

from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import MachineSpec, Order

SCRIPT = "#!/bin/sh\nexec holdfast machine --run s3://bucket/runs/gpt --launch 1\n"
EXPIRES_UNIX_S = 4_000_000_000


def allowed(kind: str = "c5.large", zone: str = "us-east-1a", market: str = "spot", ceiling: int = 60_000) -> Allowed:
    pool = Pool("aws", zone[:-1], zone, kind, "spot" if market == "spot" else "on-demand")
    return Allowed(pool=pool, ceiling_microusd_h=ceiling, on_demand_microusd_h=85_000)


def order(fleet: str, launch: int = 1, **changes: Any) -> Order:
    usual = Order(
        token=client_token(f"{fleet}/run", launch),
        fleet=fleet,
        run_id="run",
        launch=launch,
        allowed=(allowed(),),
        spec=MachineSpec(disk_gib=20),
        user_data=SCRIPT,
        lifetime_s=3600,
        expires_unix_s=EXPIRES_UNIX_S,
        tags={"team": "vision"},
    )
    return replace(usual, **changes)


class Died(BaseException):
    """The process ends here: nothing catches it."""


class Mortal:
    """A boto3 session whose process can die at its n-th call: before it is sent, or when it was answered and nobody has read that.

    It makes each client once: the SDK takes long to read its own models.
    """

    def __init__(self) -> None:
        self.session, self.clients = boto3.Session(), dict[str, Any]()
        self.calls, self.dies_at, self.answered = 0, -1, False
        self.session.events.register("before-send", self._before)
        self.session.events.register("response-received", self._after)

    def client(self, service: str, **options: Any) -> Any:
        config = options["config"]
        key = repr((service, options["region_name"], options["endpoint_url"], config.read_timeout, config.retries))
        if key not in self.clients:
            self.clients[key] = self.session.client(service, **options)
        return self.clients[key]

    def die_at(self, call: int, *, answered: bool = False) -> None:
        """Count from here; -1: live on."""
        self.calls, self.dies_at, self.answered = 0, call, answered

    def _before(self, **_: Any) -> None:
        if self.calls == self.dies_at and not self.answered:
            self.dies_at = -1
            raise Died
        self.calls += 1

    def _after(self, **_: Any) -> None:
        if self.calls == self.dies_at + 1 and self.answered:
            self.dies_at = -1
            raise Died
