"""The budget against a world that does its worst: answers are lost, controllers die and come back with old states, prices rise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.policy import budget
from holdfast.policy.budget import Granted, Kept, Refused, Renewed, StopNow
from holdfast.policy.budget_facts import BudgetLimits, BudgetState, Grant, LaunchAsk, LaunchRecord

HOUR = 3600


@dataclass
class Machine:
    """A launch as it really is. Its price is what it likes to be, up to the ceiling; its timer is its own."""

    ask: LaunchAsk
    born: bool = False
    gone: bool = False
    """No machine of it is left, or none will ever come."""
    heard_s: int = 0
    billed_s: int = 0
    spent: Fraction = Fraction(0)
    stop_at_s: int | None = None

    @property
    def used_s(self) -> int:
        return max(0, self.billed_s - self.ask.outside_s)

    @property
    def ends_s(self) -> int:
        """Billed time at which it has ended itself."""
        end_s = self.ask.outside_s + self.heard_s + self.ask.grace_s
        return end_s if self.stop_at_s is None else min(end_s, self.stop_at_s)

    def bear(self, heard_s: int) -> None:
        self.born, self.heard_s, self.spent = True, heard_s, Fraction(self.ask.once_microusd)

    def run(self, seconds: int, share: Fraction) -> None:
        seconds = min(seconds, self.ends_s - self.billed_s)
        self.billed_s += seconds
        self.spent += share * self.ask.microusd_h * seconds / HOUR
        if self.billed_s >= self.ends_s:
            self.die(share)

    def die(self, share: Fraction) -> None:
        self.gone = True
        unused_s = max(0, self.ask.minimum_s - self.billed_s)
        self.spent += share * self.ask.microusd_h * unused_s / HOUR

    def most(self, written_s: int) -> Fraction:
        """What it can come to if nobody ever does anything again, and it hears all that stands in the store."""
        if self.gone:
            return self.spent
        ask = self.ask
        total_s = max(ask.outside_s + written_s + ask.grace_s, ask.minimum_s)
        so_far = self.spent if self.born else Fraction(ask.once_microusd)
        return so_far + Fraction(ask.microusd_h * (total_s - self.billed_s), HOUR)


asks = st.builds(
    LaunchAsk,
    launch=st.just(1),
    machine_microusd_h=st.sampled_from([0, 973_100, 973_100, 3_060_000, 3_999_999]),
    extras_microusd_h=st.sampled_from([0, 7, 40_000]),
    once_microusd=st.sampled_from([0, 0, 50_000]),
    nodes=st.sampled_from([1, 1, 3]),
    uses=st.sampled_from([(), (("gpus", 2),), (("gpus", 1), ("addresses", 1))]),
    outside_s=st.sampled_from([0, 90]),
    grace_s=st.sampled_from([0, 120]),
    minimum_s=st.sampled_from([0, 60, 900]),
    least_s=st.sampled_from([1, 600]),
    wants_s=st.none() | st.integers(600, 5000),
)
shares = st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1), Fraction(1)])


class Spending(RuleBasedStateMachine):
    """A controller (state, its written copies, the store) and its machines."""

    @initialize(
        cap=st.sampled_from([0, 1_500_000, 4_000_000, 4_000_000, 9_000_001]),
        price=st.sampled_from([None, None, 3_060_000]),
        nodes=st.sampled_from([None, None, 5]),
        quotas=st.sampled_from([(), (), (("gpus", 3), ("others", 1))]),
    )
    def begin(self, cap: int, price: int | None, nodes: int | None, quotas: tuple[tuple[str, int], ...]) -> None:
        self.limits = BudgetLimits(cap_microusd=cap, max_microusd_h=price, max_nodes=nodes, quotas=quotas, slice_s=1800)
        self.state, self.written = BudgetState(), [BudgetState().to_json()]
        self.store: dict[int, list[Grant]] = {}
        self.forgot = False
        self.machines: dict[int, Machine] = {}

    # What the store and the machines say

    def keep(self) -> None:
        self.written.append(self.state.to_json())

    def open_machines(self, born: bool) -> list[int]:
        return [n for n, machine in self.machines.items() if machine.born is born and not machine.gone]

    def cost_of(self, launch: int, lifetime_s: int) -> int:
        """The most that it can cost as far as the controller knows: written down anew."""
        record = self.state.of(launch)
        assert record is not None
        if record.final_microusd is not None:
            return record.final_microusd
        ask = record.grant.ask
        total_s = max(ask.outside_s + lifetime_s + ask.grace_s, ask.minimum_s)
        ways = [ask.once_microusd + ceil(Fraction(ask.microusd_h * total_s, HOUR))]
        if record.metered_s:
            ways.append(
                record.metered_microusd + ceil(Fraction(ask.microusd_h * max(0, total_s - record.metered_s), HOUR))
            )
        return min(ways)

    def known_cost(self) -> int:
        return sum(self.cost_of(r.grant.ask.launch, r.grant.lifetime_s) for r in self.state.launches)

    # The controller

    @rule(
        ask=asks,
        fate=st.sampled_from(["dies first", "dies", "lost, born", "lost, not born", "born", "born", "refused"]),
    )
    def launch(self, ask: LaunchAsk, fate: str) -> None:
        ask = replace(ask, launch=1 + max([0, *self.store]))
        before = self.state
        self.state, decision = budget.grant(self.state, self.limits, ask)
        if isinstance(decision, Refused):
            assert self.state == before
            self.check_refusal(ask, decision)
            return
        assert isinstance(decision, Granted)
        lifetime_s = decision.grant.lifetime_s
        wants_s = ask.wants_s or max(1800, ask.least_s)
        assert ask.least_s <= lifetime_s <= wants_s
        assert self.known_cost() <= (self.limits.cap_microusd or 0)
        if lifetime_s < wants_s:
            longer = self.known_cost() - self.cost_of(ask.launch, lifetime_s) + self.cost_of(ask.launch, lifetime_s + 1)
            assert longer > (self.limits.cap_microusd or 0)
        assert budget.grant(self.state, self.limits, ask)[1].grant == decision.grant  # type: ignore[union-attr]
        if fate == "dies first":
            self.come_back(len(self.written) - 1)
            return
        self.store[ask.launch] = [decision.grant]
        self.machines[ask.launch] = machine = Machine(ask)
        if fate == "dies":
            self.come_back(len(self.written) - 1)
            return
        self.keep()
        if fate in ("born", "lost, born"):
            machine.bear(lifetime_s)
        if fate == "born":
            self.state = budget.seen(self.state, ask.launch)
        elif fate == "refused":
            machine.gone = True
            self.state = budget.absent(self.state, ask.launch)
        self.keep()

    def check_refusal(self, ask: LaunchAsk, refused: Refused) -> None:
        """There was a reason, and the figure that is named is exact."""
        assert refused.reasons
        limits, state = self.limits, self.state
        if refused.needs_microusd:
            enough = replace(limits, cap_microusd=(limits.cap_microusd or 0) + refused.needs_microusd)
            assert isinstance(budget.grant(state, enough, ask)[1], Granted)
            less = replace(limits, cap_microusd=(enough.cap_microusd or 0) - 1)
            assert isinstance(budget.grant(state, less, ask)[1], Refused)
            least = LaunchRecord(grant=Grant(ask=ask, lifetime_s=ask.least_s)).reserved_microusd
            assert self.known_cost() + least > (limits.cap_microusd or 0)
            return
        is_open = [r.grant.ask for r in state.launches if r.final_microusd is None]
        gpus = sum(units for each in [*is_open, ask] for name, units in each.uses if name == "gpus")
        assert (
            (limits.max_microusd_h is not None and ask.machine_microusd_h > limits.max_microusd_h)
            or (limits.max_nodes is not None and sum(each.nodes for each in [*is_open, ask]) > limits.max_nodes)
            or (limits.quotas and gpus > 3)
        )

    @precondition(lambda self: self.open_machines(born=True))
    @rule(data=st.data(), fate=st.sampled_from(["dies first", "dies", "lost", "heard", "heard", "heard"]))
    def renew(self, data: st.DataObject, fate: str) -> None:
        launch = data.draw(st.sampled_from(self.open_machines(born=True)))
        machine, record = self.machines[launch], self.state.of(launch)
        assert record is not None
        granted_s, before = record.grant.lifetime_s, self.state
        self.state, decision = budget.renew(self.state, self.limits, launch, machine.used_s)
        left_s = granted_s - machine.used_s
        if not isinstance(decision, Renewed):
            assert self.state == before
            if 2 * left_s < 1800:
                more = self.known_cost() - self.cost_of(launch, granted_s) + self.cost_of(launch, granted_s + 1)
                assert more > (self.limits.cap_microusd or 0), "it would have fitted"
            over = before.reserved_microusd > (self.limits.cap_microusd or 0)
            # Who has an old state, and does not look first, may hold back what is spent already, and stops too early.
            assert self.forgot or not over
            assert isinstance(decision, StopNow if left_s <= 0 or over else Kept)
            if isinstance(decision, StopNow):
                machine.stop_at_s = min(machine.ends_s, machine.billed_s + machine.ask.grace_s)
            return
        lifetime_s = decision.grant.lifetime_s
        wants_s = machine.used_s + 1800
        assert granted_s < lifetime_s <= wants_s
        if lifetime_s < wants_s:
            more = self.known_cost() - self.cost_of(launch, lifetime_s) + self.cost_of(launch, lifetime_s + 1)
            assert more > (self.limits.cap_microusd or 0), "more would have fitted"
        assert self.known_cost() <= (self.limits.cap_microusd or 0)
        if fate == "dies first":
            self.come_back(len(self.written) - 1)
            return
        self.store[launch].append(decision.grant)
        if fate == "dies":
            self.come_back(len(self.written) - 1)
            return
        self.keep()
        if fate == "heard":
            machine.heard_s = max(machine.heard_s, lifetime_s)

    @rule(data=st.data(), looks=st.booleans())
    def come_back_with_any_state(self, data: st.DataObject, looks: bool) -> None:
        """A database that was rolled back, deleted, or is another laptop's; it looks at all machines first, or does not."""
        self.come_back(data.draw(st.integers(0, len(self.written) - 1)))
        self.forgot = not looks
        for launch, machine in self.machines.items() if looks else ():
            if machine.gone:
                spent = ceil(machine.spent)
                self.state = (
                    budget.ended(self.state, launch, spent) if machine.born else budget.absent(self.state, launch)
                )
            elif machine.born and machine.billed_s:
                self.state = budget.metered(self.state, launch, machine.billed_s, ceil(machine.spent))
        self.keep()

    def come_back(self, number: int) -> None:
        self.state = BudgetState.from_json(self.written[number])
        for grants in self.store.values():
            for granted in reversed(grants):
                self.state = budget.recall(self.state, granted)
        self.keep()

    # The world, and what is found out about it

    @precondition(lambda self: self.open_machines(born=False))
    @rule(data=st.data())
    def born_late(self, data: st.DataObject) -> None:
        """The request had been accepted, or a controller that came back repeats it."""
        launch = data.draw(st.sampled_from(self.open_machines(born=False)))
        granted = data.draw(st.sampled_from(self.store[launch]))
        self.machines[launch].bear(granted.lifetime_s)

    @precondition(lambda self: self.open_machines(born=True))
    @rule(data=st.data(), seconds=st.integers(1, 4000), share=shares, to_the_edge=st.sampled_from([True, True, False]))
    def run(self, data: st.DataObject, seconds: int, share: Fraction, to_the_edge: bool) -> None:
        """To the edge: up to where a renewal is due."""
        machine = self.machines[data.draw(st.sampled_from(self.open_machines(born=True)))]
        if to_the_edge:
            seconds = machine.ask.outside_s + machine.heard_s - machine.billed_s - seconds % 900
        machine.run(max(1, seconds), share)

    @precondition(lambda self: self.open_machines(born=True))
    @rule(data=st.data(), share=shares)
    def taken(self, data: st.DataObject, share: Fraction) -> None:
        self.machines[data.draw(st.sampled_from(self.open_machines(born=True)))].die(share)

    @precondition(lambda self: self.open_machines(born=True))
    @rule(data=st.data(), bill=st.sampled_from([True, True, False]))
    def looked_at(self, data: st.DataObject, bill: bool) -> None:
        launch = data.draw(st.sampled_from(self.open_machines(born=True)))
        machine = self.machines[launch]
        self.machines[launch].heard_s = max(machine.heard_s, data.draw(st.sampled_from(self.store[launch])).lifetime_s)
        self.state = budget.seen(self.state, launch)
        if bill and machine.billed_s:
            self.state = budget.metered(self.state, launch, machine.billed_s, ceil(machine.spent))
        self.keep()

    @precondition(lambda self: any(machine.gone for machine in self.machines.values()))
    @rule(data=st.data(), bill=st.booleans())
    def settled(self, data: st.DataObject, bill: bool) -> None:
        launch = data.draw(st.sampled_from([n for n, machine in self.machines.items() if machine.gone]))
        machine = self.machines[launch]
        if machine.born:
            self.state = budget.ended(self.state, launch, ceil(machine.spent) if bill else None)
        else:
            self.state = budget.absent(self.state, launch)
        self.keep()

    @precondition(lambda self: self.open_machines(born=False))
    @rule(data=st.data())
    def never_came(self, data: st.DataObject) -> None:
        """The window has passed, and its token starts nothing any more."""
        launch = data.draw(st.sampled_from(self.open_machines(born=False)))
        self.machines[launch].gone = True
        self.state = budget.absent(self.state, launch)
        self.keep()

    @invariant()
    def the_cap_holds_whatever_happens_from_here_on(self) -> None:
        worst = sum(
            (machine.most(max(granted.lifetime_s for granted in self.store[launch])))
            for launch, machine in self.machines.items()
        )
        assert worst <= (self.limits.cap_microusd or 0)
        alive = [machine.ask for machine in self.machines.values() if not machine.gone]
        assert sum(ask.nodes for ask in alive) <= (self.limits.max_nodes or 10**9)
        if self.limits.quotas:
            assert sum(units for ask in alive for name, units in ask.uses if name == "gpus") <= 3
        assert budget.standing(self.state, self.limits)


Spending.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestSpending = Spending.TestCase
