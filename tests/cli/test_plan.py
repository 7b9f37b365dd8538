"""`holdfast plan`: what it says in the terminal, as JSON and as a page, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import holdfast
from holdfast.cli.app import app
from holdfast.cli.plan_json import rounded
from holdfast.cli.plan_tables import about_usd, chance
from holdfast.core.errors import UsageError

QUICK = ["--samples", "20", "--no-sensitivity"]
PRICED = ["--on", "A100:8", "--price-on-demand", "20", "--price-spot", "6", "--changeover", "5 min", "--mean-life", "4h",
          "--checkpoint-size", "1GiB"]  # fmt: skip
LONG = os.environ.get("HOLDFAST_TEST_SCALE") == "long"
JOB = Path(__file__).parents[2] / "examples" / "plan" / "job.yaml"


def planned(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def told(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(planned(*arguments, "--json"))
    return found


def test_a_page_of_the_terminal() -> None:
    said = planned("--work", "5h", *PRICED, "--deadline", "8h", "--budget", "95", "--samples", "20")
    lines = said.splitlines()
    assert lines[0] == "job: 5 h on A100:8; deadline 8 h; budget $95"
    assert lines[1].startswith("Spot is worth it: ")
    for part in (
        "→ ",
        "Save every",
        "Break-even: ",
        "WHAT DECIDES",
        "PILOT",
        "READY?",
        "PRICES PER HOUR",
        "Not in the model: ",
    ):
        assert part in said
    assert lines[-1] == "20 samples, seed 1. Orientation, not a quote."


def test_json_is_rounded_labelled_and_deterministic() -> None:
    arguments = ["--work", "5h", *PRICED, *QUICK]
    one = told(*arguments)
    assert one == told(*arguments)
    assert one != told(*arguments, "--seed", "2")
    assert one["label"] == "orientation"
    assert one["recommended"] in one["options"]
    assert one["figures"]["changeover_s"] == {
        "likely": 300.0,
        "low": 300.0,
        "high": 300.0,
        "origin": "given",
        "note": "",
    }
    on_demand = next(each for each in one["options"] if each["mix"] == "on-demand")
    # Five hours and a changeover; the saves in between take a thousandth.
    assert on_demand["cost_usd"]["mean"] == pytest.approx(20 * (5 + 300 / 3600), rel=2e-3)
    assert on_demand["p_deadline"] is None
    assert {each["kind"] for each in one["verdict"]["because"]} == set()


def test_the_examples_of_the_help_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(JOB, tmp_path / "job.yaml")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"holdfast plan (.*)", planned("--help").split("Examples:")[1])
    assert len(examples) == 5
    # The second one has no option that others have not.
    for example in examples if LONG else [examples[0], *examples[2:]]:
        words = shlex.split(example)
        if "--measured" in words:
            at = words.index("--measured")
            del words[at : at + 2]
        done = CliRunner().invoke(app, ["plan", *words, *QUICK], catch_exceptions=False)
        assert done.exit_code in (0, 1 if "--check" in words else 0), example
        assert "Orientation, not a quote." in done.stdout
    assert (tmp_path / "plan.html").stat().st_size > 10_000


def test_check_leaves_with_one_where_it_is_not_met() -> None:
    arguments = ["--work", "5h", *PRICED, *QUICK, "--check"]
    planned(*arguments, "--deadline", "8h")
    planned(*arguments, "--deadline", "4h", code=1)
    planned(*arguments, "--budget", "10", code=1)
    with pytest.raises(UsageError, match="--check compares with a deadline or a budget"):
        planned(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--work", "5h"], "what does it run on"),
        (["--on", "A100:8"], "how long does the work take"),
        (["--work", "5h", "--on", "A100:8,H100:8"], "one kind of machine per --on"),
        (["--work", "5h", "--on", "A100:8", "--confidence", "high"], "not a share"),
        (["--work", "5h", "--on", "A100:8", "--samples", "3"], "20 to 5,000 samples"),
        (["--work", "5h", "--on", "A100:8", "--deadline", "soon"], "not a duration"),
        (["none.yaml"], "cannot read the job file"),
        (["--work", "5h", "--on", "A100:8", "--measured", "none.json"], "cannot read the report"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        planned(*arguments)


def test_a_mistake_in_the_job_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.read_text().replace("deadline: 60h", "dedline: 60h"))
    with pytest.raises(UsageError, match=r"job\.yaml, line \d+: unknown key 'dedline'; did you mean 'deadline'"):
        planned(str(path))


def test_serving_is_told_without_playing() -> None:
    said = planned("--serving", "--on", "L4:1", "--nodes", "4")
    assert "Spot is not worth it here, because a latency-critical server" in said
    assert told("--serving", "--on", "L4:1")["recommended"] is None


def test_where_it_is_not_worth_it_on_demand_is_recommended() -> None:
    said = planned("--work", "20min", *PRICED, "--deadline", "5h", *QUICK)
    assert "Spot is not worth it here, because it is a short job" in said
    assert "Recommended: on-demand, $" in said
    assert "Cheapest all the same: " in said


# ---- the page


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.values: dict[str, float | None] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert not {"src", "href", "onclick", "onload"} & given.keys(), (tag, given)
        assert tag not in ("script", "link", "iframe", "object", "image")
        if tag != "meta":
            self.open.append(tag)
        key = given.get("data-key")
        if key is not None:
            self.values[key] = json.loads(given["data-value"] or "null")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "line", "circle", "path")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if part.isdigit() else tree[part]
    return tree


def test_the_page_says_what_json_says_and_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    arguments = ["--work", "5h", *PRICED, "--deadline", "8h", "--budget", "95", "--samples", "20"]
    found = told(*arguments, "--html", str(path))
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert len(page.values) > 30
    for key, value in page.values.items():
        assert _at(found, key) == value, key
    assert found["verdict"]["headline"] in page.text
    for point in found["checklist"]:
        assert point["says"] in page.text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    planned("--work", "5h", *PRICED, "--deadline", "8h", *QUICK, "--html", str(page))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [*command, "--window-size=900,1200", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(shot, check=True, capture_output=True, timeout=300)
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (900, 1200)
    assert picture.stat().st_size > 20_000


# ---- a run that was measured


def _train(url: Path, *, stop_at: int | None) -> None:
    state = torch.zeros(100_000)
    with holdfast.Run(str(url), save_every="4 steps", keep=None) as run:
        run.track(state={"weights": state})
        for step in run.batches(range(12)):
            state += 1
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)


def test_a_measured_run_replaces_assumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = tmp_path / "run"
    monkeypatch.setenv("HOLDFAST_MARKET", "spot")
    with pytest.raises(holdfast.Preempted):
        _train(url, stop_at=5)
    _train(url, stop_at=None)
    report = tmp_path / "report.json"
    report.write_text(CliRunner().invoke(app, ["report", str(url), "--json"], catch_exceptions=False).stdout)
    arguments = ["--work", "5h", "--on", "A100:8", *QUICK]
    by_url, by_file = (told(*arguments, "--measured", str(source)) for source in (url, report))
    figures = by_url["figures"]
    for name in ("life_s", "stall_s", "bandwidth", "checkpoint_bytes", "step_s", "changeover_s"):
        assert figures[name]["origin"] == "measured", name
        assert by_file["figures"][name]["likely"] == pytest.approx(figures[name]["likely"], rel=0.01), name
    assert figures["checkpoint_bytes"]["likely"] == pytest.approx(400_000, rel=0.3)
    assert "1 preemption in" in figures["life_s"]["note"]
    states = {point["what"]: point["state"] for point in by_url["checklist"]}
    assert states["restores work"] == states["notices are heard"] == "yes"
    assumed = told(*arguments)["figures"]
    assert assumed["bandwidth"]["origin"] == "assumed"
    # What a flag says outranks what was measured.
    said = told(*arguments, "--measured", str(url), "--bandwidth", "1GiB/s")["figures"]["bandwidth"]
    assert (said["origin"], said["likely"]) == ("given", rounded(float(1 << 30)))


def test_nothing_is_more_precise_than_it_can_be() -> None:
    assert [about_usd(value) for value in (1234.5, 27.66, 3.14159, float("inf"), None)] == [
        "$1,230", "$28", "$3.14", "\u2013", "\u2013",
    ]  # fmt: skip
    assert [chance(value) for value in (1.0, 0.0, 0.954, None)] == [">99 %", "<1 %", "95 %", "\u2013"]
    assert (rounded(1234567.0), rounded(float("nan")), rounded(None)) == (1235000.0, None, None)
