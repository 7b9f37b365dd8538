"""`holdfast sweep-leaks local`: real processes and left volumes past their time, and nothing else; as somebody types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rehearsal import ON_DEMAND, Rehearsal, Rehearse
from typer.testing import CliRunner, Result
from waiting import eventually

from holdfast.cli.app import app
from holdfast.core.errors import UsageError
from holdfast.provider.base import Machine

FOREVER = 'echo "$$" > "$HOME/pid"; echo ready; while :; do sleep 1; done'


def sweep(rehearsal: Rehearsal, *words: str) -> Result:
    return CliRunner().invoke(app, ["sweep-leaks", "local", "--cloud", str(rehearsal.folder), *words])


def found(rehearsal: Rehearsal, *words: str) -> dict[str, Any]:
    done = sweep(rehearsal, "--json", *words)
    assert done.exit_code == 0, done.output
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def launched(rehearsal: Rehearsal, expired_s: int, fleet: str = "fleet", **changes: Any) -> Machine:
    """A machine that lives, with nobody who knows of it."""
    expires_unix_s = int(rehearsal.cloud.clock.unix_s()) - expired_s
    machine = rehearsal.launch(FOREVER, expires_unix_s=expires_unix_s, fleet=fleet, **changes)
    rehearsal.said(machine, "ready")
    return machine


def alive(rehearsal: Rehearsal, fleet: str = "fleet") -> set[str]:
    return {each.id for each in rehearsal.cloud.machines(fleet) if each.state == "running"}


def test_what_is_past_its_time_is_shown_and_ended_and_nothing_else(rehearse: Rehearse) -> None:
    world = rehearse(leftovers={"after": ["terminated"], "kinds": ["volume"]}, billing={"disk_per_gib_h": "0.0001"})
    old, older = launched(world, 3600), launched(world, 90_000, pool=ON_DEMAND)
    within_margin, wanted = launched(world, 300), launched(world, -3600)
    theirs = launched(world, 3600, fleet="another")
    loose = launched(world, 7200)
    world.cloud.terminate([loose])
    world.gone(loose)
    shown = found(world, "--fleet", "fleet")
    assert {each["id"] for each in shown["machines"]} == {old.id, older.id}
    assert [(each["kind"], each["ends"]) for each in shown["leftovers"]] == [("volume", True)]
    assert all(each["expired_s"] >= 3600 for each in (*shown["machines"], *shown["leftovers"]))
    assert alive(world) == {old.id, older.id, within_margin.id, wanted.id}, "a look ends nothing"
    table = sweep(world, "--fleet", "fleet").output
    assert all(name in table for name in (old.id, older.id, shown["leftovers"][0]["id"]))
    assert not any(each.id in table for each in (wanted, within_margin, theirs))

    done = sweep(world, "--fleet", "fleet", "--end", "--yes")
    assert done.exit_code == 0, done.output
    assert "Asked for the end of 2 machines and 1 other things" in done.stderr
    for each in (old, older):
        world.gone(each)
    assert alive(world) == {within_margin.id, wanted.id}
    assert alive(world, "another") == {theirs.id}
    eventually(lambda: not any(f"/{old.id}/" in each for each in world.processes()), lambda: str(world.processes()))
    # Their own volumes have come loose: the next one finds them.
    again = found(world, "--fleet", "fleet", "--end", "--yes")
    assert len(again["leftovers"]) == 2
    assert again["machines"] == []
    assert found(world, "--fleet", "fleet") == {"machines": [], "leftovers": [], "problems": []}
    assert "Nothing of fleet fleet at local" in sweep(world, "--fleet", "fleet").output


def test_without_a_controller_its_records_or_its_cloud_they_are_found(rehearse: Rehearse) -> None:
    """The cloud's server is killed, too: its machines live on, and so does their bill."""
    world = rehearse()
    leak = launched(world, 3600)
    world.kill()
    refused = sweep(world, "--fleet", "fleet")
    assert isinstance(refused.exception, UsageError)
    assert "start it again: python -m holdfast.testing.cloud" in str(refused.exception)
    assert any(leak.id in each for each in world.processes())
    world.restart()
    assert [each["id"] for each in found(world, "--fleet", "fleet", "--end", "-y")["machines"]] == [leak.id]
    world.gone(leak)


def test_what_is_renewed_while_somebody_is_asked_stays_and_so_does_what_was_not_shown(
    rehearse: Rehearse, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = rehearse()
    renewed, leak, expiring = launched(world, 3600), launched(world, 3600), launched(world, -60)

    def answer(yes: bool) -> None:
        assert not yes
        now_s = int(world.cloud.clock.unix_s())
        world.cloud.extend(renewed, now_s + 3600)
        world.cloud.extend(expiring, now_s - 3600)  # nobody was shown this one

    monkeypatch.setattr("holdfast.cli.sweep_leaks.ask_first", answer)
    done = sweep(world, "--fleet", "fleet", "--end")
    assert done.exit_code == 0, done.output
    assert "the end of 1 machines" in done.stderr
    assert "1 had been renewed" in done.stderr
    world.gone(leak)
    assert alive(world) == {renewed.id, expiring.id}


def test_an_end_that_fails_is_said_and_holds_up_nothing(rehearse: Rehearse) -> None:
    world = rehearse(leftovers={"after": ["terminated"], "kinds": ["volume"]}, billing={"disk_per_gib_h": "0.0001"})
    leak, loose = launched(world, 3600), launched(world, 3600)
    world.cloud.terminate([loose])
    world.gone(loose)
    world.cloud.misbehave(script={"terminate": ["error"]})
    done = sweep(world, "--fleet", "fleet", "--end", "--yes")
    assert done.exit_code == 1
    assert "FAILED: local: the rehearsal cloud refuses POST /terminate" in done.stderr
    assert "not all of it was done" in done.stderr
    assert world.cloud.leftovers("fleet") == [], "the volume went all the same"
    assert alive(world) == {leak.id}
    assert sweep(world, "--fleet", "fleet", "--end", "--yes").exit_code == 0
    world.gone(leak)
    world.cloud.misbehave(script={"list": ["error", "error"]})
    blind = sweep(world, "--fleet", "fleet")
    assert blind.exit_code == 1
    assert "not known: local" in blind.stderr
    assert "Nothing of fleet" not in blind.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep-leaks", "nowhere"], "there are local, aws, gcp"),
        (["sweep-leaks", "slurm"], "sbatch"),
        (["sweep-leaks", "local", "--fleet", " "], "a fleet has a name"),
        (["sweep-leaks", "local", "--cloud", "{folder}/none"], "no rehearsal cloud runs in"),
        (["sweep-leaks", "aws", "--cloud", "x"], "--cloud names a rehearsal cloud's folder"),
    ],
)
def test_wrong_words(tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, [each.format(folder=tmp_path) for each in words])
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == [], "no cloud is started by a look"


def test_nobody_to_ask_ends_nothing(rehearse: Rehearse) -> None:
    world = rehearse()
    leak = launched(world, 3600)
    done = sweep(world, "--fleet", "fleet", "--end")
    assert isinstance(done.exception, UsageError)
    assert leak.id in done.output
    assert alive(world) == {leak.id}
    assert alive(world) == {leak.id}
    assert [each["id"] for each in found(world, "--fleet", "fleet", "--region", "elsewhere")["machines"]] == []
