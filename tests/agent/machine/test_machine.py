"""Machines as processes that are killed, suspended and run out of time: each ends, once, and by the command that it was given."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents import GIVE_UP_S, eventually, kept_output, lives, read_until
from controlling import words_of
from real import Place, environment_of, machine, packed

from holdfast.core.bootstrap import ENV_LOCAL_END, ENV_MACHINE_BOOT, ENV_MACHINE_BOOT_LIMIT, ENV_MACHINE_KIND
from holdfast.core.job_record import PackedCode
from holdfast.ledger.read import read_events

SAVING = """
import os, signal, sys
def save(*_):
    open("saved", "a").write("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", os.getpid(), flush=True)
while True: signal.pause()
"""
TELLING = b"""
import glob, os
print(os.environ["COLOUR"], os.getcwd())
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        assert os.environ["TOKEN"].encode() not in open(path, "rb").read(), path
    except OSError:
        pass
"""
TRAINER = """
import time, torch, holdfast
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.zeros(100000, 2), batch_size=2)
with holdfast.Run(save_every="1 h") as run:
    run.track(model=model, optimizer=optimizer)
    for batch in run.batches(loader):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        time.sleep(0.02)
        if run.step == 5: print("ready 5", flush=True)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def pid_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    line = read_until(process.stdout.fileno(), b"\n")
    while not line.startswith(b"ready"):
        line = read_until(process.stdout.fileno(), b"\n")
    return int(line.split()[1])


def script(place: Place, text: str) -> str:
    path = place.root / "script.py"
    path.write_text(text)
    return f"exec {sys.executable} {path}"


def test_a_job_from_its_record_to_its_end(place: Path) -> None:
    assert isinstance(place, Place)
    secret, canary = place.root / "secret", "canary-5f2b"
    secret.write_text(canary + "\n")
    secret.chmod(0o600)
    code = PackedCode(**packed(place, {"src/train.py": TELLING}))  # type: ignore[arg-type]
    place.ready(
        "python src/train.py | tee copy\ntest ${#TOKEN} = 11\ncat from-setup\necho $HOLDFAST_MARKET "
        "$HOLDFAST_PRICE_PER_HOUR $HOLDFAST_ON_DEMAND_PRICE_PER_HOUR $HOLDFAST_MACHINE",
        code=code, envs={"COLOUR": "blue"}, secrets={"TOKEN": f"file:{secret}"}, setup="echo set up >> from-setup", name="j",
    )  # fmt: skip
    with machine(place) as process:
        out, err = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0, err.decode()
    work = place.folder / "work"
    assert out.decode().splitlines() == [f"blue {work}", "set up", "spot 0.700000 2.000000 machine-1"]
    assert place.ended.read_text() == "ended\n"
    words = words_of(place.store, 1)
    assert [(word.kind, word.attempt, word.exit_code) for word in words] == [
        ("claimed", 1, None),
        ("released", None, 0),
    ]
    assert b"blue" in kept_output(place.run)
    begun = [each.event for each in read_events(place.store) if each.event.name == "machine.begun"]
    assert [(event.fields["code"], event.fields["job"], event.fields["attempt_of_machines"]) for event in begun] == [
        (f"blake3:{code.digest}", "j", 1)
    ]
    for path in (each for each in place.root.rglob("*") if each.is_file() and each != secret):
        assert canary.encode() not in path.read_bytes(), path
    assert stat.S_IMODE((place.folder / "run.sh").stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.long)])
def test_an_agent_that_dies_leaves_a_saved_command_and_an_ended_machine(place: Place, number: int) -> None:
    place.ready(script(place, SAVING))
    with machine(place) as process:
        pid = pid_of(process)
        process.send_signal(number)
        process.communicate(timeout=GIVE_UP_S)
    assert (place.folder / "work" / "saved").read_text() == "saved"
    assert not lives(pid)
    assert place.ended.read_text() == "ended\n"
    assert [word.kind for word in words_of(place.store, 1)] == ["claimed"], "nobody has released"


def test_killed_before_it_has_a_grant_or_without_one_it_ends_as_well(tmp_path: Path) -> None:
    killed, waiting = Place(tmp_path / "killed"), Place(tmp_path / "waiting")
    for each in (killed, waiting):
        each.ready("true", lifetime_s=None)
    with (
        machine(killed) as one,
        machine(waiting, environment_of(waiting, **{ENV_MACHINE_BOOT_LIMIT: "2"})) as other,
    ):
        eventually((killed.folder / "guarded").exists)
        eventually((killed.run / "machines/00000001/holder").exists)
        one.kill()
        one.communicate(timeout=GIVE_UP_S)
        err = other.communicate(timeout=GIVE_UP_S)[1]
    assert other.returncode == 78
    assert b"no grant has come" in err
    assert killed.ended.read_text() == waiting.ended.read_text() == "ended\n"


