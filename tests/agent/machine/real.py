"""Machines as real processes: `holdfast machine` in a session of its own, with a folder, a boot and an end that can be counted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agents import GIVE_UP_S
from controlling import Controller

from holdfast.core.bootstrap import ENV_LOCAL_END, ENV_MACHINE_BOOT, ENV_MACHINE_FOLDER, ENV_MACHINE_KIND, LOCAL_KIND
from holdfast.core.contract import ENV_MACHINE
from holdfast.core.job_record import archive_key
from holdfast.core.sealed import digest
from holdfast.store.local import LocalStore

__all__ = ["Place", "environment_of", "machine", "packed"]


class Place:
    """A run and a machine's folder."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root, self.run, self.folder, self.ended = root, root / "run", root / "machine", root / "ended"
        self.store = LocalStore(self.run)
        self.controller = Controller(self.store)
        self.end_command = f"echo ended >> {self.ended}"

    def ready(
        self, run: str, lifetime_s: int | None = 3600, grace_s: int = 60, command_grace_s: int = 3, **job: object
    ) -> None:
        """All that a machine of launch 1 needs."""
        self.controller.job(run=run, notice="none", grace_s=command_grace_s, **job)
        self.controller.intent(1)
        if lifetime_s is not None:
            self.controller.grant(1, 0, lifetime_s, grace_s)
        self.controller.answer(1)


def environment_of(place: Place, **more: str) -> dict[str, str]:
    """Of a machine that is being born now."""
    return (
        {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        | {
            ENV_MACHINE_KIND: LOCAL_KIND,
            ENV_LOCAL_END: place.end_command,
            ENV_MACHINE_BOOT: repr(time.monotonic()),
            ENV_MACHINE_FOLDER: str(place.folder),
            ENV_MACHINE: "machine-1",
        }
        | more
    )


@contextmanager
def machine(place: Place, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "holdfast", "machine", "--run", str(place.run), "--launch", "1"]
    process = subprocess.Popen(
        [*command, "--end-command", place.end_command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(environment or environment_of(place)),
    )  # fmt: skip
    timer = threading.Timer(GIVE_UP_S, process.kill)
    timer.start()
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        timer.cancel()


def packed(place: Place, files: Mapping[str, bytes]) -> dict[str, object]:
    """Put an archive of these files under the run; the job's code."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    data = buffer.getvalue()
    place.store.put(archive_key(digest(data)), data)
    return {"digest": digest(data), "size_bytes": len(data)}
