"""The `simulate` command as its tests call it, and files of traces as others publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from holdfast.cli.app import app
from holdfast.policy.market.facts import Job
from holdfast.simulate.market.workload import Workload
from holdfast.simulate.traces.scenarios import SCENARIOS
from holdfast.simulate.traces.trace import Trace

HOUR = 3600
QUICK = ["--work", "6h", "--deadline", "8h", "--days", "9"]
WORKLOAD = Workload(job=Job(work_s=6 * HOUR, deadline_s=8 * HOUR, changeover_s=360, max_lost_s=600))
"""As QUICK says."""
PRICED = ["--spot-price", "0.97", "--on-demand-price", "$3.06", "--work", "6h", "--deadline", "8h"]
GIVE_UP_S = 300.0


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)


def ok(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def data(*arguments: object) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(ok(*arguments, "--json"))
    return read


def made(name: str = "bursty") -> Trace:
    return SCENARIOS[name].trace(seed=1, days=9)


def probes(path: Path, row: np.ndarray, *, tick_s: int = 300) -> Path:
    """A file of probes as others publish them."""
    path.parent.mkdir(exist_ok=True)
    values = [int(value) for value in row]
    if path.suffix == ".json":
        document = {"metadata": {"gap_seconds": tick_s, "price_info": {"on_demand_price": 3.06}}, "data": values}
        path.write_text(json.dumps(document | {"prices": [0.97] * len(values)}))
    else:
        moments = np.datetime64("2023-02-15T00:00:00") + np.arange(len(values)) * np.timedelta64(tick_s, "s")
        path.write_text(
            "date,availability\n" + "".join(f"{at},{value}\n" for at, value in zip(moments, values, strict=True))
        )
    return path
