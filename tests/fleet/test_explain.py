"""`status --explain` says what a controller would do: the same that one does, at every moment of a run; and it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_world import STEP_S, World
from imagined import Faults
from typer.testing import CliRunner, Result

from holdfast.cli.app import app
from holdfast.core.errors import ProviderError, UsageError
from holdfast.core.ids import seeded_tokens
from holdfast.fleet import explain as explaining
from holdfast.fleet import shell
from holdfast.fleet.explain import Explanation, explain
from holdfast.fleet.mandate import Mandate
from holdfast.provider.local import LocalCloud
from holdfast.store.local import LocalStore


class ReadOnly:
    """A provider of which nothing may be asked but to tell."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        assert name not in ("create", "terminate", "extend", "remove", "request"), name
        return getattr(self._inner, name)


def contents(world: World) -> dict[str, bytes]:
    return {entry.key: world.store.get(entry.key, max_bytes=1 << 20) for entry in world.store.list()}


def explained(world: World, monkeypatch: pytest.MonkeyPatch, provider: Any = None) -> Explanation:
    monkeypatch.setattr(explaining, "terms_of", lambda *_, **__: world.terms)
    mandate = Mandate(
        format=1, nonce="", run_id="run", fleet="fleet", provider="imagined", place="", job_text="run: x",
        started_unix_s=world.born_s,
    )  # fmt: skip
    before = contents(world)
    found = explain(
        mandate,
        world.store,
        lambda: provider or ReadOnly(world.cloud),
        clock=world.clock,
        tokens=seeded_tokens(7),
    )
    assert contents(world) == before
    return found


def preempted(world: World) -> None:
    machine = world.working()
    if machine is not None and machine.launch == 1 and world.cloud.now_s > world.born_s + 600 and not machine.told_at_s:
        world.cloud.preempt(machine, 120)


@pytest.mark.parametrize(
    ("options", "script", "words"),
    [
        ({}, preempted, {"launch 1 in", "let launch 1 work", "ask for launch 1's", "to stand by for launch 1", "book launch 1"}),
        ({"budget_microusd": 900_000, "work_s": 7200}, lambda world: None, {"leave: budget", "tell launch 1 to save and stop"}),
        ({"cloud_options": {"faults": Faults(lost_answer=1.0)}}, preempted, {"take i-", "book launch 1"}),
    ],
    ids=["handed over", "out of budget", "answers are lost"],
)  # fmt: skip
def test_it_says_what_a_controller_that_comes_now_does(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], script: Callable[[World], None], words: set[str]
) -> None:
    """A new controller at every step."""
    world, asked = World(**options), list[Any]()
    real = shell.instruct

    def noted(*given: Any) -> Any:
        asked.append(real(*given))
        return asked[-1]

    monkeypatch.setattr(shell, "instruct", noted)
    said: set[str] = set()
    for _ in range(600):
        script(world)
        found = explained(world, monkeypatch)
        asked.clear()
        over = world.play_for(STEP_S)
        _, instructions, outlook = asked[0]
        assert found.would == tuple(explaining._in_words(each) for each in instructions)
        assert found.because == outlook.reasons
        # What follows from the first instructions is said when they are carried out.
        said |= {explaining._in_words(each)[0] for _, several, _ in asked for each in several}
        if over is not None:
            break
    else:
        raise AssertionError(world.story())
    assert all(any(word in each for each in said) for word in words), sorted(said)
    assert [launch for launch, _ in found.launched] == list(range(1, len(found.launched) + 1))
    assert all(reasons for _, reasons in found.launched)


def test_a_provider_that_cannot_be_asked_is_a_part_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.play_for(300)

    class Silent(ReadOnly):
        def offers(self, *_: Any) -> Any:
            raise ProviderError("no credentials")

        def machines(self, *_: Any) -> Any:
            raise ProviderError("no list")

    found = explained(world, monkeypatch, Silent(world.cloud))
    assert found.problem == "imagined: no credentials"
    assert (found.would, found.because) == ((), ())
    assert found.launched[0][0] == 1
    assert any("no list" in each for each in found.known)


def status(url: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["status", str(url), *words])


def test_the_command_beside_a_cloud_that_runs_and_one_that_does_not(tmp_path: Path) -> None:
    """Nobody has launched anything yet: a controller would, and status says what and why, without doing it."""
    from holdfast.core.clock import SystemClock
    from holdfast.core.jobfile import parse_job
    from holdfast.fleet.mandate import commission

    prices = {"spot": "0.30", "on-demand": "1.00"}
    pools = [{"name": f"local/here/a/small/{market}", "price": price} for market, price in prices.items()]
    (tmp_path / "config.json").write_text(json.dumps({"pools": pools, "types": {"small": {}}}))
    text = f"run: 'true'\nbudget: 2\nresources: {{infra: local}}\ncheckpoint: {{url: {tmp_path}/run}}"
    cloud = LocalCloud.open(tmp_path / "cloud", tmp_path / "config.json")
    store = LocalStore(tmp_path / "run")
    commission(
        parse_job(text), text, store, cloud, place=str(tmp_path / "cloud"), fleet="default", base=tmp_path,
        clock=SystemClock(), tokens=seeded_tokens(1),
    )  # fmt: skip
    before = sorted(entry.key for entry in store.list())
    shown = status(tmp_path / "run", "--explain")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "local offers 2 pools that fit" in shown.stdout
    assert "  launch 1 in local/here/a/small/spot: " in shown.stdout
    plain = json.loads(status(tmp_path / "run", "--explain", "--json").stdout)["explained"]
    assert plain["would"][0]["do"].startswith("launch 1 in")
    assert plain["would"][0]["reasons"]
    assert plain["problem"] is None
    assert sorted(entry.key for entry in store.list()) == before
    assert cloud.machines("default") == []
    cloud.end()
    after = status(tmp_path / "run", "--explain")
    assert "is not known: local: no rehearsal cloud runs in" in after.stdout, after.output
    assert LocalCloud.running(tmp_path / "cloud") is None, "none is started by a look"
    assert "explained" not in json.loads(status(tmp_path / "run", "--json").stdout)


@pytest.mark.parametrize("words", [["--home", "{}/home", "--explain"], ["{}/none", "--explain"]])
def test_wrong_words(tmp_path: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["status", *(each.format(tmp_path) for each in words)])
    assert isinstance(done.exception, UsageError), done.output


@pytest.mark.parametrize("spelling", ["--dry-run", "--dryrun"])
def test_both_spellings_of_a_dry_run(tmp_path: Path, spelling: str) -> None:
    """SkyPilot's, too, wherever a command has one."""
    from typer.main import get_command

    commands = [get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        spellings = {name for option in command.params for name in option.opts}
        assert ("--dryrun" in spellings) == ("--dry-run" in spellings), command.name
    job = tmp_path / "job.yaml"
    job.write_text(f"run: x\nresources: {{infra: nowhere}}\ncheckpoint: {{url: {tmp_path}/run}}")
    done = CliRunner().invoke(app, ["launch", str(job), spelling])
    assert "no provider 'nowhere'" in str(done.exception)
