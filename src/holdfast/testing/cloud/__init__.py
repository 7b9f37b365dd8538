"""The rehearsal cloud: a small cloud on this machine, in which fleets are tried out with real processes, real notices and a real
bill.

    python -m holdfast.testing.cloud FOLDER [--config FILE]      the cloud, a process of its own; it outlives controllers
    python -m holdfast.testing.cloud.bill FOLDER                 what it would charge; shares no code with anything here

    provider.local.LocalCloud ─HTTP→ server.py → api.py → world.py, course.py ──→ hosts.py → keeper.py → inside.py → user data
                                                   ↑          │  └─→ notices.py: each machine's metadata endpoint
                              faults.py, admission.py         └─→ book.py: log.jsonl, from which it comes back after kill -9, and
                              bill.py market.py, plan.py

`config.py` is what can be set, `market.py` capacity and prices over time, `plan.py` who is taken, `life.py` one machine's life,
`tabletop.py` the same cloud without processes, network and real time. `docs/rehearsal.md` says
what is imitated and what is not.
"""

from __future__ import annotations

__all__: list[str] = []
