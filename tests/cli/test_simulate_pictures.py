"""The pictures of `holdfast simulate`: files that hold one, a terminal that shows some, and a pipe that gets none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from simulations import GIVE_UP_S, QUICK, ok

from holdfast.core.errors import UsageError


def test_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    folder = tmp_path / "some where"
    said = ok(
        *QUICK, "--scenario", "bursty", "--scenario", "steady", "--deadline", "7h,9h", "--windows", 6, "--plot", folder
    )
    assert sorted(path.name for path in folder.iterdir()) == ["cost.png", "gap.png", "window.png"]
    explained = tmp_path / "explained"
    ok(
        *QUICK,
        "--scenario",
        "correlated",
        "--pools",
        "together",
        "--policy",
        "greedy",
        "--explain",
        2,
        "--plot",
        explained,
    )
    assert [path.name for path in explained.iterdir()] == ["window.png"]
    ok(
        *QUICK,
        "--scenario",
        "scarce",
        "--no-optimum",
        "--plot",
        tmp_path / "without",
        "--windows",
        2,
        "--policy",
        "spot",
    )
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["cost.png", "window.png"]
    for path in [*folder.iterdir(), *explained.iterdir()]:
        assert path.parent != folder or f"Written: {path}" in said
        picture = image.imread(path)
        assert min(picture.shape[:2]) > 300
        # Drawn over most of the paper, not squeezed into a corner of it.
        ink = picture[:, :, :3].min(axis=2) < 0.9
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        assert np.diff(rows).max() < 0.2 * len(ink)
        assert np.ptp(columns) > 0.8 * ink.shape[1]
        assert 0.02 < ink.mean() < 0.6


def test_pictures_that_cannot_be_made_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        ok(*QUICK, "--plot", tmp_path / "file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        ok(*QUICK, "--plot", tmp_path / "pictures")


def test_a_terminal_gets_pictures_and_colours_and_a_pipe_gets_neither() -> None:
    pty = pytest.importorskip("pty")
    chosen = [*QUICK, "--scenario", "bursty", "--policy", "greedy", "--policy", "spot", "--windows", "9"]
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "holdfast", "simulate", *chosen], stdout=child, stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    ) as process:  # fmt: skip
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.wait(GIVE_UP_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(parent)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert plain != shown.decode()
    assert re.search(r"^greedy .*┃", plain, re.MULTILINE)
    assert re.search(r"[▁▂▃▄▅▆▇█]", plain)
    assert max(map(len, (line.rstrip() for line in plain.splitlines() if not line.startswith("Note")))) <= 100
    assert not re.search(r"[▁▂▃▄▅▆▇█┃]", ok(*chosen))
