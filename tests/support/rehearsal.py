"""A rehearsal cloud for tests, that can be killed and started again, and that leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waiting import eventually

from holdfast.core.launches import Allowed, Pool, client_token
from holdfast.provider.base import Machine, MachineSpec, Order
from holdfast.provider.local import LocalCloud

__all__ = ["ON_DEMAND", "POOLS", "SPOT", "Rehearsal", "Rehearse"]

SPOT, ON_DEMAND = "local/here/a/small/spot", "local/here/a/small/on-demand"
POOLS: list[dict[str, Any]] = [{"name": SPOT, "capacity": 12, "price": "0.30"}, {"name": ON_DEMAND, "price": "1.00"}]


class Rehearsal:
    """One cloud, that can be killed and started again."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder / "cloud"
        self._config = folder / "cloud-config.json"
        usual = {"pools": POOLS, "types": {"small": {}}, "boot_s": 0.05, "grace_s": 0.5}
        self._config.write_text(json.dumps({**usual, **config}))
        self.cloud = LocalCloud.open(self.folder, self._config)
        self._launches = 0

    def order(self, script: str, *, pool: str = SPOT, **changes: Any) -> Order:
        self._launches += 1
        named = Pool.named(pool)
        fields: dict[str, Any] = {
            "token": client_token(str(self.folder), self._launches),
            "fleet": "fleet",
            "run_id": "run",
            "launch": self._launches,
            "allowed": (Allowed(pool=named, ceiling_microusd_h=2_000_000, on_demand_microusd_h=1_000_000),),
            "spec": MachineSpec(disk_gib=8),
            "user_data": f"#!/bin/sh\n{script}\n",
            "lifetime_s": 3600,
            "expires_unix_s": 4_000_000_000,
        }
        return Order(**{**fields, **changes})

    def launch(self, script: str, **changes: Any) -> Machine:
        return self.cloud.create(self.cloud.request(self.order(script, **changes)))

    def listed(self, machine: Machine) -> Machine:
        (found,) = [each for each in self.cloud.machines("fleet") if each.id == machine.id]
        return found

    def said(self, machine: Machine, what: str) -> None:
        """Wait until its console has it."""
        eventually(lambda: what in self.cloud.console(machine.id), lambda: self.cloud.console(machine.id))

    def gone(self, machine: Machine) -> Machine:
        eventually(lambda: self.listed(machine).state == "gone", lambda: f"{self.listed(machine)}")
        return self.listed(machine)

    def kill(self) -> None:
        """kill -9 of the cloud's server."""
        server = os.pidfd_open(self.cloud.address.pid)
        signal.pidfd_send_signal(server, signal.SIGKILL)
        self._ended(server)

    def stop(self) -> None:
        server = os.pidfd_open(self.cloud.address.pid)
        signal.pidfd_send_signal(server, signal.SIGTERM)
        self._ended(server)

    def restart(self) -> None:
        self.cloud.close()
        self.cloud = LocalCloud.open(self.folder, self._config)

    def _ended(self, server: int) -> None:
        pid = self.cloud.address.pid
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            eventually(lambda: not os.path.exists(f"/proc/{pid}"))
        os.close(server)

    def entries(self, event: str | None = None) -> list[dict[str, Any]]:
        written = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [entry for entry in written if event in (None, entry["event"])]

    def processes(self) -> list[str]:
        """Everything that runs with a word of this cloud's folder in its command line or environment."""
        mark, found = str(self.folder).encode(), []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    parts = [Path("/proc", entry, name).read_bytes() for name in ("cmdline", "environ")]
                except OSError:
                    continue
                if any(mark in part for part in parts):
                    found.append(f"{entry} {parts[0]!r}")
        return found

    def end(self) -> None:
        if LocalCloud.running(self.folder) is None:
            self.restart()
        self.cloud.end()
        eventually(lambda: not self.processes(), lambda: f"still there: {self.processes()}")
        assert list((self.folder / "machines").iterdir()) == []
        assert list((self.folder / "keepers").iterdir()) == []


Rehearse = Callable[..., Rehearsal]
"""Starts a cloud with these settings, and ends it after the test."""
