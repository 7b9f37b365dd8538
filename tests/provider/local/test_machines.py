"""Machines are processes that end wholly, see little of their host, and cannot end it."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
from rehearsal import Rehearsal, Rehearse
from waiting import eventually

from holdfast.provider.base import Machine
from holdfast.testing.loopback import Answer, Request, listening, reply

# Leaves its group, its session and its parents, forgets its environment, and does not hear SIGTERM.
_CLINGS = """
mkdir -p "$HOME/locked" && echo x > "$HOME/locked/file" && chmod 0500 "$HOME/locked"
(env -i /usr/bin/setsid /bin/sh -c 'trap "" TERM HUP; (while :; do /bin/sleep 0.5; : MARK; done) &' &)
trap "" HUP
echo up
"""


@pytest.mark.parametrize("isolation", ["namespaces", "process"])
def test_nothing_of_a_machine_is_left_however_it_ends(rehearse: Rehearse, isolation: str) -> None:
    rehearsal = rehearse(isolation=isolation, notice={"lead_s": 0.3})
    ends = {
        "terminated": "sleep 900",
        "deaf": "trap '' TERM; while :; do sleep 0.5; done",
        "preempted": "sleep 900",
        "noticed": "sleep 900",
        "script": 'until [ -e "$HOME/go" ]; do sleep 0.1; done; exit 3',
        "shutdown": 'until [ -e "$HOME/go" ]; do sleep 0.1; done; shutdown -h now; sleep 900',
        "command": 'until [ -e "$HOME/go" ]; do sleep 0.1; done; sh -c "$HOLDFAST_LOCAL_END_COMMAND"; sleep 900',
        "keeper": "sleep 900",
    }
    machines = {name: rehearsal.launch(_clings(rehearsal, name) + then) for name, then in ends.items()}
    for name, machine in machines.items():
        rehearsal.said(machine, "up")
        eventually(partial(_marked, rehearsal, name))
    cloud = rehearsal.cloud
    cloud.terminate([machines["terminated"], machines["deaf"]])
    cloud.preempt(machines["preempted"].id, lead_s=0)
    cloud.preempt(machines["noticed"].id)
    for name in ("script", "shutdown", "command"):
        (_disk(rehearsal, machines[name]) / "home" / "go").touch()
    keeper = int((rehearsal.folder / "keepers" / f"{machines['keeper'].id}.lock").read_text())
    os.kill(keeper, signal.SIGKILL)
    by = {
        "terminated": "owner", "deaf": "owner", "preempted": "provider", "noticed": "provider",
        "script": "itself", "shutdown": "itself", "command": "itself", "keeper": "provider",
    }  # fmt: skip
    assert {name: rehearsal.gone(machine).ended_by for name, machine in machines.items()} == by
    left = {name: _marked(rehearsal, name) for name in machines}
    assert not any(left.values()), left
    assert list((rehearsal.folder / "machines").iterdir()) == []
    assert list((rehearsal.folder / "keepers").iterdir()) == []
    causes = {entry["machine"]: (entry["cause"], entry["code"]) for entry in rehearsal.entries("death")}
    assert causes[machines["script"].id] == ("script", 3)
    assert causes[machines["shutdown"].id][0] == causes[machines["command"].id][0] == "shutdown"


_ATTEMPTS = [
    "shutdown -h now",
    "shutdown '; touch /tmp/evil' \"$(echo x)\" `echo y`",
    "PATH=/sbin:/usr/sbin:/bin:/usr/bin; poweroff",
    "/sbin/shutdown -P +0",
    "/usr/sbin/reboot -f -f",
    "env -i /sbin/halt",
    "systemctl --force --force poweroff",
    "cd /; exec -a ./init /sbin/shutdown now",
]


def test_a_machine_ends_itself_and_never_its_host(rehearse: Rehearse) -> None:
    """Whatever it calls, with whatever arguments, PATH and environment. The programs that could end the host are compared first, so
    that a hole in the walls fails the test and does not end the computer."""
    rehearsal = rehearse(isolation="namespaces")
    check = """
