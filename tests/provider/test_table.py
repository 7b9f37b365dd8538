"""docs/providers.md says what the code reckons with."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.provider.aws.instances import AwsInstances
from holdfast.provider.base import Guarantees
from holdfast.provider.gcp.instances import GcpInstances

PAGE = Path(__file__).parents[2] / "docs" / "providers.md"
FIGURES = {
    "seconds that a list may be late": "list_delay_s",
    "notice before a preemption, seconds, best effort": "notice_s",
    "billed at least, seconds": "minimum_s",
    "from the create call to the machine's own timer, seconds, as a rule at most": "boot_s",
    "from the request to end until it is billed no more, seconds": "stop_s",
}
PROMISES = {
    "a machine that shuts itself down is gone": "shutdown_terminates",
    "tags from the first moment": "tags_at_birth",
}


def column(provider: str) -> dict[str, str]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    where = next(row.index(provider) for row in rows if provider in row)
    return {row[0]: row[where] for row in rows if len(row) > where}


def guarantees(provider: str) -> Guarantees:
    if provider == "aws":
        return AwsInstances(["us-east-1"]).guarantees
    return GcpInstances("project").guarantees


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_the_page_says_what_is_reckoned_with(provider: str) -> None:
    told, real = column(provider), guarantees(provider)
    for row, name in FIGURES.items():
        assert told[row].split(" ")[0] == str(getattr(real, name)), row
    for row, name in PROMISES.items():
        assert told[row].startswith("yes") is getattr(real, name), row
    assert (told["the provider ends it after its time"] != "no") is real.enforces_lifetime
