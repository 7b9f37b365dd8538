"""The inside of a machine in namespaces: its first process, and what of the host is hidden from it. Only the standard library.

    keeper (host) ──fork──→ stem: new namespaces, the network's listening sockets go back to the keeper
                              └─fork──→ init: process 1 of the machine: mounts, then the script; when it ends, the kernel ends
                              everything

A machine's programs cannot end the host: the host's programs for that are covered by the machine's own, so are the sockets of what
would do it for them, and nothing runs with a right to reboot, mount or leave.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from holdfast.testing.cloud import namespaces
from holdfast.testing.cloud.spec import MachineSpecFile

__all__ = ["POWER_NAMES", "open_console", "run_script", "stem"]

POWER_NAMES = ("shutdown", "poweroff", "halt", "reboot")
"""Commands by which a machine ends itself."""
_COVERED_NAMES = (*POWER_NAMES, "telinit", "init", "systemctl", "loginctl", "kexec")
_COVERED_FOLDERS = ("/sbin", "/usr/sbin", "/bin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin")
_HIDDEN = ("/run/systemd", "/run/dbus", "/run/initctl", "/dev/initctl", "/run/docker.sock", "/run/containerd")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def stem(spec: MachineSpecFile, keeper: socket.socket) -> None:
    """In the first child: make the namespaces, wait for the maps of users, hand over the sockets, fork the machine's process 1
    and end with it. Never returns."""
    said = ""
    try:
        namespaces.unshare(_flags(spec))
        keeper.sendall(b"U")
        if keeper.recv(1) != b"M":
            raise OSError("the keeper has gone")
        namespaces.die_with_parent()
        if spec.own_uptime:
            namespaces.start_uptime_at_zero()
        sockets = _listeners(spec) if spec.own_network else []
        socket.send_fds(keeper, [b"S"], [each.fileno() for each in sockets])
        for each in sockets:
            each.close()
        child = os.fork()
        if child == 0:
            _init(spec, keeper)
        keeper.sendall(b"P" + child.to_bytes(8, "big"))
        keeper.close()
        os._exit(_waited(child))
    except OSError as error:
        said = f"{error}"
    with suppress(OSError):
        keeper.sendall(b"E" + said.encode()[:900])
    os._exit(125)


def _flags(spec: MachineSpecFile) -> int:
    network = namespaces.NETWORK if spec.own_network else 0
    return namespaces.WHOLE | network | (namespaces.CLOCKS if spec.own_uptime else 0)


def _listeners(spec: MachineSpecFile) -> list[socket.socket]:
    """Sockets in the machine's network that the keeper, which is in the host's, will answer: metadata, then what may be reached."""
    namespaces.bring_up_loopback()
    addresses = [(namespaces.METADATA_ADDRESS, 80), *(("127.0.0.1", port) for port in spec.reach)]
    return [socket.create_server(address, backlog=64) for address in addresses]


def _init(spec: MachineSpecFile, keeper: socket.socket) -> None:
    """Process 1. Ends with the script's exit status; everything else of the machine ends with it."""
    try:
        namespaces.die_with_parent()
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: _tell_all(signal.SIGTERM))
        console = open_console(spec)
        _furnish(spec)
        namespaces.no_new_privileges()
        namespaces.drop_rights()
        script = run_script(spec, console, lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        keeper.close()
    except OSError as error:
        with suppress(OSError):
            keeper.sendall(b"E" + f"{error}".encode()[:900])
        os._exit(125)
    while True:
        pid, status = os.wait()
        if pid == script:
            os._exit(_code(status))


def _furnish(spec: MachineSpecFile) -> None:
    namespaces.make_private()
    namespaces.set_host_name(spec.id)
    namespaces.mount("proc", "/proc")
    namespaces.mount("tmpfs", "/dev/shm", "mode=1777")
    boot_id = Path(spec.folder) / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    namespaces.bind(boot_id, _BOOT_ID)
    if os.path.exists("/proc/sysrq-trigger"):
        namespaces.bind("/dev/null", "/proc/sysrq-trigger")
    namespaces.bind("/proc/sys", "/proc/sys", read_only=True)
    command = Path(spec.folder) / "bin" / POWER_NAMES[0]
    for folder in _COVERED_FOLDERS:
        for name in _COVERED_NAMES:
            # What a link leads to is covered where it lies; a machine without such a program needs no cover.
            if (found := Path(folder, name)).is_file():
                namespaces.bind(command, found)
    for hidden in map(Path, _HIDDEN):
        if hidden.is_dir():
            namespaces.mount("tmpfs", hidden, "mode=755")
        elif hidden.exists():
            namespaces.bind("/dev/null", hidden)
    _hide_the_cloud(spec)


def _hide_the_cloud(spec: MachineSpecFile) -> None:
    """The cloud's folder has its address and secret: of it the machine sees its own folder, where every machine sees its own."""
    held = os.open(spec.folder, os.O_PATH)
    namespaces.mount("tmpfs", spec.cloud, "mode=755")
    Path(spec.inside).mkdir()
    namespaces.bind(f"/proc/self/fd/{held}", spec.inside)
    os.close(held)


def open_console(spec: MachineSpecFile) -> int:
    return os.open(spec.console, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def run_script(spec: MachineSpecFile, console: int, before: Callable[[], object]) -> int:
    """Fork and execute the user data in a session of its own; the process id."""
    child = os.fork()
    if child:
        return child
    try:
        before()
        os.setsid()
        disk = Path(spec.inside) / "disk"
        os.chdir(disk / "home")
        os.umask(0o022)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (console, 1), (console, 2)):
            os.dup2(source, target)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        script = str(disk / "user-data")
        with open(script, "rb") as file:
            shell = [] if file.read(2) == b"#!" else ["/bin/sh"]
        command = [*shell, script]
        os.execve(command[0], command, spec.environment)
    except OSError as error:
        print(f"the user data cannot be run: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def _tell_all(number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(-1, number)


def _waited(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return _code(status)


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
