"""The line that tells how the run is doing."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holdfast.core.contract import ENV_PRICE
from holdfast.core.errors import UsageError
from holdfast.testing.clock import ManualClock
from holdfast.train.display import Display, display_for


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_now_and_then_where_nobody_looks(clock: ManualClock) -> None:
    out = io.StringIO()
    display = display_for("1 min", clock, {ENV_PRICE: "3.60"}, out)
    display.logged({"loss": torch.tensor(1.23456), "note": "warm"})
    for step in range(1, 241):
        clock.advance(0.5)
        if step == 200:
            display.committed(step)
        display.step(step, 2, lambda: 1000)
    assert out.getvalue().splitlines() == [
        "holdfast: step 120 of 1,000 · epoch 2 · loss 1.235 · note warm · $0.06",
        (
            "holdfast: step 240 of 1,000 · epoch 2 · loss 1.235 · note warm · 2 steps/s · 6 min 20 s left · "
            "saved: step 200, 20 s ago · $0.12"
        ),
    ]


def test_on_a_terminal_one_line_that_makes_room_for_others(clock: ManualClock) -> None:
    out = _Terminal()
    display = display_for(None, clock, {}, out)
    for step in range(1, 4):
        clock.advance(1.0)
        display.step(step, 0, lambda: None)
    display.above()
    display.above()
    assert out.getvalue().count("\n") == 0
    assert out.getvalue().split("\r\x1b[K")[1:] == [
        "step 1 · epoch 0",
        "step 2 · epoch 0 · 1 steps/s",
        *["step 3 · epoch 0 · 1 steps/s", ""],
    ]


@pytest.mark.parametrize("environ", [{"HOLDFAST_PROGRESS": "0"}, {}])
def test_nothing_when_nobody_wants_it(clock: ManualClock, environ: dict[str, str]) -> None:
    out = _Terminal()
    display: Display = display_for(None if environ else False, clock, environ, out)
    clock.advance(100.0)
    display.step(1, 0, lambda: None)
    assert out.getvalue() == ""
    with pytest.raises(UsageError, match="between two lines"):
        display_for("0 s", clock, {}, out)


def test_a_terminal_that_goes_away_does_not_end_the_training(clock: ManualClock) -> None:
    out = _Terminal()
    display = display_for(None, clock, {}, out)
    out.close()
    clock.advance(1.0)
    display.step(1, 0, lambda: None)
    display.step(2, 0, lambda: None)


def test_a_real_run_tells(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import holdfast\n"
        f"with holdfast.Run({str(tmp_path / 'run')!r}, progress='1 ms') as run:\n"
        "    run.track(state={'n': 0})\n"
        "    for batch in run.batches(list(range(50))):\n"
        "        run.log(loss=batch / 2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert "of 50 · epoch 0 · loss " in done.stderr
