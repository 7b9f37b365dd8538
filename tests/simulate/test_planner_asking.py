"""What was said, measured, filed and priced: which of it counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from planning import HOUR_S, machine

from holdfast.core.errors import UsageError
from holdfast.core.jobfile import Accelerator, Deadline, parse_job
from holdfast.simulate.planner.asking import Asked, case_of
from holdfast.simulate.planner.assumed import LAUNCH_S, assume
from holdfast.simulate.planner.case import Case
from holdfast.simulate.planner.figures import Origin
from holdfast.simulate.planner.measured import Measured, read_report, with_measured
from holdfast.simulate.planner.prices import Where, load_prices, parse_where, priced

TABLE = load_prices()
A100 = Accelerator("A100", 8)


def asked(text: str = "", measured: Measured | None = None, **said: Any) -> Case:
    return case_of(Asked(**said), parse_job(text) if text else None, TABLE, now_unix_s=0.0, measured=measured)


def shown(**more: Any) -> Measured:
    figures: dict[str, Any] = {
        "name": "run", "attempts": 3, "step_s": 0.5, "stall_s": 0.2, "bandwidth": 2e8, "checkpoint_bytes": 3e9, "restart_s": 90.0,
        "had_new_machine": True, "preemptions": 4, "exposure_s": 20 * HOUR_S, "notice_to_durable_s": 3.0, "restores": 2,
    }  # fmt: skip
    return Measured(**figures | more)


# ---- prices


def test_the_shipped_table_is_dated_and_plausible() -> None:
    assert len(TABLE) > 30
    assert {row.provider for row in TABLE} == {"aws", "gcp", "azure"}
    for row in TABLE:
        assert 0.1 < row.spot_usd_h / row.on_demand_usd_h < 0.6, row.pool
        assert row.as_of[:2] == "20"
        assert row.notice_s == (120 if row.provider == "aws" else 30)
        # Whole machines: eight large GPUs never cost less than a dollar each.
        assert row.accelerator not in ("A100", "H100") or row.on_demand_usd_h >= row.gpus
    # A machine of eight is not cheaper than eight of one.
    one, eight = (next(row for row in TABLE if row.instance == f"a2-highgpu-{count}g") for count in (1, 8))
    assert eight.on_demand_usd_h == pytest.approx(8 * one.on_demand_usd_h, rel=0.01)


def test_places() -> None:
    assert {row.provider for row in priced(TABLE, A100, [parse_where("aws")])} == {"aws"}
    zone = priced(TABLE, A100, [parse_where("aws/us-east-1/us-east-1a")])
    assert [row.pool for row in zone] == ["aws/us-east-1/p4d.24xlarge"]
    assert len(priced(TABLE, A100)) > 2
    assert [row.spot_usd_h for row in priced(TABLE, A100)] == sorted(row.spot_usd_h for row in priced(TABLE, A100))
    assert priced(TABLE, A100, [parse_where("*", "p4d.24xlarge")])[0].instance == "p4d.24xlarge"
    for wrong in ("", "a/b/c/d", "aws//x"):
        with pytest.raises(UsageError, match="not a place"):
            parse_where(wrong)


@pytest.mark.parametrize(
    ("wanted", "where", "says"),
    [
        (Accelerator("A100", 3), [], "no machine with A100:3 has a price; known are A100:1, A100:2"),
        (Accelerator("B9000", 8), [], "no price of B9000 is known; known are A100"),
        (A100, [parse_where("aws/mars")], "no price of A100:8 there; known are aws/us-east-1"),
    ],
)
def test_what_has_no_price(wanted: Accelerator, where: list[Where], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        priced(TABLE, wanted, where)


def test_own_price_tables(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    row = msgspec.to_builtins(machine())
    path.write_text(json.dumps({"format": 1, "rows": [row]}))
    assert load_prices(path) == (machine(),)
    for table, says in (
        ({"format": 2, "rows": []}, "format 2"),
        ({"format": 1, "rows": [row, row]}, "prices one machine twice"),
        ({"format": 1, "rows": [row | {"spot_usd_h": 0}]}, "more than \\$0"),
        ({"format": 1, "rows": [row | {"spot": 1}]}, "no price table"),
        ({"format": 1, "rows": [{"provider": "x"}]}, "no price table"),
    ):
        path.write_text(json.dumps(table))
        with pytest.raises(UsageError, match=says):
            load_prices(path)
    with pytest.raises(UsageError, match="cannot read the prices"):
        load_prices(tmp_path / "none.json")


# ---- what counts


def test_flags_come_first_then_what_was_measured_then_the_file() -> None:
    text = "resources: {accelerators: A100:8}\nplan: {work: 10h, step_time: 9s}\ncheckpoint: {size: 9GiB, bandwidth: 9 MiB/s}\n"
    case = asked(text, shown(), checkpoint_bytes=1e9, deadline=Deadline(after_s=72_000.0))
    known = case.known
    assert known.checkpoint_bytes is not None
    assert (known.checkpoint_bytes.likely, known.checkpoint_bytes.origin) == (1e9, Origin.GIVEN)
    assert known.bandwidth is not None
    assert (known.bandwidth.likely, known.bandwidth.origin) == (2e8, Origin.MEASURED)
    assert known.step_s is not None
    assert known.step_s.likely == 0.5
    assert case.deadline_s == 72_000.0
    filed = asked(text).known
    assert filed.step_s is not None
    assert (filed.step_s.likely, filed.step_s.origin) == (9.0, Origin.JOB_FILE)


def test_measured_lives_weigh_against_what_was_believed() -> None:
    """One preemption in 4 h was believed, 4 in 20 h were seen: 5 in 24 h."""
    case = asked("resources: {accelerators: A100:8}\nplan: {work: 10h}\n")
    believed = assume(case, case.hardware[0]).life_s
    life = with_measured(case.known, shown(), believed).life_s
    assert life is not None
    assert life.likely == pytest.approx(24 * HOUR_S / 5)
    assert life.low < life.likely < life.high
    more = with_measured(case.known, shown(preemptions=40, exposure_s=200 * HOUR_S), believed).life_s
    assert more is not None
    assert more.high / more.low < life.high / life.low
    none = with_measured(case.known, shown(preemptions=0, exposure_s=100 * HOUR_S), believed).life_s
    assert none is not None
    assert none.likely == pytest.approx(104 * HOUR_S)
    assert with_measured(case.known, shown(exposure_s=0.0, preemptions=0), believed).life_s is None


def test_a_restart_on_one_machine_lacks_the_launch() -> None:
    case = asked("resources: {accelerators: A100:8}\nplan: {work: 10h}\n")
    believed = assume(case, case.hardware[0]).life_s
    for new, expected in ((True, 90.0), (False, 90.0 + LAUNCH_S)):
        changeover = with_measured(case.known, shown(had_new_machine=new), believed).changeover_s
        assert changeover is not None
        assert changeover.likely == expected


def test_hardware_from_files_and_flags() -> None:
    text = """
