"""A replacement on the rehearsal cloud takes its set-up from the first machine, and people see both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_rehearsal import CONFIG, COUNTING, rehearse

__all__ = ["rehearse"]


@pytest.mark.long
def test_the_second_machine_takes_the_set_up_of_the_first(rehearse: Any, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "count.py").write_text(COUNTING)
    setup = f"echo made by the set-up > made\necho once >> {tmp_path}/runs\necho the set-up speaks"
    run = "cat made\npython count.py"
    job = {"name": "count", "run": run, "workdir": "code", "budget": 2, "setup": setup, "setup_cache": True}
    world = rehearse(CONFIG, job)
    world.launch()
    world.wait_for(lambda: list((tmp_path / "run" / "code").glob("setup-*")))
    world.wait_for(lambda: world.steps() >= 50)
    (first,) = world.alive()
    world.cloud.preempt(first.id, lead_s=10)
    assert world.finish() == 0, world.story()
    output = world.output()
    assert output.count("the set-up speaks") == 1, output
    assert output.count("made by the set-up") == 2
    assert output.count("set-up taken from the cache, as ") == 1
    assert (tmp_path / "runs").read_text() == "once\n"
    world.check_books()
