"""Providers by name: for the command line and for whoever goes on with a run that was launched elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.core.errors import UsageError
from holdfast.provider.base import Instances

__all__ = ["INSTANCES", "everywhere", "instances_named"]


def _local(place: str, regions: Sequence[str], run_url: str | None) -> Instances:
    from holdfast.provider.local import LocalCloud

    folder = Path(place or "~/.local/share/holdfast/cloud").expanduser()
    if run_url is None:
        running = LocalCloud.running(folder)
        if running is None:
            raise UsageError(
                f"no rehearsal cloud runs in {folder}; if one did, start it again: python -m holdfast.testing.cloud {folder}"
            )
        return running
    cloud = LocalCloud.open(folder)
    if cloud.speed != 1:
        raise UsageError(
            f"the rehearsal cloud in {cloud.folder} runs {cloud.speed:g} of its seconds in one of a machine's, and a grant is one "
            "figure for both: rehearse launches at speed 1, with shorter gaps in the trace"
        )
    return cloud


def _aws(place: str, regions: Sequence[str], run_url: str | None) -> Instances:
    from holdfast.provider.aws import AwsInstances

    return AwsInstances(regions, run_url=run_url)


def _gcp(place: str, regions: Sequence[str], run_url: str | None) -> Instances:
    from holdfast.provider.gcp import GcpInstances

    bucket = None if run_url is None or not run_url.startswith("gs://") else run_url.removeprefix("gs://").split("/")[0]
    return GcpInstances(place or None, bucket=bucket)


INSTANCES: dict[str, Callable[[str, Sequence[str], str | None], Instances]] = {
    "local": _local,
    "aws": _aws,
    "gcp": _gcp,
}
"""Where machines are launched one by one. `place`: a rehearsal cloud's folder, or a GCP project."""


def instances_named(
    name: str, place: str = "", regions: Sequence[str] = (), *, run_url: str | None = None
) -> Instances:
    """The provider of that name; `run_url`: of the run that is to be launched there: only then is a rehearsal cloud started that
    does not run. UsageError that lists the names there are, and for one whose SDK is not installed."""
    if name == "slurm":
        raise UsageError(
            "Slurm requeues by itself, so no controller of ours runs above it: submit the job with sbatch (docs/slurm.md), or from "
            "Python with holdfast.provider.slurm.SlurmDelegate"
        )
    try:
        opened = INSTANCES[name]
    except KeyError:
        raise UsageError(f"there is no provider {name!r}; there are {', '.join(INSTANCES)}") from None
    try:
        return opened(place, regions, run_url)
    except ImportError as error:
        raise UsageError(f"{name} needs its SDK: pip install 'holdfast[{name}]' ({error})") from None


def everywhere(name: str, place: str = "", regions: Sequence[str] = ()) -> dict[str, Instances]:
    """All places of a provider, each for itself, so that one that does not answer hides no other: of AWS the regions that are
    named, or all that the account has enabled. ProviderError, UsageError."""
    if name != "aws":
        return {name: instances_named(name, place, regions)}
    if not regions:
        try:
            from holdfast.provider.aws.account import Account
            from holdfast.provider.aws.facts import enabled_regions
        except ImportError as error:
            raise UsageError(f"aws needs its SDK: pip install 'holdfast[aws]' ({error})") from None
        account = Account()
        try:
            regions = enabled_regions(account)
        finally:
            account.close()
    return {f"aws/{region}": instances_named(name, place, [region]) for region in dict.fromkeys(regions)}
