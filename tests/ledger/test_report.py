"""`holdfast report`, on a training that was really killed: the page says what `--json` says, and both say what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lives import World
from test_accounting import by_hand
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.core.contract import (
    ENV_CONTROL,
    ENV_MARKET,
    ENV_PREVIOUS_STEP,
    ENV_PRICE,
    ENV_PRICE_ON_DEMAND,
    ProgressPage,
)
from holdfast.core.errors import UsageError
from holdfast.store.base import Store
from holdfast.store.local import LocalStore

TRAIN = Path(__file__).parents[2] / "examples" / "chargpt" / "train.py"
GIVE_UP_S = 300.0
KILLS_AFTER = (17, 38)
VOID = {"meta", "path", "rect", "line"}


@dataclass
class Ended:
    """What was seen of an attempt from outside."""

    reached_step: int
    restored_step: int
    started_s: float
    ended_s: float


def attempt(folder: Path, previous_step: int | None, kill_after: int | None) -> Ended:
    """Start the training once, under the contract that the agent keeps."""
    page = ProgressPage(folder)
    page.reset()
    environ = os.environ | {
        ENV_CONTROL: str(folder), ENV_MARKET: "spot", ENV_PRICE: "1.10", ENV_PRICE_ON_DEMAND: "3.67",
    }  # fmt: skip
    if previous_step is not None:
        environ[ENV_PREVIOUS_STEP] = str(previous_step)
    size = ["--epochs", "2", "--batches", "30", "--batch", "4", "--context", "32", "--width", "32", "--layers", "1"]
    command = [
        sys.executable,
        str(TRAIN),
        "--url",
        str(folder / "run"),
        "--save-every",
        "5 steps",
        "--workers",
        "0",
        *size,
    ]
    started_s = time.monotonic()
    with open(folder / "log", "ab") as log, subprocess.Popen(command, env=environ, stdout=log, stderr=log) as process:
        while kill_after is not None and ((progress := page.read()) is None or progress.step < kill_after):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() - started_s < GIVE_UP_S, "the training does not get on"
            time.sleep(0.001)
        if kill_after is not None:
            process.send_signal(signal.SIGKILL)
        status = process.wait(GIVE_UP_S)
    ended_s = time.monotonic()
    assert status == (0 if kill_after is None else -signal.SIGKILL), (folder / "log").read_text()
    progress = page.read()
    assert progress is not None
    page.close()
    return Ended(progress.step, progress.restored_step, started_s, ended_s)


class Page(HTMLParser):
    """Figures by key, and proof that every element is closed and nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}
        self.kinds: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert not {"src", "href", "srcset", "onload", "onclick"} & set(attributes)
        assert tag not in {"script", "link", "img", "iframe"}
        if tag not in VOID:
            self._open.append(tag)
        self.kinds.update((attributes.get("class") or "").split())
        key, value = attributes.get("data-key"), attributes.get("data-value")
        if key is not None and value is not None:
            assert self.figures.setdefault(key, value) == value

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def look_up(made: Any, key: str) -> Any:
    for part in key.split("."):
        made = made[int(part)] if isinstance(made, list) else made[part]
    return made


def same_figures(url: Path, page_path: Path, *options: str) -> tuple[dict[str, Any], Page]:
    made = json.loads(invoke(str(url), "--json", "--html", str(page_path), *options))
    text = page_path.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    page = Page(text)
    for key, value in page.figures.items():
        assert look_up(made, key) == json.loads(value), key
    return made, page


def adds_up(made: dict[str, Any]) -> None:
    """As decimals, to the microsecond and the micro-dollar."""
    exact = json.loads(json.dumps(made), parse_float=Decimal)
    for figures in [exact["total"], *(one["figures"] for one in exact["attempts"])]:
        assert sum(figures["buckets_s"].values()) == figures["billed_s"]
        assert figures["billed_s"] + figures["queue_wait_s"] == figures["wall_s"]
        assert figures["useful_s"] == figures["buckets_s"]["useful"]
        if figures["cost_usd"] is not None:
            assert sum(figures["costs_usd"].values()) == figures["cost_usd"]
    for name in ("wall_s", "billed_s", "useful_s", "queue_wait_s", "cost_usd", "lost_steps", "computed_steps"):
        parts = [one["figures"][name] for one in exact["attempts"]]
        assert None in parts or sum(parts) == exact["total"][name]
    savings = exact["savings"]
    if savings is not None:
        eaten = sum(savings[f"{name}_usd"] for name in ("lost_work", "restarts", "checkpointing", "idle"))
        assert savings["theoretical_usd"] - eaten == savings["actual_usd"]
        assert savings["actual_usd"] == savings["on_demand_usd"] - savings["paid_usd"]
        assert savings["paid_usd"] == exact["total"]["cost_usd"]


