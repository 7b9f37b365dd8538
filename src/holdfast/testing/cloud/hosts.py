"""The processes behind the machines: prepares their folders, starts their keepers, and notices when they are gone.

A machine is there as long as its keeper holds the lock in `keepers/`. That outlives this process, so a cloud that comes back
finds every machine by its lock, whoever has started it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.bootstrap import ENV_LOCAL_END, ENV_MACHINE_BOOT, ENV_MACHINE_KIND, LOCAL_KIND
from holdfast.core.contract import ENV_MACHINE
from holdfast.provider.base import BootFacts
from holdfast.testing.cloud.config import CloudConfig
from holdfast.testing.cloud.inside import POWER_NAMES
from holdfast.testing.cloud.keeper import descendants, wipe
from holdfast.testing.cloud.life import Life
from holdfast.testing.cloud.namespaces import METADATA_ADDRESS
from holdfast.testing.cloud.notices import variables
from holdfast.testing.cloud.spec import End, MachineSpecFile, end_file, lock_file, spec_file

__all__ = ["END_COMMAND", "ENV_SKEW", "Hosts", "Isolation", "boot_facts", "machine_folder"]

ENV_SKEW = "HOLDFAST_CLOCK_SKEW_S"
"""By how much this machine's time of day is wrong. Its Python programs see it in `time.time`."""
END_COMMAND = "holdfast-end-rehearsal-machine"
"""A name that no host has a program of."""
_BOOT_LIMIT_S = 300
_KEY = "HOLDFAST_MACHINE_KEY"
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
"""To keepers; nothing else of the cloud's environment gets near a machine."""
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SKEWED = '''\
"""This machine's time of day is wrong, as clocks of real machines are. Durations are right."""
import os
import time

_SKEW_S = float(os.environ.get("{variable}", "0"))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _SKEW_S
time.time_ns = lambda: _time_ns() + int(_SKEW_S * 1_000_000_000)
'''


@dataclass(frozen=True, slots=True)
class Isolation:
    """What machines have of their own."""

    in_namespaces: bool
    own_network: bool
    own_uptime: bool
    refused: str = ""
    """What the kernel said, where something was not given."""


