"""Providers by name: for the command line and for whoever goes on with a run that was launched elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.core.errors import UsageError
from holdfast.provider.base import Instances

__all__ = ["INSTANCES", "instances_named"]


def _local(place: str, regions: Sequence[str]) -> Instances:
    from holdfast.provider.local import LocalCloud

    return LocalCloud.open(Path(place).expanduser() if place else Path("~/.local/share/holdfast/cloud").expanduser())


def _aws(place: str, regions: Sequence[str]) -> Instances:
    from holdfast.provider.aws import AwsInstances

    return AwsInstances(regions=tuple(regions))


def _gcp(place: str, regions: Sequence[str]) -> Instances:
    from holdfast.provider.gcp import GcpInstances

    return GcpInstances(project=place)


INSTANCES: dict[str, Callable[[str, Sequence[str]], Instances]] = {"local": _local, "aws": _aws, "gcp": _gcp}
"""Where machines are launched one by one. `place`: a rehearsal cloud's folder, or a GCP project."""


def instances_named(name: str, place: str = "", regions: Sequence[str] = ()) -> Instances:
    """The provider of that name. UsageError that lists the names there are, and for one whose SDK is not installed."""
    try:
        opened = INSTANCES[name]
    except KeyError:
        raise UsageError(f"there is no provider {name!r}; there are {', '.join(INSTANCES)}") from None
    try:
        return opened(place, regions)
    except ImportError as error:
        raise UsageError(f"{name} needs its SDK: pip install 'holdfast[{name}]' ({error})") from None