resources:
  any_of: [{infra: aws, accelerators: A100:8}, {infra: gcp, accelerators: {H100: 8}}, {infra: azure, accelerators: A100:8}]
plan: {work: {A100:8: 48h, h100:8: 22h}}
"""
    case = asked(text)
    assert [(str(each.accelerator), each.work_s) for each in case.hardware] == [
        ("A100:8", 172_800.0),
        ("H100:8", 79_200.0),
    ]
    assert {pool.provider for pool in case.hardware[0].pools} == {"aws", "azure"}
    assert {pool.provider for pool in case.hardware[1].pools} == {"gcp"}
    flags = asked(text, on=((A100, 3600.0), (Accelerator("L4", 1), None)), work_s=7200.0, pools=("gcp",))
    assert [(str(each.accelerator), each.work_s) for each in flags.hardware] == [("A100:8", 3600.0), ("L4:1", 7200.0)]
    assert {pool.provider for each in flags.hardware for pool in each.pools} == {"gcp"}
    cpus = asked("resources: {cpus: 32+, infra: aws}\nplan: {work: 5h, tasks: true}")
    assert cpus.hardware[0].pools[0].instance == "c6i.8xlarge"
    assert cpus.tasks
    assert not cpus.saves


def test_given_prices_replace_the_table() -> None:
    both = asked(on=((A100, 3600.0),), price_spot=5.0, price_on_demand=20.0).hardware[0].pools
    assert [(pool.spot_usd_h, pool.on_demand_usd_h, pool.as_of) for pool in both] == [(5.0, 20.0, "given")]
    unknown = asked(on=((Accelerator("TPU", 4), 3600.0),), price_spot=5.0, price_on_demand=20.0).hardware[0].pools
    assert unknown[0].pool == "given/prices/TPU:4"
    spot = asked(on=((A100, 3600.0),), price_spot=5.0).hardware[0].pools
    assert {pool.spot_usd_h for pool in spot} == {5.0}
    assert len({pool.on_demand_usd_h for pool in spot}) > 1


@pytest.mark.parametrize(
    ("text", "said", "says"),
    [
        ("", {"work_s": 3600.0}, "what does it run on"),
        ("resources: {accelerators: A100:8}", {}, "how long does the work take on A100:8"),
        ("resources: {accelerators: A100:8}\nplan: {work: {H100:8: 1h}}", {}, "how long does the work take on A100:8"),
        ("resources: {accelerators: A100:8}", {"work_s": 3600.0, "engineering_hours": 3.0}, "hourly-rate"),
        ("", {"on": ((A100, 1e4), (Accelerator("L4", 1), 1e4)), "price_spot": 1.0}, "one kind of machine"),
        ("", {"on": ((A100, 1e4),), "price_spot": 0.0}, "a price is more than"),
        ("", {"on": ((A100, 1e4),), "bandwidth": 0.0}, "bandwidth is more than zero"),
        ("", {"on": ((A100, 1e4),), "confidence": 1.0}, "confidence"),
    ],
)
def test_what_is_missing_or_makes_no_sense(text: str, said: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(text, **said)


def test_notes_and_reports(tmp_path: Path) -> None:
    case = asked("resources: {accelerators: A100:8, use_spot: false}\nplan: {work: 10h}\n", shown(notes=("seen",)))
    assert "seen" in case.notes
    assert any("on-demand only" in note for note in case.notes)
    path = tmp_path / "report.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not what `holdfast report --json` writes"):
        read_report(path)
    with pytest.raises(UsageError, match="cannot read the report"):
        read_report(tmp_path / "none.json")


def test_rules_for_the_launcher_are_checked_and_said_not_to_be_counted() -> None:
    job = parse_job(
        "resources: {accelerators: 'A100:8'}\nplan: {work: 48h}\nfallback_after: 3 tries or 10 min\nreserved: [block-a]\n"
    )
    case = case_of(Asked(), job, TABLE, now_unix_s=0.0)
    assert any("fallback_after, reserved" in note for note in case.notes)
    wrong = msgspec.structs.replace(job, start_window="mon-fry 20:00-06:00")
    with pytest.raises(UsageError, match="start_window"):
        case_of(Asked(), wrong, TABLE, now_unix_s=0.0)