for program in shutdown poweroff halt reboot telinit systemctl; do
  for folder in /sbin /usr/sbin /bin /usr/bin; do
    if [ -e $folder/$program ] && ! cmp -s $folder/$program "${PATH%%:*}/shutdown"; then
      echo "$folder/$program is the host's"; sleep 900
    fi
  done
done
[ "$(ls -A /run/systemd /run/dbus 2>/dev/null | grep -v :)" = "" ] || { echo "the host's sockets"; sleep 900; }
grep -q '^CapBnd:.*[0-9a-f]*$' /proc/self/status && echo walled
"""
    neighbour = rehearsal.launch("sleep 900")
    machines = {}
    for attempt in _ATTEMPTS:
        shell = "#!/bin/bash\n" if "exec -a" in attempt else "#!/bin/sh\n"
        machines[attempt] = rehearsal.launch("", user_data=f"{shell}{check}\n{attempt}\nsleep 900\n")
    for attempt, machine in machines.items():
        rehearsal.said(machine, "walled")
        assert rehearsal.gone(machine).ended_by == "itself", attempt
    assert rehearsal.listed(neighbour).state == "running"
    assert not Path("/tmp/evil").exists()


def test_a_machine_has_no_right_to_reboot_mount_or_leave(rehearse: Rehearse) -> None:
    rehearsal = rehearse(isolation="namespaces")
    machine = rehearsal.launch(
        """
python - <<'END'
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
refused = []
# The walls first: the wish to reboot is spoken only where it can reach nothing but a namespace.
assert b"holdfast.testing.cloud.keeper" in open("/proc/1/cmdline", "rb").read()
for call in (lambda: libc.umount2(b"/dev/shm", 2), lambda: libc.mount(b"/", b"/mnt", None, 4096, None),
             lambda: libc.sethostname(b"x", 1), lambda: libc.reboot(0)):
    refused.append(call() == -1 and ctypes.get_errno() == 1)
print("refused", refused)
END
echo 1 > /proc/sys/kernel/panic || echo read-only
"""
    )
    rehearsal.gone(machine)
    said = rehearsal.cloud.console(machine.id)
    assert "refused [True, True, True, True]" in said
    assert "read-only" in said


def test_a_machine_sees_itself_and_nothing_else(rehearse: Rehearse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_SECRET", "canary-7f3a")
    rehearsal = rehearse(isolation="namespaces", environment={"OWN": "variable"})
    looks = f"""
