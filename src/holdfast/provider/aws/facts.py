"""What is known of instance types and images, asked once in the life of a process: what a request needs beside its order.

Images are named in three ways: `ami-…` (of one region), `us-east-1=ami-…,us-west-2=ami-…`, or `ssm:/path` (a public parameter,
looked up in each region). Without a name it is AWS's own with the right drivers. A request holds what came of it, so that a
repeated call asks for the same image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from holdfast.core.errors import ProviderError, UsageError
from holdfast.core.launches import Allowed
from holdfast.provider.aws.account import Account

__all__ = ["AcceleratorFacts", "Facts", "ImageFacts", "Known", "TypeFacts", "enabled_regions", "image_wish"]

_ANY_REGION = "us-east-1"
# Of Ubuntu 24.04, because holdfast needs Python 3.11: Amazon Linux 2023 has 3.9. It serves machines without a GPU as well.
_DLAMI = "ssm:/aws/service/deeplearning/ami/{}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
_NEURON = "ssm:/aws/service/neuron/dlami/base/ubuntu-24.04/latest/image_id"


def enabled_regions(account: Account) -> list[str]:
    """Of this account. ProviderError."""
    own = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _ANY_REGION
    return sorted(each["RegionName"] for each in account.ask("ec2", own, "DescribeRegions")["Regions"])


@dataclass(frozen=True, slots=True)
class AcceleratorFacts:
    name: str
    maker: str
    count: int
    memory_mib: int
    """Of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeFacts:
    """An instance type as DescribeInstanceTypes tells of it."""

    name: str
    vcpus: int
    memory_mib: int
    architectures: tuple[str, ...]
    accelerators: tuple[AcceleratorFacts, ...]
    markets: tuple[str, ...]
    burstable: bool
    bare_metal: bool

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> TypeFacts:
        gpus = told.get("GpuInfo", {}).get("Gpus", ())
        neurons = told.get("NeuronInfo", {}).get("NeuronDevices", ())
        older = () if neurons else told.get("InferenceAcceleratorInfo", {}).get("Accelerators", ())
        devices = [(each, each.get("Manufacturer", "")) for each in gpus]
        devices += [(each, "AWS") for each in (*neurons, *older)]
        return cls(
            name=told["InstanceType"],
            vcpus=told.get("VCpuInfo", {}).get("DefaultVCpus", 0),
            memory_mib=told.get("MemoryInfo", {}).get("SizeInMiB", 0),
            architectures=tuple(told.get("ProcessorInfo", {}).get("SupportedArchitectures", ())),
            accelerators=tuple(
                AcceleratorFacts(
                    each.get("Name", ""), maker, each.get("Count", 0), each.get("MemoryInfo", {}).get("SizeInMiB", 0)
                )
                for each, maker in devices
            ),
            markets=tuple(told.get("SupportedUsageClasses", ())),
            burstable=bool(told.get("BurstablePerformanceSupported")),
            bare_metal=bool(told.get("BareMetal")),
        )

    @property
    def architecture(self) -> str:
        """The one that an image is chosen for. UsageError where no image of ours runs."""
        for each in ("x86_64", "arm64"):
            if each in self.architectures:
                return each
        raise UsageError(f"{self.name} is neither x86_64 nor arm64: {', '.join(self.architectures) or 'not said'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    id: str
    name: str
    architecture: str
    root_device: str
    least_gib: int
    """The size of its own root volume."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a request needs to know: nothing else goes into it."""

    types: Mapping[str, TypeFacts]
    images: Mapping[str, ImageFacts]
    """By instance type."""


def image_wish(named: str | None, region: str, facts: TypeFacts) -> str:
    """`ami-…` or `ssm:/path`, for machines of this type in this region."""
    if named is None:
        makers = {each.maker.upper() for each in facts.accelerators}
        if "AWS" in makers:
            return _NEURON
        if makers - {"NVIDIA"}:
            wrong = f"{facts.name} has accelerators of {', '.join(sorted(makers))}, for which no image is known"
            raise UsageError(f"{wrong}; name one as the job's image")
        return _DLAMI.format(facts.architecture)
    by_region = dict(part.strip().split("=", 1) for part in named.split(",") if "=" in part)
    wish = by_region.get(region) if by_region else named.strip()
    if wish is None:
        raise UsageError(f"the image {named!r} names none in {region}; write {region}=ami-… as well")
    if not wish.startswith(("ami-", "ssm:/")):
        raise UsageError(f"not an image: {wish!r}; written like ami-0123456789abcdef0, us-east-1=ami-…, or ssm:/path")
    return wish


class Known:
    """The book of types and images. Thread safety: any thread; what two ask for at once is asked twice."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._types: dict[tuple[str, str], TypeFacts] = {}
        self._images: dict[tuple[str, str], ImageFacts] = {}
        self._lock = Lock()

    def for_pools(self, allowed: Sequence[Allowed], image: str | None) -> Facts:
        """All in one region. ProviderError when AWS does not say, UsageError for what is not there."""
        region = allowed[0].pool.region
        names = list(dict.fromkeys(each.pool.instance_type for each in allowed))
        types = self.types(region, names)
        if absent := [name for name in names if name not in types]:
            raise UsageError(f"{region} has no instance type {', '.join(absent)}")
        return Facts(types, {name: self.image(region, image_wish(image, region, types[name])) for name in names})

    def types(self, region: str, names: Iterable[str]) -> dict[str, TypeFacts]:
        """Those of these that exist there."""
        wanted = list(names)
        unknown = [name for name in wanted if (region, name) not in self._types]
        for start in range(0, len(unknown), 100):
            filters = [{"Name": "instance-type", "Values": unknown[start : start + 100]}]
            self.learn(region, filters)
        return {name: self._types[region, name] for name in wanted if (region, name) in self._types}

    def learn(self, region: str, filters: Sequence[Mapping[str, Any]]) -> list[TypeFacts]:
        told = self._account.ask_all("ec2", region, "DescribeInstanceTypes", "InstanceTypes", Filters=list(filters))
        found = [TypeFacts.of(each) for each in told]
        with self._lock:
            self._types.update({(region, each.name): each for each in found})
        return found

    def image(self, region: str, wish: str) -> ImageFacts:
        known = self._images.get((region, wish))
        if known is not None:
            return known
        ami = wish
        if wish.startswith("ssm:"):
            answer = self._account.ask("ssm", region, "GetParameter", Name=wish.removeprefix("ssm:"))
            ami = answer["Parameter"]["Value"]
        found = self._account.ask("ec2", region, "DescribeImages", ImageIds=[ami]).get("Images", ())
        if not found:
            raise ProviderError(f"there is no image {ami} in {region}, or this account may not see it")
        facts = _image(found[0])
        with self._lock:
            return self._images.setdefault((region, wish), facts)


def _image(told: Mapping[str, Any]) -> ImageFacts:
    root = told.get("RootDeviceName", "/dev/xvda")
    volumes = {each.get("DeviceName"): each.get("Ebs", {}) for each in told.get("BlockDeviceMappings", ())}
    return ImageFacts(
        id=told["ImageId"],
        name=told.get("Name", ""),
        architecture=told.get("Architecture", ""),
        root_device=root,
        least_gib=volumes.get(root, {}).get("VolumeSize", 0),
    )