def test_a_training_that_was_killed_twice(tmp_path: Path) -> None:
    ends: list[Ended] = []
    for kill_after in (*KILLS_AFTER, None):
        ends.append(attempt(tmp_path, ends[-1].reached_step if ends else None, kill_after))
    made, page = same_figures(tmp_path / "run", tmp_path / "report.html")
    adds_up(made)
    attempts = made["attempts"]
    assert [one["ending"] for one in attempts] == ["died without a word"] * 2 + ["finished"]
    assert [one["reached_step"] for one in attempts] == [one.reached_step for one in ends]
    assert [one["start_step"] for one in attempts] == [one.restored_step for one in ends]
    lost = [before.reached_step - after.restored_step for before, after in pairwise(ends)]
    assert [one["figures"]["lost_steps"] for one in attempts] == [*lost, 0]
    assert made["total"]["computed_steps"] == 60 + sum(lost)
    # No longer than it was seen to take; the start of a process is known to a hundredth of a second.
    assert made["total"]["wall_s"] <= ends[-1].ended_s - ends[0].started_s + 0.02
    for one in attempts:
        assert one["figures"]["buckets_s"]["initialisation"] > 0
        assert one["figures"]["cost_usd"] > 0
    assert attempts[-1]["figures"]["buckets_s"]["useful"] > 0
    # One machine, so what was between the attempts was paid for.
    assert made["total"]["queue_wait_s"] == 0
    assert made["restarts"]["by_cause"] == {"died without a word": 2}
    assert 0 < made["total"]["goodput"] < 1
    assert made["total"]["saves"]["count"] >= 1
    assert made["total"]["buckets_s"]["evaluation"] > 0
    assert {"b-useful", "b-initialisation", "ended", "finished", "save-tick"} <= page.kinds
    assert len(page.figures) > 60


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = LocalStore(tmp_path / "gpt")
    hand = by_hand()
    for entry in hand.store.list():
        store.put(entry.key, hand.store.get(entry.key, max_bytes=1 << 20))
    return store


def test_recorded_prices_and_given_ones(run: Store, tmp_path: Path) -> None:
    url = tmp_path / "gpt"
    recorded, page = same_figures(url, tmp_path / "1.html")
    adds_up(recorded)
    assert page.figures["savings.actual_usd"] == "0.014235"
    given, _ = same_figures(url, tmp_path / "2.html", "--price-spot", "3.60", "--price-on-demand", "$0.90")
    adds_up(given)
    assert given["total"]["cost_usd"] == 2 * recorded["total"]["cost_usd"]
    # Spot that costs more than it saves is shown as what it is.
    assert given["savings"]["actual_usd"] < 0


def test_people_read_it(run: Store, tmp_path: Path) -> None:
    said = invoke(str(tmp_path / "gpt"))
    expected = [
        "3 attempts, finished", "goodput 17.9 %", "ETTR 9.4 %", "died without a word (time assumed)", "saved in fact (20.3 %)",
        "2 restarts (died without a word 1, preempted 1)", "Note: attempt 1 ended",
    ]  # fmt: skip
    for words in expected:
        assert words in said


def test_without_prices_there_are_no_dollars(tmp_path: Path) -> None:
    world = World(LocalStore(tmp_path / "gpt"))
    world.begin(machine="a", facts={"market": None})
    world.do_step(1_000_000)
    world.end("finish")
    made, _ = same_figures(tmp_path / "gpt", tmp_path / "page.html")
    assert made["total"]["cost_usd"] is None
    assert made["savings"] is None
    assert "give --price-spot" in invoke(str(tmp_path / "gpt"))
    assumed, _ = same_figures(tmp_path / "gpt", tmp_path / "page.html", "--price-spot", "1")
    assert assumed["notes"] == ["attempt 1: market not recorded, taken for spot"]
    assert "give --price-on-demand" in invoke(str(tmp_path / "gpt"), "--price-spot", "1")


def test_a_hostile_record_stays_text(tmp_path: Path) -> None:
    world = World(LocalStore(tmp_path / "<b>&x"))
    world.begin(machine="<script>alert(1)</script>", facts={"market": '"><img src=x>'})
    world.end("finish")
    same_figures(tmp_path / "<b>&x", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nothing",), "nothing is recorded"), (("gpt", "--price-spot", "cheap"), "dollars per hour"),
     (("gpt", "--price-on-demand", "-1"), "dollars per hour"), (("gpt", "--html", "no/such/folder"), "cannot write")],
)  # fmt: skip
def test_what_cannot_be_done_is_said(run: Store, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    url, *options = arguments
    with pytest.raises(UsageError, match=words):
        invoke(str(tmp_path / url), *options)
