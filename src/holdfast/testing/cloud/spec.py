"""What a keeper is told about its machine, and what it tells in the end: two JSON files. Only the standard library."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["End", "MachineSpecFile", "end_file", "lock_file", "spec_file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpecFile:
    """One machine, as its keeper runs it."""

    id: str
    cloud: str
    """The cloud's folder; a machine in namespaces sees nothing in it but itself."""
    folder: str
    """The machine's own folder: `disk`, `bin`, `power`. Removed when it ends."""
    inside: str
    """Where the machine sees that folder."""
    console: str
    """Where the script's output goes; it stays."""
    environment: dict[str, str]
    key: str
    """In the environment of everything that the machine runs, to find what has got away."""
    in_namespaces: bool
    own_network: bool
    own_uptime: bool
    metadata_port: int
    reach: list[int]
    """Ports of the host's 127.0.0.1 that are there on the machine's too, where it has a network of its own."""
    grace_s: float
    """From SIGTERM to SIGKILL, when it is ended or ends itself."""

    def write(self, path: Path) -> None:
        _write(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> MachineSpecFile:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a machine ended, by its keeper."""

    cause: str
    """`script`: it came to its end; `shutdown`: the machine's own command; `terminated`, `unplugged`: the cloud; `failed`: no
    boot."""
    code: int | None
    """The script's exit status, below zero for a signal."""
    said: str = ""

    def write(self, path: Path) -> None:
        _write(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> End | None:
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None


def spec_file(cloud: Path, id: str) -> Path:
    return cloud / "keepers" / f"{id}.json"


def end_file(cloud: Path, id: str) -> Path:
    return cloud / "keepers" / f"{id}.end"


def lock_file(cloud: Path, id: str) -> Path:
    """Held by the keeper as long as anything of the machine is there; holds its process id."""
    return cloud / "keepers" / f"{id}.lock"


def _write(path: Path, fields: dict[str, object]) -> None:
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(fields, file)
    os.replace(fresh, path)
