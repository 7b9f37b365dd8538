"""A machine hears of its end as it would in a cloud, through holdfast's own listeners, and is killed when it was said."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from rehearsal import SPOT, Rehearsal, Rehearse
from waiting import eventually

from holdfast.provider.base import Machine

_WATCH = "exec python -m holdfast notices watch --json"


def test_a_notice_a_withdrawal_and_an_end(rehearse: Rehearse) -> None:
    rehearsal = rehearse(metadata="gcp", notice={"lead_s": 30})
    taken, spared = rehearsal.launch(_WATCH), rehearsal.launch(_WATCH)
    for machine in (taken, spared):
        eventually(partial(_runs, rehearsal, machine))
        rehearsal.cloud.preempt(machine.id)
    for machine in (taken, spared):
        _heard(rehearsal, machine, "preemption")
    rehearsal.cloud.withdraw(spared.id)
    rehearsal.cloud.preempt(taken.id, lead_s=0)
    assert rehearsal.gone(taken).ended_by == "provider"
    _heard(rehearsal, spared, "withdrawn")
    assert rehearsal.listed(spared).state == "running"
    assert rehearsal.listed(spared).ended_by is None


def test_advice_that_comes_to_nothing(rehearse: Rehearse) -> None:
    rehearsal = rehearse(network="shared", notice={"idle_rebalance": 1.0, "idle_after_s": 0.05})
    machine = rehearsal.launch(_WATCH)
    _heard(rehearsal, machine, "rebalance")
    assert rehearsal.listed(machine).state == "running"
    assert rehearsal.entries("doomed") == []


def test_capacity_that_falls_takes_machines_with_a_notice_before(rehearse: Rehearse) -> None:
    """The notice comes its lead before the fall that is scripted, and the deadline is the fall."""
    pools = [{"name": SPOT, "capacity": [[0, 3], [150, 1]], "price": 0.3}]
    rehearsal = rehearse(pools=pools, speed=100, notice={"lead_s": 0.5}, start_unix_s=1_000_000)
    machines = [rehearsal.launch("sleep 900") for _ in range(3)]
    eventually(lambda: len(rehearsal.entries("death")) == 2)
    doomed, noticed, dead = (rehearsal.entries(event) for event in ("doomed", "notice", "death"))
    assert len(doomed) == len(noticed) == 2
    assert {entry["machine"] for entry in dead} == {entry["machine"] for entry in doomed}
    for entry in noticed:
        assert entry["t"] >= 1_000_100
    for entry in dead:
        assert entry["by"] == "provider"
        assert entry["t"] >= 1_000_150
    (left,) = {machine.id for machine in machines} - {entry["machine"] for entry in dead}
    assert [each.id for each in rehearsal.cloud.machines("fleet") if each.state == "running"] == [left]


def test_a_price_above_the_ceiling_takes_the_machine(rehearse: Rehearse) -> None:
    rehearsal = rehearse(notice={"lead_s": 0.2}, billing={"minimum_s": 0})
    machine = rehearsal.launch("sleep 900")
    rehearsal.cloud.set_pool(SPOT, price="9.99")
    gone = rehearsal.gone(machine)
    assert gone.ended_by == "provider"
    bill = rehearsal.cloud.bill(gone)
    assert bill.final
    assert bill.microusd <= -(-2_000_000 * bill.billed_s // 3600)


def _runs(rehearsal: Rehearsal, machine: Machine) -> bool:
    return rehearsal.listed(machine).state == "running"


def _heard(rehearsal: Rehearsal, machine: Machine, kind: str) -> None:
    def lines() -> list[dict[str, Any]]:
        whole = [line for line in rehearsal.cloud.console(machine.id).split("\n")[:-1] if line.startswith("{")]
        return [json.loads(line) for line in whole]

    eventually(
        lambda: [line for line in lines() if line.get("kind") == kind], lambda: rehearsal.cloud.console(machine.id)
    )
