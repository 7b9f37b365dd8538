"""A fleet's home and what people see of it: where it may lie, who has been heard, a line for every run, wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fleet_world import World
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.core.errors import StoreUnavailable, UsageError
from holdfast.core.fleet_home import Enrolment, enrolment_key, parse_news
from holdfast.core.ids import seeded_tokens
from holdfast.core.sealed import seal
from holdfast.fleet.home import Home, home_for
from holdfast.fleet.index import Index
from holdfast.fleet.instructions import Over
from holdfast.fleet.overview import overview_of
from holdfast.fleet.records import RunRecords
from holdfast.fleet.roll import Roll
from holdfast.fleet.view import RunView, see
from holdfast.store.base import Store
from holdfast.store.beneath import Beneath, SharedStores
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock
from holdfast.testing.servers import ministack_server
from holdfast.testing.store_conformance import StoreConformance


def entry(run_id: str, url: str) -> Enrolment:
    return Enrolment(format=1, nonce="n", run_id=run_id, url=url, name=run_id, provider="p", place="", at_unix_s=0.0)


def test_where_a_home_may_lie() -> None:
    assert home_for("s3://b/fleet/", "s3://b/runs/x") == "s3://b/fleet"
    assert home_for("s3://b/fleet", "s3://b/fleet-runs/x") == "s3://b/fleet"
    for run in ("s3://b/fleet", "s3://b/fleet/runs/x", "s3://b/fleet/inbox/x", "s3://b/fleet/over/x/y"):
        with pytest.raises(UsageError, match="prefix of its own"):
            home_for("s3://b/fleet", run)


@pytest.mark.parametrize(
    "key",
    ["inbox/x", "inbox/a.b", "inbox/a.1.2", "inbox/a/b.00000001.000000", "inbox/.enrolled", f"inbox/{'a' * 65}.enrolled", "runs/a"],
)  # fmt: skip
def test_what_is_no_news(key: str) -> None:
    assert parse_news(key) is None


def test_who_has_been_heard() -> None:
    store, clock = MemoryStore(), ManualClock()
    home = Home(store, clock=clock, tokens=seeded_tokens(1))
    home.beat("old", "host-a", 1, 3)
    clock.advance(60)
    home.beat("new", "host-b", 2, 3)
    store.put("controllers/torn", b"{")
    assert [(pulse.host, ago_s) for pulse, ago_s in home.controllers()] == [("host-b", 0), ("host-a", 60)]
    clock.advance(31)
    assert [pulse.host for pulse, _ in home.controllers()] == ["host-b"]
    home.leave("new")
    assert home.controllers() == []
    clock.advance(2 * 86400)
    home.controllers()
    assert [each.key for each in store.list("controllers/")] == ["controllers/torn"], "who never left is forgotten"


class TestBeneath(StoreConformance):
    """A folder of a store keeps all a store promises."""

    @pytest.fixture
    def store(self) -> Store:
        outer = MemoryStore()
        outer.put("runs/gpt2/data", b"somebody else's")
        outer.put("other", b"not below")
        return Beneath(outer, "runs/gpt")


def test_runs_in_one_bucket_share_a_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    stores = SharedStores()
    one, two = stores("s3://bucket/runs/a"), stores("s3://bucket/runs/b/")
    assert (one.url, two.url) == ("s3://bucket/runs/a", "s3://bucket/runs/b")
    assert one._inner is two._inner  # type: ignore[attr-defined]
    assert stores(str(tmp_path / "x")).url == f"file://{tmp_path}/x"
    stores.close()


def test_a_line_for_every_run(tmp_path: Path) -> None:
    """Also for those that cannot be read; looking again costs lists and pulses; a second look from the index the same."""
    clock, homely = ManualClock(), MemoryStore()
    worlds = {name: World(work_s=900) for name in ("a", "b", "c")}
    controllers = {name: world.controller() for name, world in worlds.items()}
    for _ in range(20):
        for name in ("a", "b"):
            controllers[name].step()
            worlds[name].cloud.advance(10)
    stores: dict[str, MemoryStore] = {f"memory://{name}": world.store for name, world in worlds.items()}
    home = Home(homely, clock=clock, tokens=seeded_tokens(1))
    for name in (*worlds, "d"):
        homely.put_new(enrolment_key(name), seal(entry(name, f"memory://{name}")))
    over = worlds["a"].play()
    view = RunView()
    for event in RunRecords(worlds["a"].store, clock=clock, tokens=seeded_tokens(2)).read():
        view = see(view, event)
    home.sign_off(entry("a", "memory://a"), over, overview_of(view, 0))

    def opened(url: str) -> Store:
        if url not in stores:
            raise StoreUnavailable("the bucket is away")
        return stores[url]

    for _ in range(2):
        index = Index(tmp_path / "index.sqlite")
        roll = Roll(home, opened, clock=clock, tokens=seeded_tokens(3), index=index)
        for _ in range(2):
            lines, overs = roll.look()
            assert [(line.name, line.phase, line.problem) for line in lines] == [
                ("b", "working", False), ("c", "waiting", False), ("d", "?", True),
            ]  # fmt: skip
            assert "the bucket is away" in (lines[2].why or "")
            assert [(each.name, each.outcome) for each in overs] == [("a", "done")]
            assert overs[0].cost_microusd == worlds["a"].cloud.spent_microusd()
        index.close()


def test_on_a_service_that_speaks_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty objects, a folder of a bucket, pulses that are overwritten."""
    with ministack_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        stores = SharedStores()
        home = Home(stores(f"{server.make_bucket('fleet')}/a/home"), clock=ManualClock(), tokens=seeded_tokens(1))
        assert home.ring("run-a", "enrolled")
        assert home.ring("run-a", "enrolled")
        home.beat("c", "host", 1, 2)
        home.beat("c", "host", 1, 3)
        assert list(home.news()) == ["inbox/run-a.enrolled"]
        assert [pulse.runs for pulse, _ in home.controllers()] == [3]
        home.leave("c")
        home.drop_news("inbox/run-a.enrolled")
        assert (home.news(), home.controllers(), home.run_ids()) == ({}, [], [])
        stores.close()


def test_sign_off_twice_is_as_good_as_once() -> None:
    homely = MemoryStore()
    home = Home(homely, clock=ManualClock(), tokens=seeded_tokens(1))
    run, over = entry("a", "memory://a"), Over(outcome="done", exit_code=0, reasons=())
    homely.put_new(enrolment_key("a"), seal(run))
    first = home.sign_off(run, over, overview_of(RunView(), 0))
    assert home.sign_off(run, over, overview_of(RunView(), 0)) == first
    assert home.run_ids() == []
    assert home.over_ids() == ["a"]


@pytest.mark.parametrize("command", ["status", "cost", "controller"])
def test_a_run_or_a_fleet(command: str, tmp_path: Path) -> None:
    for words in ([], [str(tmp_path / "run"), "--home", str(tmp_path / "home")]):
        result = CliRunner().invoke(app, [command, *words])
        assert isinstance(result.exception, UsageError)
        assert "either a run, by its URL, or a fleet" in str(result.exception)


def test_an_empty_home(tmp_path: Path) -> None:
    words = ["--home", str(tmp_path / "home"), "--index", str(tmp_path / "index.sqlite")]
    result = CliRunner().invoke(app, ["status", *words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "runs": [], "over": [], "controllers": [], "spent_microusd": 0, "reserved_microusd": 0,
    }  # fmt: skip
    result = CliRunner().invoke(app, ["controller", *words, "--until-empty"])
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "home").rglob("controllers/*"))
