"""Finds the cloud that runs in a folder, or starts one there. It is a process of its own, in a session of its own: it outlives its
starter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from holdfast.core.errors import ProviderError
from holdfast.provider.local.wire import EXIT_TAKEN, Address, read_address

__all__ = ["BILL", "SERVER", "find", "find_or_start"]

SERVER, BILL = "holdfast.testing.cloud", "holdfast.testing.cloud.bill"
"""Started by name: this floor does not know them."""
_START_S = 60.0
_POLL_S = 0.02
_ASK_S = 10.0


def find(folder: Path) -> Address | None:
    """The address of the cloud that runs there; None: there is none."""
    address = read_address(folder)
    if address is None or address.boot_id != _boot_id():
        return None
    try:
        httpx.get(f"{address.endpoint}/offers", timeout=_ASK_S, trust_env=False)
    except httpx.ConnectError:
        return None
    except httpx.HTTPError:
        pass  # something listens; calls will say more
    return address


def find_or_start(folder: Path, config: Path | None) -> Address:
    """ProviderError with what the server said, where it does not start."""
    if (found := find(folder)) is not None:
        return found
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    said = folder / "server.log"
    command = [sys.executable, "-m", SERVER, str(folder), *([] if config is None else ["--config", str(config)])]
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    give_up_s = time.monotonic() + _START_S
    while time.monotonic() < give_up_s:
        ended = server.poll()
        if (address := find(folder)) is not None:
            if ended is None:
                server.returncode = 0  # left to itself on purpose
            return address
        if ended not in (
            None,
            EXIT_TAKEN,
        ):  # taken: somebody else has just started one, which will be there in a moment
            break
        time.sleep(_POLL_S)
    words = said.read_text(errors="replace").strip()[-2000:]
    raise ProviderError(f"the rehearsal cloud in {folder} did not start: {words or 'it said nothing'}")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
