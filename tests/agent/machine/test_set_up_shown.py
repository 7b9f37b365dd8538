"""What a set-up writes is where people look, without the secrets: also of one that fails, also of a standby's."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from agents import GIVE_UP_S, eventually, kept_output
from hypothesis import given
from hypothesis import strategies as st
from real import Place, machine

from holdfast.agent.logs import parse_log_key
from holdfast.agent.machine.secrets import Hider, patterns_of

VALUES = st.lists(st.text("ab\n", min_size=1, max_size=9), max_size=4)


@given(VALUES, st.lists(st.text("ab\nc", max_size=12), max_size=12))
def test_however_the_output_is_cut_what_is_shown_is_the_same_and_holds_no_secret(
    values: list[str], pieces: list[str]
) -> None:
    secrets = {f"S{number}": value for number, value in enumerate(values)}
    hider = Hider(secrets)
    shown = b"".join(hider.pass_on(piece.encode()) for piece in pieces) + hider.pass_on(b"", is_last=True)
    assert shown == Hider(secrets).pass_on("".join(pieces).encode(), is_last=True)
    patterns = patterns_of(secrets)
    found = re.sub("|".join(map(re.escape, patterns)), "***", "".join(pieces)) if patterns else "".join(pieces)
    assert shown.decode() == found
    # Nothing of an occurrence is shown, not even where a shorter one begins at the same place.
    for part in shown.decode().split("***"):
        assert not any(pattern in part for pattern in patterns)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def secret(place: Place) -> dict[str, str]:
    path = place.root / "secret"
    path.write_text("canary-5f2b")
    path.chmod(0o600)
    return {"TOKEN": f"file:{path}"}


def attempts(place: Place) -> dict[str, int]:
    """The attempt of the segment with this text."""
    found = {}
    for path in (place.run / "logs").rglob("*.log"):
        segment = parse_log_key(path.relative_to(place.run).as_posix())
        assert segment is not None
        found[path.read_text()] = segment.attempt
    return found


SETUP = 'echo "making ready with $TOKEN"; printf can; sleep 0.3; printf "ary-5f2b\\n" >&2; echo "to stderr" >&2'


def test_the_set_up_comes_before_what_the_command_writes_and_is_no_attempt_of_its_own(place: Place) -> None:
    place.ready("echo the command; sleep 2", setup=SETUP, secrets=secret(place))
    with machine(place) as process:
        out, err = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0, err.decode()
    eventually(lambda: b"the command" in kept_output(place.run))
    kept = kept_output(place.run).decode()
    assert kept.startswith("holdfast: set-up of launch 1 on machine-1\nmaking ready with ***\n***\nto stderr\n"), kept
    assert kept.index("to stderr") < kept.index("the command")
    assert set(attempts(place).values()) == {1}
    assert b"canary" not in kept_output(place.run) + out + err
    assert (place.folder / "setup.log").stat().st_mode & 0o077 == 0


def test_a_set_up_that_fails_is_shown_whole(place: Place) -> None:
    place.ready("true", setup=f"{SETUP}; seq 3000; exit 7", secrets=secret(place))
    with machine(place) as process:
        err = process.communicate(timeout=GIVE_UP_S)[1]
    assert process.returncode == 7
    kept = kept_output(place.run).decode()
    assert kept.count("making ready with ***\n") == 2, "it is tried twice"
    assert "\n2999\n3000\n" in kept
    assert "canary" not in kept + err.decode()


def test_what_was_written_until_a_machine_is_told_to_stop_is_kept(place: Place) -> None:
    place.ready("true", setup="echo begun; sleep 600")
    with machine(place) as process:
        log = place.folder / "setup.log"
        eventually(lambda: log.exists() and log.read_text() == "begun\n")
        place.controller.command(1, 0, "stop")
        process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert kept_output(place.run).decode().endswith("begun\n")


def test_a_standbys_set_up_is_shown_while_it_waits(place: Place) -> None:
    place.controller.job(run="true", notice="none", setup="echo ready to take over", grace_s=3)
    place.controller.intent(1, predecessor=7)
    place.controller.grant(1, 0, 3600)
    place.controller.answer(1)
    with machine(place) as process:
        eventually(lambda: b"ready to take over" in kept_output(place.run))
        place.controller.command(1, 0, "home")
        process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == os.EX_OK


def test_a_job_whose_output_is_not_kept_keeps_none_of_its_set_up(place: Place) -> None:
    place.ready("true", setup="echo quiet", keeps_output=False)
    with machine(place) as process:
        process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == 0
    assert not kept_output(place.run)
