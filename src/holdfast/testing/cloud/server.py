"""The cloud as a server: HTTP in front, one thread that lets things happen when they are due, and a file that says where it is.

Started in a folder that a cloud has used before, it goes on where that one was: the same clock, the machines that still run, and
the ends of those that do not.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import selectors
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from holdfast.core.clock import SystemClock
from holdfast.core.errors import UsageError
from holdfast.provider.local.wire import ADDRESS, Address
from holdfast.testing.cloud.api import Api, billing_rules
from holdfast.testing.cloud.book import Book
from holdfast.testing.cloud.config import CloudConfig
from holdfast.testing.cloud.hosts import Hosts, Isolation
from holdfast.testing.cloud.market import CloudTime
from holdfast.testing.cloud.namespaces import be_reaper
from holdfast.testing.cloud.notices import Endpoints
from holdfast.testing.cloud.probing import find_isolation
from holdfast.testing.cloud.refusals import Lost
from holdfast.testing.cloud.world import World
from holdfast.testing.loopback import Request, listening, reply

__all__ = ["FolderTaken", "Server", "serve"]

_LONGEST_WAIT_S = 60.0
_MOST_BODY_BYTES = 1 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FolderTaken(UsageError):
    """Another cloud runs there."""


class Server:
    """One cloud in one folder. Made by `serve`."""

    def __init__(self, folder: Path, config: CloudConfig, config_folder: Path, isolation: Isolation) -> None:
        self._folder, self._config, self.isolation = folder, config, isolation
        self._book = Book(folder)
        entries = self._book.read()
        self.time, same_boot = _resumed_time(entries, config)
        self._hosts, self._endpoints = Hosts(folder, config, isolation), Endpoints(config.metadata)
        self.world = World(config, config_folder, self.time, self._book, self._hosts, self._endpoints)
        self.world.recall(entries)
        self._closed = threading.Event()
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        self.api = Api(self.world, SystemClock(), secrets.token_hex(16))
        self._open(entries, same_boot)

    def _open(self, entries: list[dict[str, Any]], same_boot: bool) -> None:
        real_s, ours = time.monotonic(), self.time
        opened = {"start_unix_s": ours.start_unix_s, "origin_real_s": ours.origin_real_s, "speed": ours.speed}
        self.world.note(real_s, "opened", boot_id=_boot_id(), clock=opened)
        rules = msgspec.to_builtins(billing_rules(self._config.billing))
        if rules != next((entry["rules"] for entry in reversed(entries) if entry["event"] == "rules"), None):
            self.world.note(real_s, "rules", rules=rules)
        for life in self.world.lives.there():
            if life.booted and not life.idle:
                if not (same_boot and self._hosts.adopt(life.id)):
                    end = self._hosts.collect(life.id)
                    self.world.ended(life.id, end.cause, end.code, real_s)
                else:
                    self._reopen(life.id, real_s)

    def _reopen(self, id: str, real_s: float) -> None:
        """Its endpoint, with what it was told; and what it was asked to do, in case that did not get through."""
        life = self.world.lives.by_id[id]
        self._endpoints.open(life)
        if life.told and life.deadline_real_s is not None:
            self._endpoints.tell(id, "preempt", max(0.0, life.deadline_real_s - real_s))
        if life.ending == "provider":
            self._hosts.unplug(id)
        elif life.ending is not None:
            self._hosts.end(id)

    # What happens by itself.

    def run(self) -> None:
        """Until `close`."""
        while not self._closed.is_set():
            due_real_s = self.world.step(time.monotonic())
            if self.api.is_ending and not self.world.lives.there():
                return
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake, selectors.EVENT_READ)
                with self.world.lock:
                    watched = dict(self._hosts.watched)
                for descriptor in watched:
                    selector.register(descriptor, selectors.EVENT_READ)
                ready = selector.select(min(_LONGEST_WAIT_S, max(0.0, due_real_s - time.monotonic())))
            for key, _ in ready:
                if key.fd in watched:
                    self._collect(watched[key.fd])
                else:
                    with suppress(BlockingIOError):
                        os.read(self._wake, 4096)

    def _collect(self, id: str) -> None:
        with self.world.lock:
            end = self._hosts.collect(id)
            self.world.ended(id, end.cause, end.code, time.monotonic())

    def close(self) -> None:
        """The machines go on."""
        self._closed.set()
        self.wake()

    def wake(self) -> None:
        os.write(self._waker, b"x")

    def release(self) -> None:
        self._endpoints.close_all()
        self._hosts.close()
        self._book.close()

    def handle(self, request: Request) -> None:
        length = request.headers.get("Content-Length", "0")
        size = int(length) if length.isdigit() else 0
        body = request.rfile.read(min(size, _MOST_BODY_BYTES))
        try:
            secret = request.headers.get("Authorization", "")
            reply(request, self.api.answer(request.command, request.path, body, secret))
        except Lost:
            request.close_connection = True
        finally:
            self.wake()


@contextmanager
def serve(folder: Path, config: CloudConfig, config_folder: Path) -> Iterator[Server]:
    """The cloud of this folder, with its address in `cloud.json`. UsageError where one runs already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FolderTaken(f"a cloud runs in {folder} already") from None
    try:
        be_reaper()
        isolation = find_isolation(folder, config)
        server = Server(folder, config, config_folder, isolation)
        with listening(server.handle) as endpoint:
            _write_address(folder, server.api.address(folder, endpoint, _boot_id(), isolation))
            try:
                yield server
            finally:
                (folder / ADDRESS).unlink(missing_ok=True)
        server.release()
    finally:
        os.close(lock)


def _resumed_time(entries: list[dict[str, Any]], config: CloudConfig) -> tuple[CloudTime, bool]:
    """The clock as it was. After another start of this machine it goes on from the newest entry, and no machine can be there."""
    now_s, opened = time.monotonic(), [entry for entry in entries if entry["event"] == "opened"]
    if not opened:
        start = math.floor(time.time()) if config.start_unix_s is None else config.start_unix_s
        return CloudTime(now_s, start, config.speed), True
    before = opened[-1]
    clock = before["clock"]
    if clock["speed"] != config.speed:
        raise UsageError(
            f"this cloud runs at speed {clock['speed']}, not {config.speed}; another speed needs another folder"
        )
    start = int(clock["start_unix_s"])
    if before["boot_id"] == _boot_id():
        return CloudTime(clock["origin_real_s"], start, config.speed), True
    newest = max(int(entry["t"]) for entry in entries)
    return CloudTime(now_s - (newest - start) / config.speed, start, config.speed), False


def _write_address(folder: Path, address: Address) -> None:
    fresh = folder / f"{ADDRESS}.new"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(address))
    os.replace(fresh, folder / ADDRESS)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
