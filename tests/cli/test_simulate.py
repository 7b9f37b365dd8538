"""`holdfast simulate` as people call it: what it prints is what the engine says, and traces are read as they are meant."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from simulations import HOUR, PRICED, QUICK, WORKLOAD, data, invoke, made, ok, probes

from holdfast.core.errors import UsageError
from holdfast.policy.market.arrays import NOTHING, ON_DEMAND, Choice, Situation
from holdfast.policy.market.registry import POLICIES
from holdfast.simulate.market.engine import simulate
from holdfast.simulate.traces.scenarios import SCENARIOS

# ---- figures


def test_its_figures_are_the_engines_to_the_last_millionth() -> None:
    section = data(*QUICK, "--scenario", "bursty", "--policy", "greedy", "--policy", "ours")["sections"][0]
    trace = made()
    starts = trace.starts(8 * HOUR, 12 * HOUR)
    assert [window["start_s"] for window in section["windows"]] == (starts * 300).tolist()
    for line in section["policies"]:
        outcomes = simulate(trace, POLICIES[line["policy"]], WORKLOAD, starts)
        told = [round(window["cost_usd"][line["policy"]] * 1e6) for window in section["windows"]]
        assert told == outcomes.microusd.tolist()
        assert round(line["mean_usd"] * 1e6 * len(starts)) == int(outcomes.microusd.sum())
        assert line["misses"] == int(outcomes.missed.sum())
    assert all(w["optimum_usd"] <= min(w["cost_usd"].values()) for w in section["windows"])


def test_the_table_says_what_the_json_says(tmp_path: Path) -> None:
    chosen = [*QUICK, "--scenario", "bursty", "--deadline", "7h,9h", "--billing", "aws-first-hour-free"]
    table = ok(*chosen, "--csv", tmp_path / "sub" / "windows.csv")
    sections = data(*chosen)["sections"]
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    for number, section in enumerate(sections):
        for line in section["policies"]:
            cells = [each for each in lines if each[0] == line["policy"]][number]
            assert cells[1:3] == [str(line["windows"]), f"${line['mean_usd']:.2f}" + ("*" if line["misses"] else "")]
            assert f"${line['refund_usd']:.2f}" == cells[-1]
    assert [section["deadline_s"] for section in sections] == [7 * HOUR, 9 * HOUR]
    assert any(line["refund_usd"] for line in sections[0]["policies"])
    assert "not subtracted" in table
    assert "spot was late in" in table
    assert "\x1b" not in table
    with (tmp_path / "sub" / "windows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(line["windows"] for section in sections for line in section["policies"])
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert not list(tmp_path.glob("**/*.part"))


def test_pools_by_themselves_and_together() -> None:
    few = [*QUICK, "--scenario", "correlated", "--policy", "uniform-progress", "--windows", 4, "--no-optimum"]
    apart, together = data(*few)["sections"][0], data(*few, "--pools", "together")["sections"][0]
    assert [ground["pools"] for ground in apart["grounds"]] == [[f"correlated-{each}"] for each in "abc"]
    assert [ground["name"] for ground in together["grounds"]] == ["correlated"]
    assert len(apart["windows"]) == 12
    trace = made("correlated")
    starts = np.array([window["start_s"] // 300 for window in together["windows"]])
    costs = simulate(trace, POLICIES["uniform-progress"], WORKLOAD, starts).microusd / 1e6
    assert [window["cost_usd"]["uniform-progress"] for window in together["windows"]] == costs.tolist()
    table = ok(*few)
    assert "3 pools one by one" in table
    assert re.search(r"^correlated-b +\d+ % +4 ", table, re.MULTILINE)


def test_the_past_is_learned_from_and_not_played_on() -> None:
    chosen = [*QUICK, "--scenario", "bursty", "--policy", "ours"]
    past, cold = data(*chosen, "--beliefs", "past"), data(*chosen, "--history", "50%")
    assert past["beliefs"] == "past"
    windows, others = (each["sections"][0]["windows"] for each in (past, cold))
    assert min(window["start_s"] for window in windows) == 4.5 * 86400
    assert [each["start_s"] for each in windows] == [each["start_s"] for each in others]
    assert [each["cost_usd"] for each in windows] != [each["cost_usd"] for each in others]
    assert "first 4 d 12 h; all windows start after it" in ok(*chosen, "--beliefs", "past")
    assert data(*chosen, "--beliefs", "past", "--history", "2 d")["sections"][0]["windows"][0]["start_s"] == 2 * 86400


# ---- traces


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_both_signs_of_a_file_mean_the_same_when_it_is_said_which(tmp_path: Path, suffix: str) -> None:
    there = made().available()[0]
    right = probes(tmp_path / "a" / f"pool{suffix}", there)
    inverted = probes(tmp_path / "b" / f"pool{suffix}", ~there)
    chosen = PRICED[4:] if suffix == ".json" else PRICED
    one = data("--trace", right, "--marks", "available", *chosen)
    assert one == data("--trace", inverted, "--marks", "preempted", *chosen)
    assert one["sections"][0]["grounds"][0]["availability"] == pytest.approx(float(there.mean()))
    assert one["sections"][0]["grounds"][0]["on_demand_usd_h"] == 3.06
    # The same capacity as the scenario's, at the file's prices.
    outcomes = simulate(
        made().at_price(970_000, 3_060_000), POLICIES["greedy"], WORKLOAD, made().starts(8 * HOUR, 12 * HOUR)
    )
    costs = [window["cost_usd"]["greedy"] for window in one["sections"][0]["windows"]]
    assert costs == (outcomes.microusd / 1e6).tolist()


def test_a_sign_is_asked_for_and_a_wrong_one_remarked_on_but_not_corrected(tmp_path: Path) -> None:
    there = SCENARIOS["steady"].trace(seed=1, days=9).available()[0]
    path = probes(tmp_path / "pool.csv", there)
    with pytest.raises(UsageError, match=r"what does a 1 mean\?.*9\d% of the time, --marks preempted if it was gone"):
        ok("--trace", path, *PRICED)
    wrong = invoke("--trace", path, "--marks", "preempted", *PRICED, "--policy", "greedy", "--json")
    assert re.search(r"is there \d% of the time only; if that looks .* --marks available", wrong.stderr)
    availability = json.loads(wrong.stdout)["sections"][0]["grounds"][0]["availability"]
    assert availability == pytest.approx(1 - float(there.mean()))
    assert "wrong way" not in invoke("--trace", path, "--marks", "available", *PRICED, "--policy", "greedy").output


def test_nodes_counts_and_prices_are_read(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.csv"
    joined = "".join(f"0,add,node{number}\n" for number in range(5))
    nodes.write_text(f"{joined}{30 * HOUR * 1000},remove,node0\n{40 * HOUR * 1000},remove,node1\n")
    chosen = [*PRICED, "--policy", "spot", "--every", "8h", "--no-optimum"]
    told = {gang: data("--trace", nodes, "--gang", gang, *chosen)["sections"][0] for gang in (1, 5)}
    assert told[1]["grounds"][0]["availability"] == 1
    assert told[5]["grounds"][0]["availability"] == pytest.approx(0.75, abs=0.001)
    assert told[1]["policies"][0]["misses"] == 0
    assert [bool(window["late"]) for window in told[5]["windows"]] == [False, False, False, True, True]
    assert told[5]["windows"][0]["cost_usd"]["spot"] == pytest.approx(5 * 0.97 * 6.1)
    counted = probes(tmp_path / "counted.csv", np.full(400, 3))
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"counted": [1.0] * 200 + [2.0] * 200}))
    section = data(
        "--trace", counted, "--marks", "machines", "--prices", prices, "--on-demand-price", 3, "--gang", 3, "--every", "17h",
        "--policy", "spot", *PRICED[4:],
    )["sections"][0]  # fmt: skip
    assert [window["cost_usd"]["spot"] for window in section["windows"]] == pytest.approx([3 * 6.1, 6 * 6.1])


# ---- one window


def test_the_story_has_the_decisions_of_the_engine() -> None:
    chosen = [*QUICK, "--scenario", "bursty", "--explain", 5, "--policy", "ours", "--policy", "uniform-progress"]
    trace, start = made(), int(made().starts(8 * HOUR, 12 * HOUR)[4])
    names = {NOTHING: ("nothing", None), ON_DEMAND: ("on-demand", None), 0: ("spot", "bursty")}
    told = data(*chosen, "--every-tick")
    assert (told["pool"], told["window"], told["start_s"]) == ("bursty", 5, start * 300)
    assert [each["policy"] for each in told["told"]] == ["ours", "uniform-progress"]
    for story, short in zip(told["told"], data(*chosen)["told"], strict=True):
        heard: list[tuple[int, tuple[str, str | None], int, int]] = []

        def watch(situation: Situation, choice: Choice, heard: list[Any] = heard) -> None:
            target, why, _ = choice.of(0)
            heard.append((situation.now_s, names[target], int(situation.work_left_s[0]), int(why)))

        outcomes = simulate(trace, POLICIES[story["policy"]], WORKLOAD, np.array([start]), watch)
        decisions = story["decisions"]
        assert [(d["at_s"], (d["market"], d["pool"]), d["work_left_s"]) for d in decisions] == [
            each[:3] for each in heard
        ]
        changes = [
            now[0]
            for before, now in zip([None, *heard], heard, strict=False)
            if before is None or now[1::2] != before[1::2]
        ]
        assert [each["at_s"] for each in short["decisions"]] == changes
        assert round(story["cost_usd"] * 1e6) == int(outcomes.microusd[0])
        assert all(each["reasons"] for each in decisions)


def test_the_story_in_words() -> None:
    text = ok(*QUICK, "--scenario", "bursty", "--explain", "bursty:5", "--policy", "ours", "--policy", "greedy")
    story = data(*QUICK, "--scenario", "bursty", "--explain", 5, "--policy", "ours")["told"][0]
    ours = text[text.index("\nours\n") : text.index("\ngreedy\n")]
    moments = re.findall(r"^ +(\d\d):(\d\d):(\d\d)  (wait|stay on|start on)", ours, re.MULTILINE)
    assert [int(h) * HOUR + int(m) * 60 + int(s) for h, m, s, _ in moments] == [d["at_s"] for d in story["decisions"]]
    for decision in story["decisions"]:
        for reason in decision["reasons"]:
            assert reason in ours
    assert f"in time: ${story['cost_usd']:.2f}" in ours
    assert ours.count("(spot was taken away)") == int(re.search(r"(\d+) preemptions", ours)[1])  # type: ignore[index]
    lanes = text[: text.index("\nours\n")]
    assert re.search(r"^spot is there ", lanes, re.MULTILINE)
    assert re.search(rf"^ours .*[▃█].* h +\${story['cost_usd']:.2f}$", lanes, re.MULTILINE)
    assert "Another policy" in ok(*QUICK, "--scenario", "bursty", "--explain", 5)


# ---- the page for users


def test_what_the_page_shows_is_what_comes_out() -> None:
    """Of the policies that do not learn: those of which the figures are meant to stay."""
    page = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    steady = [name for name in POLICIES if name != "ours"]
    chosen = [word for name in steady for word in ("--policy", name)]
    shown = {line.split()[0]: line.split() for line in page.splitlines() if re.match(r"[a-z-]+ +\d\d +\$", line)}
    printed = ok("--scenario", "diurnal", *chosen)
    for line in printed.splitlines():
        if line.split()[:1] and line.split()[0] in shown:
            assert line.split() == shown.pop(line.split()[0])
        if line.startswith("Note: "):
            assert line in page
    assert list(shown) == ["ours"]
    for line in ok("--scenario", "scarce", "--explain", 6, *chosen).splitlines()[:9]:
        if not line.startswith(("uniform-progress-as-written", "on-demand", "spot  ")):
            assert line.rstrip() in page