@pytest.mark.long
def test_a_boot_that_is_suspended_is_ended_from_outside(place: Place) -> None:
    place.ready("true", lifetime_s=None)
    with machine(place, environment_of(place, **{ENV_MACHINE_BOOT_LIMIT: "4"})) as process:
        eventually((place.folder / "guarded").exists)
        process.send_signal(signal.SIGSTOP)
        eventually(place.ended.exists)
        process.communicate(timeout=GIVE_UP_S)
    assert place.ended.read_text() == "ended\n"


def granted_soon(place: Place, environment: dict[str, str]) -> int:
    """A grant that lets the command begin, however slow this computer is, and ends soon after. Returns its lifetime: short as it
    is, half of it is the command's."""
    eventually((place.run / "machines/00000001/holder").exists)
    lifetime_s = 2 * (int(time.monotonic() - float(environment[ENV_MACHINE_BOOT])) + 5)
    place.controller.grant(1, 0, lifetime_s, 1)
    return lifetime_s


def test_a_grants_end_holds_against_a_suspended_agent_and_moves_with_a_renewal(tmp_path: Path) -> None:
    stubborn = SAVING.replace("signal.signal(signal.SIGTERM, save)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    asleep, renewed = Place(tmp_path / "asleep"), Place(tmp_path / "renewed")
    asleep.ready(script(asleep, stubborn), lifetime_s=None)
    renewed.ready(script(renewed, SAVING), lifetime_s=None)
    environments = [environment_of(asleep), environment_of(renewed)]
    with machine(asleep, environments[0]) as one, machine(renewed, environments[1]) as other:
        granted_soon(asleep, environments[0])
        first_s = granted_soon(renewed, environments[1])
        pid, _ = pid_of(one), pid_of(other)
        one.send_signal(signal.SIGSTOP)
        longer_s = first_s + 4
        renewed.controller.grant(1, 1, longer_s, 1)
        err = other.communicate(timeout=GIVE_UP_S)[1].decode()
        one.communicate(timeout=GIVE_UP_S)
    assert other.returncode == 78, err
    assert f"the grant of {longer_s} s is used up: stopping" in err
    assert (renewed.folder / "work" / "saved").read_text() == "saved"
    released = words_of(renewed.store, 1)[-1]
    assert (released.kind, released.exit_code) == ("released", 78)
    assert longer_s // 2 <= released.uptime_s
    assert one.returncode == -signal.SIGKILL
    assert not lives(pid)
    assert asleep.ended.read_text() == renewed.ended.read_text() == "ended\n"


def test_a_trainer_behind_a_pipe_saves_when_the_controller_says_stop(place: Place) -> None:
    """SIGTERM would end the shell and break the pipe; the order goes over the control socket instead."""
    place.ready(script(place, TRAINER).removeprefix("exec ") + " | tee log", command_grace_s=5)
    with machine(place) as process:
        pid_of(process)
        place.controller.command(1, 0, "stop")
        err = process.communicate(timeout=GIVE_UP_S)[1].decode()
    assert process.returncode == 75, err
    assert "told to stop, said so: stopping" in err
    committed = re.search(r"last committed step (\d+)", err)
    assert committed is not None, err
    assert int(committed[1]) >= 5
    assert place.ended.read_text() == "ended\n"
    released = words_of(place.store, 1)[-1]
    assert released.reasons[:2] == ("told to stop", "said so")


def test_an_end_that_is_not_the_rehearsal_clouds_own_is_not_run(place: Place) -> None:
    place.ready("true")
    with machine(place, environment_of(place, **{ENV_LOCAL_END: "exit 0"})) as process:
        process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0
    assert not place.ended.exists()
    assert ENV_MACHINE_KIND in environment_of(place)


def test_a_set_up_that_fails_twice_says_why_without_the_secrets(place: Place) -> None:
    secret = place.root / "secret"
    secret.write_text("canary-77")
    secret.chmod(0o600)
    place.ready(
        "true", setup='echo once >> tries; echo "the token is $TOKEN" >&2; exit 7', secrets={"TOKEN": f"file:{secret}"}
    )
    with machine(place) as process:
        process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 7
    assert (place.folder / "work" / "tries").read_text() == "once\nonce\n"
    released = words_of(place.store, 1)[-1]
    assert released.exit_code == 7
    assert released.reasons == ("the set-up failed with exit code 7: the token is ***",)
    assert place.ended.read_text() == "ended\n"


@pytest.mark.long
def test_a_second_process_on_the_same_machine_neither_works_nor_ends_it(place: Place) -> None:
    place.ready(script(place, SAVING))
    with machine(place) as process:
        pid = pid_of(process)
        with machine(place) as second:
            err = second.communicate(timeout=GIVE_UP_S)[1]
        assert second.returncode == 2
        assert b"another `holdfast machine` works in" in err
        assert lives(pid)
        assert not place.ended.exists()
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=GIVE_UP_S)
    assert place.ended.read_text() == "ended\n"
