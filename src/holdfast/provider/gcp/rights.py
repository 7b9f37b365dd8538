"""Who may do what at GCP, as documents for IAM: the controller launches and ends machines, a machine reaches its own run and no
more.

Conditions on objects need uniform bucket-level access. Object listing is allowed by the prefix that is asked for, everything
else by the object's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from holdfast.core.errors import UsageError

__all__ = ["CONTROLLER_PERMISSIONS", "controller_role", "machine_bindings"]

CONTROLLER_PERMISSIONS = (
    "compute.acceleratorTypes.get", "compute.acceleratorTypes.list", "compute.addresses.delete", "compute.addresses.list",
    "compute.disks.create", "compute.disks.delete", "compute.disks.get",
    "compute.disks.list", "compute.disks.setLabels",
    "compute.globalOperations.list", "compute.images.useReadOnly", "compute.instances.create",
    "compute.instances.delete", "compute.instances.get", "compute.instances.list", "compute.instances.setLabels",
    "compute.instances.setMetadata", "compute.instances.setServiceAccount", "compute.instances.setTags",
    "compute.machineTypes.get", "compute.machineTypes.list", "compute.projects.get", "compute.regions.get",
    "compute.subnetworks.use", "compute.subnetworks.useExternalIp", "compute.zoneOperations.get",
    "compute.zoneOperations.list",
)  # fmt: skip
_CONTROLLERS_OWN = ("launches/", "control/")


def controller_role(title: str = "holdfast controller") -> dict[str, Any]:
    """A custom role for `gcloud iam roles create --file`. Beside it the controller needs `roles/iam.serviceAccountUser` on the
    machines' service account, and to read and write its runs' bucket.
    """
    return {"title": title, "stage": "GA", "includedPermissions": list(CONTROLLER_PERMISSIONS)}


def machine_bindings(
    run_url: str, service_account: str, readable: Sequence[str] = (), *, home: str | None = None
) -> list[dict[str, Any]]:
    """For the bucket's policy (version 3): the machine reads its run, and what else is named in `readable` (prefixes of the
    same bucket); it writes its run, without `launches/` and `control/`: what it may do is said there. `home`: of its fleet,
    in whose inbox it leaves word; where that is another bucket, the last binding is for its policy.
    """
    bucket, prefix = _bucket_and_prefix(run_url)
    objects = f"projects/_/buckets/{bucket}/objects/"
    prefixes = [f"{each.strip('/')}/" for each in (prefix, *readable)]
    if any('"' in each or "\\" in each for each in prefixes):
        raise UsageError(f"a prefix with quotation marks cannot be a condition: {prefixes}")
    listed = 'api.getAttribute("storage.googleapis.com/objectListPrefix", "")'
    reads = [f'resource.name.startsWith("{objects}{each}")' for each in prefixes]
    lists = [f'{listed}.startsWith("{each}")' for each in prefixes]
    held = "".join(f' && !resource.name.startsWith("{objects}{prefix}/{each}")' for each in _CONTROLLERS_OWN)
    member = [f"serviceAccount:{service_account}"]
    return [
        {
            "role": "roles/storage.objectViewer",
            "members": member,
            "condition": {"title": "holdfast: reads its run", "expression": " || ".join([*reads, *lists])},
        },
        {
            "role": "roles/storage.objectUser",
            "members": member,
            "condition": {"title": "holdfast: writes its run, not what it may do", "expression": reads[0] + held},
        },
        *([] if home is None else [_ringing(home, member)]),
    ]


def _ringing(home: str, member: list[str]) -> dict[str, Any]:
    bucket, prefix = _bucket_and_prefix(home)
    inbox = f'resource.name.startsWith("projects/_/buckets/{bucket}/objects/{prefix}/inbox/")'
    return {
        "role": "roles/storage.objectUser",
        "members": member,
        "condition": {"title": "holdfast: leaves word in its fleet's inbox", "expression": inbox},
    }


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if parts.scheme != "gs" or not parts.netloc or not prefix or '"' in prefix or "\\" in prefix:
        raise UsageError(f"not a prefix in a bucket of Google Cloud Storage: {url!r}; like gs://bucket/runs/gpt")
    return parts.netloc, prefix
