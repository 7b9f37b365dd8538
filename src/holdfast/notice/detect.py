"""Which provider is this machine at? Asked once, at the start, in the background, within a limit.

The hardware's description (DMI) names the three clouds in microseconds and cannot hang. Only where it names none, as in some
sandboxes, are the metadata services asked, all at once and briefly. Schedulers give themselves away by their variables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from holdfast.notice import aws, azure, gcp
from holdfast.notice.fetch import Fetch

__all__ = ["DMI", "PROBE_S", "TOTAL_S", "Probe", "cloud_by_dmi", "cloud_by_variable", "detect", "schedulers"]

DMI = Path("/sys/class/dmi/id")
TOTAL_S = 1.8
"""The limit on everything here."""
PROBE_S = 1.0
"""What a metadata service, one hop away, gets to answer. An address that leads nowhere costs this once, not three times."""

_AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"
"""The same on every Azure machine; other Hyper-V machines name the same vendor."""

Probe = Callable[[Fetch, float], Awaitable[bool]]
"""(connections, seconds) → whether that cloud answers."""

_VARIABLES = {
    "aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gcp": "GCE_METADATA_HOST",
    "azure": "HOLDFAST_AZURE_METADATA_ENDPOINT",
}
_PROBES: dict[str, tuple[Callable[[Mapping[str, str]], str], Probe]] = {
    "aws": (aws.endpoint, aws.probe),
    "gcp": (gcp.endpoint, gcp.probe),
    "azure": (azure.endpoint, azure.probe),
}


async def detect(
    environ: Mapping[str, str],
    *,
    dmi: Path = DMI,
    probes: Mapping[str, Probe] | None = None,
    total_s: float = TOTAL_S,
    probe_s: float = PROBE_S,
) -> tuple[str, ...]:
    """Names of the providers that this machine is at, none included; returns within `total_s`, never raises."""
    found = cloud_by_variable(environ)
    if not found:
        named = cloud_by_dmi(dmi)
        found = (named,) if named else await _clouds_that_answer(environ, probes or {}, total_s, probe_s)
    disabled = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    return tuple(cloud for cloud in found if not (cloud == "aws" and disabled)) + schedulers(environ)


def cloud_by_variable(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Whoever says where a metadata service is, means that it is to be listened to."""
    return tuple(cloud for cloud, variable in _VARIABLES.items() if environ.get(variable))


def schedulers(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Slurm, Kubernetes, by the variables that they set in every job."""
    slurm = ("slurm",) if environ.get("SLURM_JOB_ID") else ()
    kubernetes = ("kubernetes",) if environ.get("KUBERNETES_SERVICE_HOST") else ()
    return slurm + kubernetes


def cloud_by_dmi(folder: Path) -> str | None:
    """The cloud that the hardware's description names, or None."""
    vendor, product = _read(folder / "sys_vendor"), _read(folder / "product_name")
    if vendor == "Amazon EC2" or _read(folder / "bios_vendor") == "Amazon EC2":
        return "aws"
    # The older instance families, on Xen.
    if vendor == "Xen" and "amazon" in _read(folder / "bios_version").lower():
        return "aws"
    if product == "Google Compute Engine":
        return "gcp"
    if vendor == "Microsoft Corporation" and _read(folder / "chassis_asset_tag") == _AZURE_CHASSIS:
        return "azure"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


async def _clouds_that_answer(
    environ: Mapping[str, str], probes: Mapping[str, Probe], total_s: float, probe_s: float
) -> tuple[str, ...]:
    answered: set[str] = set()

    async def ask(cloud: str, endpoint: str, probe: Probe) -> None:
        fetch = Fetch(endpoint, timeout_s=probe_s)
        try:
            if await probe(fetch, probe_s):
                answered.add(cloud)
        finally:
            await fetch.close()

    asked = [ask(cloud, where(environ), probes.get(cloud, probe)) for cloud, (where, probe) in _PROBES.items()]
    with suppress(TimeoutError):
        async with asyncio.timeout(total_s):
            await asyncio.gather(*asked, return_exceptions=True)
    return tuple(cloud for cloud in _PROBES if cloud in answered)
