"""Tells systemd how the agent is doing (`Type=notify`): READY, STATUS, WATCHDOG, STOPPING, as datagrams to a socket that it names.

Outside of systemd nothing happens. A message that cannot be sent is dropped: the command matters more than who watches it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

from holdfast.core.clock import Clock

__all__ = ["ServiceManager"]


class ServiceManager:
    """Takes its variables out of the environment, so that the command does not take the messages for its own to send."""

    def __init__(self, environment: MutableMapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us, watchdog_pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        is_meant = watchdog_pid in ("", str(os.getpid()))
        self.every_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and int(watchdog_us) and is_meant else None
        """How often systemd wants to hear that the agent lives; None where it does not."""
        self._pet_s = clock.monotonic_s()
        self._status = ""

    def ready(self, status: str) -> None:
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def look(self) -> None:
        """Say that the agent lives, when it is time to."""
        if self.every_s is not None and self._clock.monotonic_s() - self._pet_s >= self.every_s:
            self._pet_s = self._clock.monotonic_s()
            self._send("WATCHDOG=1")

    def stopping(self, within_s: float) -> None:
        """The command has been told to stop, and has this long: systemd shall not kill it before."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A name that begins with "@" lies in the abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.setblocking(False)
            out.sendto(message.encode(), address)
