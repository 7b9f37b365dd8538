"""Linux namespaces by system call, for machines that shall see nothing of their host: processes, network, shared memory, uptime.

Used by `keeper.py` only, between fork and exec, in processes with one thread. Only the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

__all__ = [
    "CLOCKS",
    "METADATA_ADDRESS",
    "NETWORK",
    "WHOLE",
    "be_reaper",
    "bind",
    "bring_up_loopback",
    "die_with_parent",
    "drop_rights",
    "make_private",
    "mount",
    "no_new_privileges",
    "set_host_name",
    "start_uptime_at_zero",
    "unshare",
    "write_maps",
]

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000
WHOLE = _NEWNS | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID
"""What every machine in namespaces has of its own."""
NETWORK, CLOCKS = 0x40000000, 0x80
METADATA_ADDRESS = "169.254.169.254"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_PDEATHSIG, _CAPBSET_DROP, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 24, 36, 38
_SIGKILL = 9
_KEPT_CAPABILITIES = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 18, 31})
"""Owners, modes, kill, users and groups, low ports, chroot, file capabilities: what installing software as root needs. Nothing that
mounts, reboots, traces, sets clocks or changes networks."""
_HIGHEST_CAPABILITY = 63
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _IFF_UP = 0x8914, 0x8916, 0x891C, 1

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def write_maps(pid: int) -> None:
    """Users inside are the same users outside: all of them where this process may say so, else its own only."""
    uid, gid = os.geteuid(), os.getegid()
    whole = "0 0 4294967295"
    if uid != 0:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(whole if uid == 0 else f"{uid} {uid} 1")
    Path(f"/proc/{pid}/gid_map").write_text(whole if uid == 0 else f"{gid} {gid} 1")


def start_uptime_at_zero() -> None:
    """For the children of this process that are still to be born. Durations (CLOCK_MONOTONIC) stay the host's."""
    since_s = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    Path("/proc/self/timens_offsets").write_text(f"boottime -{since_s} 0")


def bring_up_loopback() -> None:
    """127.0.0.1, and the address at which clouds answer about a machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        fcntl.ioctl(asking, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
        for request, address in ((_SIOCSIFADDR, METADATA_ADDRESS), (_SIOCSIFNETMASK, "255.255.255.255")):
            packed = socket.inet_aton(address)
            fcntl.ioctl(asking, request, struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, packed))
        fcntl.ioctl(asking, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo:1", _IFF_UP))


def make_private() -> None:
    """Mounts made from here on are not seen outside."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)


def mount(kind: str, at: Path | str, options: str | None = None) -> None:
    flags = _MS_NOSUID | _MS_NODEV | (_MS_NOEXEC if kind == "proc" else 0)
    _mount(kind, str(at), kind, flags, options)


def bind(source: Path | str, at: Path | str, *, read_only: bool = False) -> None:
    """`at` shows what `source` is; both exist."""
    _mount(str(source), str(at), None, _MS_BIND | _MS_REC, None)
    if read_only:
        # Inside a user namespace, flags that the mount has already must be named again.
        _mount(None, str(at), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def set_host_name(name: str) -> None:
    written = name.encode()
    _check(_libc.sethostname(written, ctypes.c_size_t(len(written))), "sethostname")


def be_reaper() -> None:
    """Descendants whose parents die become children of this process."""
    _prctl(_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    _prctl(_PDEATHSIG, _SIGKILL)


def no_new_privileges() -> None:
    """No set-user-id program gives its rights to this process or its children."""
    _prctl(_NO_NEW_PRIVS, 1)


def drop_rights() -> None:
    """Programs that are executed from here on get none of the rights by which a machine could reach its host."""
    for capability in range(_HIGHEST_CAPABILITY + 1):
        if capability not in _KEPT_CAPABILITIES:
            try:
                _prctl(_CAPBSET_DROP, capability)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the kernel has no more of them
                    return
                raise


def _prctl(option: int, value: int) -> None:
    rest = (ctypes.c_ulong(0),) * 3
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), *rest), f"prctl {option}")


def _mount(source: str | None, at: str, kind: str | None, flags: int, options: str | None) -> None:
    written = [None if text is None else os.fsencode(text) for text in (source, at, kind, options)]
    result = _libc.mount(written[0], written[1], written[2], ctypes.c_ulong(flags), written[3])
    _check(result, f"mount {kind or source or ''} at {at}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
