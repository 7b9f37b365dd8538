"""Where does this machine run? Found by its description, its variables, or by who answers; within the limit, by construction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.core.clock import SystemClock
from holdfast.core.errors import UsageError
from holdfast.notice import aws, azure, gcp
from holdfast.notice.choose import make_watchers, parse_choices
from holdfast.notice.detect import PROBE_S, TOTAL_S, cloud_by_dmi, detect
from holdfast.notice.fetch import Fetch
from holdfast.testing.metadata import metadata_server

PROBES = {"aws": aws.probe, "gcp": gcp.probe, "azure": azure.probe}


def described(folder: Path, **lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, line in lines.items():
        (folder / name).write_text(line + "\n")
    return folder


@pytest.mark.parametrize(
    ("lines", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "p5.48xlarge"}, "aws"),
        ({"sys_vendor": "Xen", "bios_version": "4.11.amazon", "product_name": "HVM domU"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        (
            {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
            "azure",
        ),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "1234"}, None),
        ({"sys_vendor": "Google", "product_name": "Pixelbook"}, None),
        ({"sys_vendor": "Xen", "bios_version": "4.17"}, None),
        ({"sys_vendor": "LENOVO"}, None),
        ({}, None),
    ],
)
def test_the_hardware_names_the_cloud(tmp_path: Path, lines: dict[str, str], cloud: str | None) -> None:
    assert cloud_by_dmi(described(tmp_path, **lines)) == cloud


async def _unasked(fetch: Fetch, timeout_s: float) -> bool:
    raise AssertionError("asked although it is known")


UNASKED = dict.fromkeys(PROBES, _unasked)


def test_schedulers_are_found_beside_the_cloud(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "7", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    machine = described(tmp_path / "dmi", sys_vendor="Amazon EC2")
    assert asyncio.run(detect(environ, dmi=machine, probes=UNASKED)) == ("aws", "slurm", "kubernetes")
    disabled = {"AWS_EC2_METADATA_DISABLED": "true"}
    assert asyncio.run(detect(disabled, dmi=machine, probes=UNASKED)) == ()


def test_a_variable_that_names_a_server_decides_before_the_hardware(tmp_path: Path) -> None:
    environ = {"GCE_METADATA_HOST": "127.0.0.1:1"}
    machine = described(tmp_path, sys_vendor="Amazon EC2")
    assert asyncio.run(detect(environ, dmi=machine, probes=UNASKED)) == ("gcp",)


def test_on_no_cloud_it_gives_up_in_time_whatever_the_network_does(tmp_path: Path) -> None:
    """All are asked at once, and what does not answer is cut off by the total, not by its own good will."""
    asked: list[str] = []

    def silent(cloud: str) -> Callable[[Fetch, float], Awaitable[bool]]:
        async def probe(fetch: Fetch, timeout_s: float) -> bool:
            asked.append(cloud)
            await asyncio.Event().wait()
            raise AssertionError

        return probe

    async def broken(fetch: Fetch, timeout_s: float) -> bool:
        raise RuntimeError("a flaw")

    probes = {"aws": silent("aws"), "gcp": silent("gcp"), "azure": broken}
    assert asyncio.run(detect({}, dmi=tmp_path, probes=probes, total_s=0.05)) == ()
    assert sorted(asked) == ["aws", "gcp"]
    assert 0 < PROBE_S < TOTAL_S < 2.0


def test_who_answers_is_recognised_and_nobody_else(tmp_path: Path) -> None:
    with ExitStack() as stack:
        endpoints = {cloud: stack.enter_context(metadata_server(cloud)).endpoint for cloud in PROBES}

        def at(cloud: str, endpoint: str) -> Callable[[Fetch, float], Awaitable[bool]]:
            async def probe(fetch: Fetch, timeout_s: float) -> bool:
                elsewhere = Fetch(endpoint, timeout_s=5.0)
                try:
                    return await PROBES[cloud](elsewhere, 5.0)
                finally:
                    await elsewhere.close()

            return probe

        for cloud, endpoint in endpoints.items():
            probes = {name: at(name, endpoint) for name in PROBES}
            assert asyncio.run(detect({}, dmi=tmp_path, probes=probes, total_s=20.0)) == (cloud,)


@pytest.mark.parametrize(
    "text", ["", "aws,", "amazon", "none,aws", "file", "file:", "aws:30s", "auto:1", "gcp:soon", "AWS"]
)
def test_a_mistake_says_what_can_be_written(text: str) -> None:
    with pytest.raises(UsageError, match=r"file:PATH|a duration is written like"):
        parse_choices(text)


def test_what_is_written_becomes_watchers_each_once_and_signals_always() -> None:
    def names(text: str, **environ: str) -> list[str]:
        return [w.name for w in make_watchers(parse_choices(text), environ, clock=SystemClock(), grace_s=30.0)]

    assert names("none") == ["signal"]
    assert names("aws,azure,aws") == ["aws", "azure:scheduled-events", "signal"]
    assert names("gcp:120s") == ["gcp:preempted", "gcp:maintenance-event", "gcp:stop-state", "signal"]
    assert names("file:/run/a,file:/run/b, kubernetes:60s") == ["file:/run/a", "file:/run/b", "kubernetes"]
    assert names("slurm", SLURM_JOB_END_TIME="1800000000") == ["slurm", "slurm:time-limit"]


def test_endpoints_follow_the_variables_of_the_clouds_own_tools() -> None:
    assert aws.endpoint({}) == "http://169.254.169.254"
    assert aws.endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}) == "http://[fd00:ec2::254]"
    assert aws.endpoint({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://x:1"}) == "http://x:1"
    assert gcp.endpoint({}) == "http://169.254.169.254"
    assert gcp.endpoint({"GCE_METADATA_HOST": "metadata:8080"}) == "http://metadata:8080"
    assert azure.endpoint({"HOLDFAST_AZURE_METADATA_ENDPOINT": "http://x:2"}) == "http://x:2"
