"""A machine that was to be taken and was not: cut off from the store, it works on beside its successor, and cannot be ended."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fleet_world import World

from holdfast.core.launches import MachineWord, word_key
from holdfast.core.sealed import unseal
from holdfast.provider.base import Machine


@pytest.mark.parametrize("comes_back", [True, False])
def test_its_done_is_fenced_and_its_bill_counts(comes_back: bool) -> None:
    world = World(work_s=800, budget_microusd=9_000_000)
    cut_off_s: int | None = None
    terminate = world.cloud.terminate

    def terminate_others(machines: Sequence[Machine]) -> None:
        """The provider takes the request, and nothing happens while the machine works on."""
        deaf = {each.id for each in world.cloud.machines_[:1] if cut_off_s is not None and each.phase == "working"}
        terminate([each for each in machines if each.id not in deaf])

    world.cloud.terminate = terminate_others  # type: ignore[method-assign]

    def script(world: World) -> None:
        nonlocal cut_off_s
        if not world.cloud.machines_:
            return
        zombie = world.cloud.machines_[0]
        if cut_off_s is None and zombie.phase == "working" and world.cloud.now_s > world.born_s + 400:
            if zombie.told_at_s is None:
                world.cloud.preempt(zombie, 120)
            elif zombie.heard_notice:
                # It never gets to its last save, and the preemption that was announced does not come.
                cut_off_s = world.cloud.now_s
                zombie.partitioned, zombie.preempt_at_s, zombie.stopping_s, zombie.exit_code = True, None, None, None
        if comes_back and zombie.partitioned and zombie.done_s > world.cloud.work_s:
            zombie.partitioned = False

    over = world.play(script)
    zombie, successor, *others = world.cloud.machines_
    assert not others
    assert over.outcome == "done"
    assert over.reasons == ("launch 2 has finished the run",)
    assert [launch for _, launch, _ in world.cloud.claims] == [1, 2]
    assert cut_off_s is not None
    assert world.cloud.claims[1][0] > cut_off_s, "the successor waited for the deadline and the grace"
    assert zombie.done_s > world.cloud.work_s, "it has done all the work as well"
    assert world.cloud.finished == 1
    last = unseal(world.store.get(word_key(1, zombie.words - 1), max_bytes=1 << 20), MachineWord, what="word")
    assert (last.kind, last.exit_code) == (("released", 76) if comes_back else ("notice", None))
    assert zombie.gone_s is not None
    assert successor.gone_s is not None
    assert zombie.gone_s > successor.created_s + 300
    world.check_end()
