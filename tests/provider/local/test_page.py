"""docs/rehearsal.md says what is so: its configuration is read, its program runs, its table has every key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from holdfast.provider.local import LocalCloud
from holdfast.testing.cloud.config import CloudConfig, parsed
from holdfast.testing.cloud.faults import Faults
from holdfast.testing.cloud.market import Market

_PAGE = (Path(__file__).parents[3] / "docs" / "rehearsal.md").read_text()


def _block(language: str) -> str:
    return _PAGE.split(f"```{language}\n")[1].split("```")[0]


def test_the_program_and_the_configuration_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "cloud.json").write_text(_block("json"))
    config = parsed(json.loads(_block("json")), CloudConfig)
    assert Market.of(config, tmp_path).capacity["local/east/a/gpu-8/spot"].at(7200) == 0
    assert Faults(config.faults, 0).draw("create") == "ok"
    done = subprocess.run(
        [sys.executable, "-"], input=_block("python"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()] == [pool.name for pool in config.pools]
    assert LocalCloud.running(tmp_path / "cloud") is None


@pytest.mark.parametrize("key", [field.name for field in msgspec.structs.fields(CloudConfig)])
def test_every_key_is_on_the_page(key: str) -> None:
    assert f"`{key}`" in _PAGE
