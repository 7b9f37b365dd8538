"""The `holdfast` command with a shorter memory for preempted pools and storms: an hour of a rough market in some minutes."""

from __future__ import annotations

from functools import partial

from holdfast.cli.app import main
from holdfast.fleet import mandate
from holdfast.fleet.terms import Terms
from holdfast.policy.backoff import Backoff
from holdfast.policy.retry import RetryLimits

QUICK = RetryLimits(after_failure=Backoff(1, 15), after_preemption=Backoff(1, 20), storm_preemptions=1000)

if __name__ == "__main__":
    mandate.Terms = partial(Terms, retry=QUICK, tick_s=5)  # type: ignore[assignment, misc]
    main()
