"""Whether an order can be carried out, found out without spending money. Each look is one line, and each bad line says what to
do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from holdfast.core.errors import ProviderError, UsageError
from holdfast.core.launches import Pool
from holdfast.provider.base import Check, Order
from holdfast.provider.gcp.calls import Calls, NotSent, Refused, Unanswered
from holdfast.provider.gcp.market import Market
from holdfast.provider.gcp.prices import Shape
from holdfast.provider.gcp.rights import CONTROLLER_PERMISSIONS
from holdfast.provider.gcp.words import MachineType, last

__all__ = ["checks"]

_FAILURES = (Refused, Unanswered, NotSent, ProviderError)
_SSD = ("pd-balanced", "pd-ssd")


def checks(
    calls: Calls, project: str | None, request: Callable[[Order], dict[str, Any]], order: Order, bucket: str | None,
    market: Market,
) -> list[Check]:  # fmt: skip
    """`request`: how the order becomes one; what it refuses is a line as well."""
    try:
        project = project or calls.project()
        found = calls.call("compute", "projects.get", project=project)
    except (NotSent, UsageError) as error:
        return [Check(name="credentials", ok=False, said=str(error), fix="gcloud auth application-default login")]
    except _FAILURES as error:
        fix = f"gcloud services enable compute.googleapis.com --project {project}"
        return [Check(name="credentials", ok=False, said=str(error), fix=fix)]
    lines = [Check(name="credentials", ok=True, said=f"project {project}"), _rights(calls, project)]
    try:
        body = request(order)["body"]
    except UsageError as error:
        return [*lines, Check(name="request", ok=False, said=str(error), fix="change the job file")]
    lines.append(_image(calls, body["disks"][0]["initializeParams"]["sourceImage"]))
    if order.spec.role:
        lines.append(_role(calls, order.spec.role))
    for pool in dict.fromkeys(each.pool for each in order.allowed):
        lines.extend(_pool(calls, project, pool, body, market, found.get("quotas", [])))
    if bucket is not None:
        lines.append(_bucket(calls, bucket, {each.pool.region for each in order.allowed}))
    return lines


def _rights(calls: Calls, project: str) -> Check:
    wanted = list(CONTROLLER_PERMISSIONS)
    try:
        body = {"permissions": wanted}
        answer = calls.call("cloudresourcemanager", "projects.testIamPermissions", resource=project, body=body)
    except _FAILURES as error:
        fix = f"gcloud services enable cloudresourcemanager.googleapis.com --project {project}"
        return Check(name="rights", ok=None, said=str(error), fix=fix)
    missing = sorted(set(wanted) - set(answer.get("permissions", [])))
    if missing:
        fix = "bind the role that holdfast.provider.gcp.controller_role() describes: docs/gcp.md"
        return Check(name="rights", ok=False, said=f"missing: {', '.join(missing)}", fix=fix)
    return Check(name="rights", ok=True, said=f"all {len(wanted)} that the controller needs")


def _image(calls: Calls, image: str) -> Check:
    parts = image.removeprefix("https://www.googleapis.com/compute/v1/").split("/")
    if len(parts) < 5 or parts[0] != "projects" or parts[2:4] != ["global", "images"]:
        fix = "write projects/PROJECT/global/images/NAME, or …/images/family/NAME"
        return Check(name="image", ok=False, said=f"not an image: {image}", fix=fix)
    try:
        if parts[4] == "family":
            found = calls.call("compute", "images.getFromFamily", project=parts[1], family=parts[5])
        else:
            found = calls.call("compute", "images.get", project=parts[1], image=parts[4])
    except _FAILURES as error:
        fix = f"gcloud compute images list --project {parts[1]}, and name one in the job file"
        return Check(name="image", ok=False, said=str(error), fix=fix)
    state = (found.get("deprecated") or {}).get("state")
    if state in ("OBSOLETE", "DELETED"):
        return Check(name="image", ok=False, said=f"{found['name']} is {state.lower()}", fix="name a newer one")
    return Check(name="image", ok=True, said=f"{found['name']} ({image})")


def _role(calls: Calls, account: str) -> Check:
    fix = (
        f"gcloud iam service-accounts add-iam-policy-binding {account} --member=YOU --role=roles/iam.serviceAccountUser"
    )
    try:
        answer = calls.call(
            "iam", "projects.serviceAccounts.testIamPermissions", resource=f"projects/-/serviceAccounts/{account}",
            body={"permissions": ["iam.serviceAccounts.actAs"]},
        )  # fmt: skip
    except Refused as error:
        ok = False if error.refusal.is_absence else None
        return Check(name="service account", ok=ok, said=str(error), fix=fix)
    except _FAILURES as error:
        return Check(name="service account", ok=None, said=str(error), fix=fix)
    if "iam.serviceAccounts.actAs" not in answer.get("permissions", []):
        return Check(name="service account", ok=False, said=f"{account} may not be given to machines", fix=fix)
    return Check(name="service account", ok=True, said=account)


def _bucket(calls: Calls, bucket: str, regions: set[str]) -> Check:
    try:
        found = calls.call("storage", "buckets.get", bucket=bucket)
    except Refused as error:
        ok = False if error.refusal.is_absence else None
        return Check(name="bucket", ok=ok, said=str(error), fix=f"gcloud storage buckets describe gs://{bucket}")
    except _FAILURES as error:
        return Check(name="bucket", ok=None, said=str(error))
    place = str(found.get("location", "")).lower()
    # A multi-region (us, eu) or dual region is near, and its traffic is not the same everywhere.
    far = sorted(region for region in regions if region != place and region.partition("-")[0] != place)
    if far and found.get("locationType", "region") == "region":
        said = f"gs://{bucket} is in {place}, machines would be in {', '.join(far)}: slow, and every byte is billed"
        return Check(name="bucket", ok=False, said=said, fix=f"use pools in {place}, or a bucket in {far[0]}")
    return Check(name="bucket", ok=True, said=f"gs://{bucket} in {place}")


def _pool(
    calls: Calls, project: str, pool: Pool, body: Mapping[str, Any], market: Market, everywhere: list[dict[str, Any]]
) -> Iterator[Check]:
    kind = MachineType.read(pool.instance_type)
    try:
        shape = market.shape(project, pool)
        if kind.accelerator:
            calls.call(
                "compute", "acceleratorTypes.get", project=project, zone=pool.zone, acceleratorType=kind.accelerator
            )
        region = calls.call("compute", "regions.get", project=project, region=pool.region)
    except _FAILURES as error:
        fix = f'gcloud compute machine-types list --project {project} --filter="name={kind.name}"'
        yield Check(name=pool.name, ok=False, said=str(error), fix=fix)
        return
    try:
        price = market.prices.machine_microusd_h(pool, lambda: shape)
    except _FAILURES as error:
        yield Check(
            name=pool.name, ok=False, said=str(error), fix="give a price table, or enable cloudbilling.googleapis.com"
        )
        return
    if price is None:
        yield Check(name=pool.name, ok=False, said="its price is not known", fix="give a price table: docs/gcp.md")
    quotas = {each["metric"]: each for each in region.get("quotas", [])}
    quotas |= {each["metric"]: each for each in everywhere if each["metric"] == "GPUS_ALL_REGIONS"}
    bad = False
    for metric, units in _uses(kind, shape, pool, body, quotas):
        line = _quota(metric, units, quotas.get(metric), pool, project)
        if line is not None:
            bad = True
            yield line
    if price is not None and not bad:
        yield Check(name=pool.name, ok=True, said=f"within the quotas; ${price / 1e6:.4f}/h without its disk")


def _uses(
    kind: MachineType, shape: Shape, pool: Pool, body: Mapping[str, Any], quotas: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    spot = pool.market == "spot"
    series = f"{kind.family.upper()}_CPUS"
    standard = series if series in quotas else "CPUS"
    # Without a quota for them, spot machines use the one for all.
    yield "PREEMPTIBLE_CPUS" if spot and quotas.get("PREEMPTIBLE_CPUS", {}).get("limit") else standard, shape.cpus
    gpus = ((kind.accelerator, kind.count),) if kind.accelerator else shape.accelerators
    for name, count in gpus:
        model = name.removeprefix("nvidia-").removeprefix("tesla-").upper().replace("-", "_")
        yield f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{'H100' if model == 'H100_80GB' else model}_GPUS", count
        if not spot:
            yield "GPUS_ALL_REGIONS", count
    disk = body["disks"][0]["initializeParams"]
    if last(disk["diskType"]).startswith("pd-"):
        ssd = last(disk["diskType"]) in _SSD
        yield "SSD_TOTAL_GB" if ssd else "DISKS_TOTAL_GB", int(disk["diskSizeGb"])
    if body["networkInterfaces"][0].get("accessConfigs"):
        yield "IN_USE_ADDRESSES", 1


def _quota(metric: str, units: int, quota: Mapping[str, Any] | None, pool: Pool, project: str) -> Check | None:
    """None: there is enough."""
    where = f"quota {metric} in {pool.region}"
    fix = f"ask for more: https://console.cloud.google.com/iam-admin/quotas?project={project} ({metric}, {pool.region})"
    if quota is None:
        return Check(
            name=where,
            ok=None,
            said="GCP does not list it with the region's; newer GPUs are under Cloud Quotas",
            fix=fix,
        )
    free = float(quota["limit"]) - float(quota["usage"])
    if free >= units:
        return None
    said = f"{units} needed, {free:g} of {quota['limit']:g} free"
    return Check(name=where, ok=False, said=said, fix=fix)
