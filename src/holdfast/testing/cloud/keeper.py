"""One machine's keeper: a process on the host that starts the machine, ends it, and sees to it that nothing of it is left.

    python -m holdfast.testing.cloud.keeper SPEC

SIGTERM: end it (SIGTERM to everything in it, SIGKILL after the grace). SIGUSR1: pull the plug. A byte in the pipe `power`: the
machine ends itself. The keeper outlives the cloud's server, and the machine does not outlive the keeper: in namespaces the
kernel sees to that, without them the server does. Only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.testing.cloud import inside, namespaces
from holdfast.testing.cloud.spec import End, MachineSpecFile, end_file, lock_file

__all__ = ["descendants", "keep", "wipe"]

_EARLY = 3
"""Exit status: another keeper has this machine."""
_REAP_S = 0.005
_WIPES = 100
_PUMP_BYTES = 1 << 20


class _Keeper:
    def __init__(self, spec: MachineSpecFile) -> None:
        self._spec = spec
        self._first = 0
        """The stem, or the script where there are no namespaces."""
        self._init = 0
        self._cause, self._said = "script", ""
        self._code: int | None = None
        self._kill_at_s: float | None = None
        self._signals: list[int] = []
        self._wake, wake = os.pipe()
        for descriptor in (self._wake, wake):
            os.set_blocking(descriptor, False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda got, _: self._signals.append(got))
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._power = os.open(Path(spec.folder) / "power", os.O_RDWR | os.O_NONBLOCK)

    def run(self, inherited: list[int]) -> End:
        """Until nothing of the machine is there any more."""
        try:
            self._start(inherited)
        except OSError as error:
            self._cause, self._said = "failed", f"{error}"
            self._unplug()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(self._power, selectors.EVENT_READ)
            while not self._reaped():
                selector.select(self._patience_s())
                self._hear()
                if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
                    self._unplug()
        return End(cause=self._cause, code=self._code, said=self._said)

    def _patience_s(self) -> float | None:
        return None if self._kill_at_s is None else max(_REAP_S, self._kill_at_s - time.monotonic())

    def _hear(self) -> None:
        for descriptor in (self._wake, self._power):
            with suppress(BlockingIOError):
                if os.read(descriptor, 4096) and descriptor == self._power:
                    self._ask_to_end("shutdown")
        heard, self._signals = self._signals, []
        if signal.SIGUSR1 in heard:
            self._cause = "unplugged"
            self._unplug()
        elif signal.SIGTERM in heard:
            self._ask_to_end("terminated")

    def _ask_to_end(self, cause: str) -> None:
        if self._kill_at_s is not None:
            return
        self._cause, self._kill_at_s = cause, time.monotonic() + self._spec.grace_s
        for pid in [self._init] if self._spec.in_namespaces else descendants(os.getpid()):
            _send(pid, signal.SIGTERM)

    def _unplug(self) -> None:
        """Again and again until all are gone: what is killed may have forked in between."""
        self._kill_at_s = time.monotonic()
        for pid in descendants(os.getpid()):
            _send(pid, signal.SIGKILL)

    def _reaped(self) -> bool:
        """True when there are no children left, and so no descendants: orphans become children of this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self._first:
                self._code = os.waitstatus_to_exitcode(status)
                self._unplug()

    def _start(self, inherited: list[int]) -> None:
        namespaces.be_reaper()
        if not self._spec.in_namespaces:
            self._first = inside.run_script(self._spec, inside.open_console(self._spec), _harmless)
            return
        here, there = socket.socketpair()
        self._first = os.fork()
        if self._first == 0:
            here.close()
            for descriptor in (*inherited, self._wake, self._power):
                os.close(descriptor)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            inside.stem(self._spec, there)
        there.close()
        with here:
            self._settle(here)

    def _settle(self, stem: socket.socket) -> None:
        _expect(stem, b"U")
        namespaces.write_maps(self._first)
        stem.sendall(b"M")
        message, descriptors, _, _ = socket.recv_fds(stem, 1, len(self._spec.reach) + 1)
        if message != b"S":
            raise OSError(_complaint(stem, message))
        for descriptor, port in zip(descriptors, [self._spec.metadata_port, *self._spec.reach], strict=False):
            listener = socket.socket(fileno=descriptor)
            threading.Thread(target=_forward, args=(listener, port), daemon=True).start()
        _expect(stem, b"P")
        self._init = int.from_bytes(stem.recv(8, socket.MSG_WAITALL), "big")
        complaint = stem.recv(1)  # the end of the connection: the script has been started
        if complaint:
            raise OSError(_complaint(stem, complaint))


def descendants(pid: int) -> list[int]:
    """All processes below this one, now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def wipe(folder: Path) -> None:
    """Remove it, whatever modes the machine has given to what is in it, and what its last processes still write."""

    def open_up(_: Callable[..., Any], path: str, __: object) -> None:
        with suppress(OSError):
            os.chmod(Path(path).parent, 0o700)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)

    for _ in range(_WIPES):
        if not folder.exists():
            return
        shutil.rmtree(folder, onerror=open_up)


def _harmless() -> None:
    """Without namespaces: no right to reboot, no rights by set-user-id programs, no message to those who would shut the host
    down."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    namespaces.no_new_privileges()
    if os.geteuid() == 0:
        namespaces.drop_rights()


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _expect(stem: socket.socket, word: bytes) -> None:
    got = stem.recv(1)
    if got != word:
        raise OSError(_complaint(stem, got))


def _complaint(stem: socket.socket, got: bytes) -> str:
    return stem.recv(900).decode(errors="replace") if got == b"E" else "the machine's first process has ended"


def _forward(listener: socket.socket, port: int) -> None:
    """What connects inside the machine is connected to the host's 127.0.0.1."""
    while True:
        inner, _ = listener.accept()
        try:
            outer = socket.create_connection(("127.0.0.1", port))
        except OSError:
            inner.close()
            continue
        for source, target in ((inner, outer), (outer, inner)):
            threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(_PUMP_BYTES):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def keep(path: Path) -> int:
    """Run the machine of this file to its end; the exit status of the process, which is to end then."""
    spec = MachineSpecFile.read(path)
    cloud = Path(spec.cloud)
    lock = os.open(lock_file(cloud, spec.id), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _EARLY
    if end_file(cloud, spec.id).exists() or not Path(spec.folder).exists():
        return _EARLY  # it has lived already
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    end = _Keeper(spec).run([lock])
    wipe(Path(spec.folder))
    end.write(end_file(cloud, spec.id))
    return 0


if __name__ == "__main__":
    os._exit(keep(Path(sys.argv[1])))  # threads that forward connections may wait for ever
