"""What the ranks of a job compute on: kind, memory and precision, in the manifest, and what is different at a resume.

each rank: Device ─ (ranks/joining.py) → all devices of the job → root metadata          resume: before → now, in plain words
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from holdfast.core.config import format_bytes

__all__ = ["Device", "describe_devices", "device_changes", "this_device"]

_SHOWN_CHANGE = 0.02
"""Drivers and kernels keep a little for themselves, more or less: machines of one type differ by less than this."""
_BFLOAT16_FROM = (8, 0)
"""Compute capability from which NVIDIA GPUs have bfloat16 units (CUDA C++ Programming Guide, arithmetic instructions)."""


class Device(msgspec.Struct, frozen=True):
    """What one rank computes on. `capability`: of CUDA, as (major, minor); None on a CPU, whose memory is the machine's."""

    name: str
    memory_bytes: int
    capability: tuple[int, int] | None = None


def this_device() -> Device:
    """The current CUDA device of this process, else the machine's CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(str(found.name), int(found.total_memory), (int(found.major), int(found.minor)))
    return Device(f"{platform.machine()} CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def describe_devices(devices: Iterable[Device]) -> list[dict[str, Any]]:
    """For the root's metadata: each kind once, with how many ranks compute on it, in the order of the ranks."""
    return [{**msgspec.structs.asdict(device), "count": count} for device, count in Counter(devices).items()]


def device_changes(
    before: Mapping[str, Any], devices: Sequence[Mapping[str, Any]], precision: Sequence[str]
) -> list[str]:
    """Lines for people about what the run computed on `before` (the metadata of a root) and does now."""
    lines = []
    then: Sequence[Mapping[str, Any]] = before.get("devices", [])
    if then and _kinds(then) != _kinds(devices):
        lines.append(f"changed since the checkpoint: devices: {_in_words(then)} → {_in_words(devices)}")
        least_then, least = min(_memory(then)), min(_memory(devices))
        if least < least_then * (1 - _SHOWN_CHANGE):
            lines.append(
                f"the smallest device has {format_bytes(least)} instead of {format_bytes(least_then)}: "
                "run.plan_batch(global_batch=…, memory_bytes_per_sample=…) says which micro-batch keeps the global batch here"
            )
    if before.get("precision", precision) != precision:
        lines.append(f"changed since the checkpoint: precision: {before['precision']} → {list(precision)}")
    slow = [device for device in devices if device["capability"] and tuple(device["capability"]) < _BFLOAT16_FROM]
    if slow and "torch.bfloat16" in precision:
        lines.append(f"{slow[0]['name']} has no bfloat16 units: it is computed by way of float32 there, which is slow")
    return lines


def _kinds(devices: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """What counts as a change: not a few pages of memory more or less."""
    return [(device["name"], device["count"], round(device["memory_bytes"] / (1 << 30))) for device in devices]


def _memory(devices: Sequence[Mapping[str, Any]]) -> list[int]:
    return [device["memory_bytes"] for device in devices]


def _in_words(devices: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{device['count']} x {device['name']} ({format_bytes(device['memory_bytes'])})" for device in devices
    )