echo "pids $(ls /proc | grep -c '^[0-9]')"; echo "uptime $(cut -d. -f1 /proc/uptime)"; hostname; cat /proc/sys/kernel/random/boot_id
ls -A {rehearsal.folder}; ls -A /dev/shm; pwd; env; cat /proc/1/environ | tr '\\0' '\\n'
echo mine > /dev/shm/mine; echo kept > "$TMPDIR/kept"; mkdir -p {rehearsal.cloud.boot_facts.folder}
until [ -e "$HOME/go" ]; do sleep 0.1; done
cat /dev/shm/mine "$TMPDIR/kept"; ls {rehearsal.cloud.boot_facts.folder} && echo end
"""
    machines = [rehearsal.launch(looks) for _ in range(2)]
    for machine in machines:
        rehearsal.said(machine, "XDG_CACHE_HOME")
        (_disk(rehearsal, machine) / "home" / "go").touch()
        rehearsal.gone(machine)
    said = [rehearsal.cloud.console(machine.id) for machine in machines]
    for machine, text in zip(machines, said, strict=True):
        lines = text.splitlines()
        assert int(lines[0].split()[1]) < 10
        assert int(lines[1].split()[1]) < 60
        assert lines[2] == machine.id
        assert lines[4] == "machine"
        assert "/cloud/machine/disk/home" in lines[5]
        assert lines[-3:] == ["mine", "kept", "end"]
        assert "OWN=variable" in lines
        assert f"HOLDFAST_MACHINE={machine.id}" in lines
        assert "canary" not in text
        assert rehearsal.cloud.address.secret not in text
    assert said[0].splitlines()[3] != said[1].splitlines()[3]
    assert not Path("/dev/shm/mine").exists()


def test_a_network_of_its_own_has_what_it_shall_reach(rehearse: Rehearse) -> None:
    def answer(request: Request) -> None:
        reply(request, Answer(200, (), b"the host's server"))

    fetch = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read())"
    with listening(answer) as open_to_it, listening(answer) as closed:
        port = int(open_to_it.rpartition(":")[2])
        rehearsal = rehearse(network="own", reach=[port])
        one = rehearsal.launch(f'python -c "{fetch}" {open_to_it}; python -c "{fetch}" {closed} || echo closed')
        rehearsal.gone(one)
    said = rehearsal.cloud.console(one.id)
    assert "the host's server" in said
    assert "refused" in said
    assert said.rstrip().endswith("closed")


def test_its_time_of_day_is_wrong_and_its_durations_are_right(rehearse: Rehearse) -> None:
    rehearsal = rehearse(clock_skew_s=[-7200, -7200], isolation="process", network="shared")
    code = "import os, time; print('is', time.time(), time.monotonic() - float(os.environ['HOLDFAST_MACHINE_BOOT_MONOTONIC_S']))"
    machine = rehearsal.launch(f'python -c "{code}"')
    gone = rehearsal.gone(machine)
    _, said_unix_s, since_boot_s = rehearsal.cloud.console(machine.id).split()
    assert gone.gone_unix_s is not None
    assert 6000 < gone.gone_unix_s - float(said_unix_s) < 8000
    assert 0 <= float(since_boot_s) < 60


def test_user_data_that_is_no_program(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    plain = rehearsal.launch("", user_data="echo plain; exit 4\n")
    wrong = rehearsal.launch("", user_data="#!/nowhere/interpreter\n")
    for machine in (plain, wrong):
        assert rehearsal.gone(machine).ended_by == "itself"
    causes = {entry["machine"]: entry["code"] for entry in rehearsal.entries("death")}
    assert (causes[plain.id], causes[wrong.id]) == (4, 127)
    assert "cannot be run" in rehearsal.cloud.console(wrong.id)


def test_a_machine_that_shuts_down_may_be_billed_on(rehearse: Rehearse) -> None:
    rehearsal = rehearse(shutdown_terminates=False)
    machine = rehearsal.launch("shutdown; sleep 900")
    eventually(lambda: rehearsal.entries("idle"))
    assert rehearsal.listed(machine).state == "running"
    assert not rehearsal.cloud.guarantees.shutdown_terminates
    rehearsal.cloud.terminate([machine])
    assert rehearsal.gone(machine).ended_by == "owner"


def test_a_lifetime_that_the_provider_enforces(rehearse: Rehearse) -> None:
    rehearsal = rehearse(enforces_lifetime=True)
    machine = rehearsal.launch("sleep 900", lifetime_s=1)
    assert rehearsal.gone(machine).ended_by == "owner"


def _clings(rehearsal: Rehearsal, name: str) -> str:
    return _CLINGS.replace("MARK", _mark(rehearsal, name))


def _mark(rehearsal: Rehearsal, name: str) -> str:
    return f"{rehearsal.folder.parent.parent.name}-{name}"


def _marked(rehearsal: Rehearsal, name: str) -> list[int]:
    mark, found = _mark(rehearsal, name).encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if mark in Path("/proc", entry, "cmdline").read_bytes():
                    found.append(int(entry))
            except OSError:
                continue
    return found


def _disk(rehearsal: Rehearsal, machine: Machine) -> Path:
    return rehearsal.folder / "machines" / machine.id / "disk"