class Hosts:
    """Implements `course.Machines`. `gone` is called by `collect`. Thread safety: none; the cloud calls under its lock."""

    def __init__(self, folder: Path, config: CloudConfig, isolation: Isolation) -> None:
        self._folder, self._config, self.isolation = folder, config, isolation
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self.watched: dict[int, str] = {}
        """Descriptor of a keeper → its machine; readable when the keeper has ended."""
        self._pids: dict[str, int] = {}
        for name in ("machines", "keepers", "consoles"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)

    def boot(self, life: Life) -> None:
        spec = self.furnish(life)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with open(spec.console, "ab") as console:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "holdfast.testing.cloud.keeper", str(spec_file(self._folder, life.id))],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._started[life.id] = keeper
        self._watch(life.id, keeper.pid)

    def adopt(self, id: str) -> bool:
        """Watch a machine that an earlier process of this cloud has started. False: it is gone, and can be collected."""
        try:
            lock = os.open(lock_file(self._folder, id), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = int(os.pread(lock, 32, 0) or b"0")
            with suppress(ProcessLookupError):
                self._watch(id, pid)
                return True
            return False
        finally:
            os.close(lock)
        return False

    def end(self, id: str) -> None:
        self._signal(id, signal.SIGTERM)

    def unplug(self, id: str) -> None:
        self._signal(id, signal.SIGUSR1)

    def collect(self, id: str) -> End:
        """After its keeper has ended: remove what may be left, and say how it ended."""
        for descriptor in [each for each, watched in self.watched.items() if watched == id]:
            del self.watched[descriptor]
            os.close(descriptor)
        self._pids.pop(id, None)
        if (keeper := self._started.pop(id, None)) is not None:
            keeper.wait()
        end = End.read(end_file(self._folder, id)) or End(cause="lost", code=None)
        _kill_orphans(self._started)
        with suppress(FileNotFoundError):
            _kill_marked(MachineSpecFile.read(spec_file(self._folder, id)).key)
        wipe(machine_folder(self._folder, id))
        for path in (spec_file(self._folder, id), end_file(self._folder, id), lock_file(self._folder, id)):
            path.unlink(missing_ok=True)
        return end

    def close(self) -> None:
        """Stop watching; the machines go on."""
        for descriptor in self.watched:
            os.close(descriptor)
        self.watched.clear()
        for keeper in self._started.values():
            keeper.returncode = 0  # it is left to itself on purpose, and that is no leak to warn of

    def _watch(self, id: str, pid: int) -> None:
        self.watched[os.pidfd_open(pid)] = id
        self._pids[id] = pid

    def _signal(self, id: str, number: int) -> None:
        """To the process that is watched, and never to one that has got its number."""
        for descriptor, watched in self.watched.items():
            if watched == id:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)

    def furnish(self, life: Life) -> MachineSpecFile:
        """Its folder, and the file for its keeper."""
        folder = machine_folder(self._folder, life.id)
        for name in ("disk/home", "disk/tmp", "disk/cache", "bin", "python"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        power = folder / "power"
        if not power.exists():
            os.mkfifo(power, 0o600)
        inside, seen = self._inside(folder), f"{_seen_folder(self._folder)}/"
        for name in (*POWER_NAMES, END_COMMAND):
            _write_program(folder / "bin" / name, _power_command(inside / "power"))
        # Without namespaces there is no folder that every machine sees as its own: then the script is told its own.
        _write_program(folder / "disk" / "user-data", life.request.user_data.replace(seen, f"{inside}/"))
        if life.skew_s:
            (folder / "python" / "sitecustomize.py").write_text(_SKEWED.format(variable=ENV_SKEW))
        key, isolation = secrets.token_hex(16), self.isolation
        spec = MachineSpecFile(
            id=life.id,
            cloud=str(self._folder),
            folder=str(folder),
            inside=str(inside),
            console=str(self._folder / "consoles" / f"{life.id}.log"),
            environment=self._environment(life, inside, key),
            key=key,
            in_namespaces=isolation.in_namespaces,
            own_network=isolation.own_network,
            own_uptime=isolation.own_uptime,
            metadata_port=life.metadata_port,
            reach=self._config.reach,
            grace_s=self._config.grace_s,
        )
        spec.write(spec_file(self._folder, life.id))
        return spec

    def _environment(self, life: Life, folder: Path, key: str) -> dict[str, str]:
        port = life.metadata_port
        endpoint = f"http://{METADATA_ADDRESS}" if self.isolation.own_network else f"http://127.0.0.1:{port}"
        disk = folder / "disk"
        skewed = {"PYTHONPATH": str(folder / "python")} if life.skew_s else {}
        return {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{_SYSTEM_PATH}",
            "HOME": str(disk / "home"),
            "TMPDIR": str(disk / "tmp"),
            "XDG_CACHE_HOME": str(disk / "cache"),
            "LANG": "C.UTF-8",
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent",
            ENV_MACHINE: life.id,
            ENV_SKEW: str(life.skew_s),
            ENV_MACHINE_KIND: LOCAL_KIND,
            ENV_LOCAL_END: END_COMMAND,
            ENV_MACHINE_BOOT: f"{time.monotonic():.3f}",
            _KEY: key,
            **variables(self._config.metadata, endpoint),
            **skewed,
            **self._config.environment,
        }

    def _inside(self, folder: Path) -> Path:
        """Where the machine sees its folder."""
        return _seen_folder(self._folder) if self.isolation.in_namespaces else folder


def boot_facts(cloud: Path) -> BootFacts:
    """The same for every machine, as the bootstrap is written before there is one."""
    seen = _seen_folder(cloud)
    # A virtual environment inside a virtual environment does not see the outer one's packages, and the outer one is our image.
    packages = sysconfig.get_path("purelib")
    return BootFacts(
        end_command=END_COMMAND,
        folder=str(seen / "disk" / "holdfast"),
        python=sys.executable,
        environment={"PYTHONPATH": f"{seen / 'python'}:{packages}"},
        boot_limit_s=_BOOT_LIMIT_S,
    )


def _seen_folder(cloud: Path) -> Path:
    return cloud / "machine"


def machine_folder(cloud: Path, id: str) -> Path:
    return cloud / "machines" / id


def _power_command(power: Path) -> str:
    """Looks at no argument and no variable: all that it can do is ask its own machine's keeper. Where it covers a program with
    more uses, it does nothing for them."""
    quoted = str(power).replace("'", "'\\''")
    return (
        "#!/bin/sh\n"
        'case "${0##*/}" in\n'
        'systemctl|loginctl) case " $* " in *" poweroff "*|*" halt "*|*" reboot "*|*" kexec "*) ;; *) exit 1 ;; esac ;;\n'
        "kexec|init|telinit) exit 1 ;;\n"
        "esac\n"
        f"echo off > '{quoted}'\n"
    )


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


def _kill_orphans(started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """What a keeper that was killed has left became this process's children: all of them that are no keepers."""
    keepers = [keeper.pid for keeper in started.values()]

    def orphaned() -> set[int]:
        # In this order: what a keeper starts in between is in the second alone.
        below = set(descendants(os.getpid()))
        return below.difference(keepers, *(descendants(pid) for pid in keepers))

    while orphans := orphaned():
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _kill_marked(key: str) -> None:
    """What a machine without namespaces has left behind when its keeper was killed."""
    marked = f"{_KEY}={key}".encode()
    found = True
    while found:
        found = False
        for entry in os.listdir("/proc"):
            with suppress(OSError):
                if entry.isdigit() and marked in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry), signal.SIGKILL)
                    found = _is_running(entry) or found


def _is_running(pid: str) -> bool:
    """A zombie has no environment and is not found again."""
    return Path("/proc", pid).exists()
