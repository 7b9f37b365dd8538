"""The job file: what somebody wants done, on what, by when and for how much, as YAML with the keys that SkyPilot's users know.

    text → YAML with its lines (`job_yaml`) → unknown keys are refused → `JobFile`, frozen, quantities in base units

It is strict: a key that nobody reads would be a wish that nobody hears, so an unknown key is an error that names the nearest
known one and the line. Nothing is run, looked up or filled in here; whoever reads the file decides what a missing key means.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from holdfast.core.config import parse_bytes, parse_duration_s
from holdfast.core.errors import UsageError
from holdfast.core.job_yaml import read_yaml

__all__ = [
    "Accelerator",
    "CheckpointBlock",
    "Deadline",
    "Dollars",
    "JobFile",
    "JobRecovery",
    "MachineBlock",
    "PlanBlock",
    "Rate",
    "Resources",
    "Seconds",
    "Size",
    "parse_accelerators",
    "parse_deadline",
    "parse_dollars",
    "parse_floor",
    "parse_job",
    "parse_rate",
    "read_job",
]


class Seconds(float):
    """A duration; in the file as `parse_duration_s` reads it."""


class Size(int):
    """Bytes; in the file as `parse_bytes` reads it."""


class Rate(float):
    """Bytes per second; in the file like "400 MiB/s"."""


class Dollars(float):
    """Dollars, or dollars per hour; in the file a number, with or without "$"."""


class Deadline:
    """So long after the start, or a moment."""

    __slots__ = ("after_s", "at")

    def __init__(self, after_s: float | None = None, at: datetime | None = None) -> None:
        self.after_s, self.at = after_s, at

    def left_s(self, now_unix_s: float) -> float:
        """Seconds from now, if the job starts now. UsageError where the moment has passed."""
        if self.at is None:
            return self.after_s or 0.0
        left_s = self.at.timestamp() - now_unix_s
        if left_s <= 0:
            raise UsageError(f"the deadline, {self.at.isoformat()}, has passed")
        return left_s


class Accelerator(msgspec.Struct, frozen=True):
    """So many of a kind in each machine. No accelerator is called CPU here; then `count` says how many of those."""

    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}:{self.count}"


class JobRecovery(msgspec.Struct, frozen=True, kw_only=True):
    strategy: str | None = None
    max_restarts_on_errors: int | None = None
    recover_on_exit_codes: int | tuple[int, ...] | None = None


def _checked(read: Any) -> None:
    """What msgspec turns into an error with a path must be a ValueError."""
    try:
        read()
    except UsageError as error:
        raise ValueError(str(error)) from None


def _quantity(kind: type, value: Any) -> object:
    try:
        if kind is Seconds:
            return Seconds(parse_duration_s(value))
        if kind is Size:
            return Size(parse_bytes(value))
        if kind is Rate:
            return Rate(parse_rate(value))
        if kind is Dollars:
            return Dollars(parse_dollars(value))
        if kind is Deadline:
            return parse_deadline(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    raise NotImplementedError(kind)


def parse_rate(value: object) -> float:
    """Bytes per second from "400 MiB/s"."""
    if not isinstance(value, str) or not value.strip().lower().endswith("/s"):
        raise UsageError(f'not a rate: {value!r}; a rate is written like "400 MiB/s" or "1.2 GB/s"')
    return float(parse_bytes(value.strip()[:-2]))


def parse_dollars(value: object) -> float:
    """Dollars from 500, "500", "$1,200"."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        amount = float(value.strip().removeprefix("$").replace(",", "") if isinstance(value, str) else value)
    except ValueError:
        amount = math.nan
    if not 0 <= amount < 1e9:
        raise UsageError(f'not an amount: {value!r}; an amount is dollars, like 500 or "$1,200"')
    return amount


def parse_deadline(value: object) -> Deadline:
    """A duration from the start, or a moment with its time zone."""
    if isinstance(value, str) and re.match(r"\s*\d{4}-\d\d-\d\d", value):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            pass
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise UsageError(f"the deadline {value} has no time zone; write it like 2026-12-01T18:00:00Z")
        return Deadline(at=value.astimezone(UTC))
    if isinstance(value, date):
        raise UsageError(f"the deadline {value} has no time; write it like {value}T18:00:00Z")
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"not a deadline: {value!r}; a duration from the start, or a moment like 2026-12-01T18:00:00Z")
    seconds = parse_duration_s(value)
    if seconds == 0:
        raise UsageError("a deadline lies after the start")
    return Deadline(after_s=seconds)


def parse_floor(value: int | str, nodes: int) -> int:
    """Machines, of so many, that always run on demand: 2, or "25%" (rounded up)."""
    text = str(value).strip()
    try:
        floor = math.ceil(float(text[:-1]) / 100 * nodes) if text.endswith("%") else int(text)
    except ValueError:
        raise UsageError(f'not a floor: {value!r}; machines or a share of them, like 2 or "25%"') from None
    if not 0 <= floor <= nodes:
        raise UsageError(f"an on_demand_floor of {value} does not fit {nodes} machines")
    return floor


def parse_accelerators(text: str) -> tuple[Accelerator, ...]:
    """From "A100:8", "A100" (one), or several with commas."""
    return tuple(_accelerator(part) for part in text.split(","))


def _accelerator(text: str) -> Accelerator:
    found = re.fullmatch(r"\s*([A-Za-z][\w.-]*)\s*(?::\s*(\d{1,6}))?\s*", text, re.ASCII)
    if found is None or found[2] == "0" * len(found[2] or "x"):
        raise UsageError(f'not an accelerator: {text!r}; written like "A100:8" (eight in each machine)')
    return Accelerator(found[1].upper() if found[1].lower() == "cpu" else found[1], int(found[2] or 1))


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What each machine needs. `any_of` and `ordered` are alternatives, each on top of the keys beside them."""

    accelerators: str | dict[str, int] | tuple[str, ...] | None = None
    cpus: int | float | str | None = None
    memory: int | float | str | None = None
    infra: str | None = None
    """`aws`, `aws/us-east-1` or `aws/us-east-1/us-east-1a`."""
    instance_type: str | None = None
    use_spot: bool | None = None
    any_of: tuple[Resources, ...] = ()
    ordered: tuple[Resources, ...] = ()
    image_id: str | None = None
    """The provider's name of a machine image; without one, a current image with drivers."""
    disk_size: int | None = None
    """GiB of the boot disk."""
    disk_tier: str | None = None
    """The provider's name of a kind of disk: gp3, pd-ssd."""
    max_hourly_cost: Dollars | None = None
    """Of one machine."""
    autostop: bool | int | str | dict[str, Any] | None = None
    job_recovery: str | JobRecovery | None = None

    def __post_init__(self) -> None:
        _checked(lambda: self.wanted)
        if self.any_of and self.ordered:
            raise ValueError("any_of and ordered exclude each other")
        if any(each.any_of or each.ordered for each in (*self.any_of, *self.ordered)):
            raise ValueError("alternatives have no alternatives of their own")

    @property
    def wanted(self) -> tuple[Accelerator, ...]:
        """The accelerators of which one kind is wanted."""
        if isinstance(self.accelerators, dict):
            return tuple(_accelerator(f"{name}:{count}") for name, count in self.accelerators.items())
        texts = (self.accelerators,) if isinstance(self.accelerators, str) else self.accelerators or ()
        return tuple(found for text in texts for found in parse_accelerators(text))

    def alternatives(self) -> tuple[Resources, ...]:
        """One entry per alternative, in the file's order, each with the keys beside it filled in."""
        others = self.any_of or self.ordered
        if not others:
            return (self,)
        base = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("any_of", "ordered")}
        return tuple(
            Resources(
                **base
                | {name: getattr(each, name) for name in base if getattr(each, name) is not None}
            )
            for each in others
        )  # fmt: skip


class CheckpointBlock(msgspec.Struct, frozen=True, kw_only=True):
    """What is saved, how often, and how fast that goes."""

    url: str | None = None
    size: Size | None = None
    save_every: str | int | tuple[str | int, ...] | None = None
    max_lost_work: str | int | None = None
    bandwidth: Rate | None = None
    """To the store, of one machine."""
    stall: Seconds | None = None
    """What one save costs the loop."""


class MachineBlock(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is given at its provider, beside its type, image and disk."""

    role: str | None = None
    """Instance profile (AWS) or service account (GCP)."""
    scopes: tuple[str, ...] = ()
    network: dict[str, Any] = {}
    """In the provider's words: subnets, security groups, a public address."""
    local_ssd: bool = False
    labels: dict[str, str] = {}
    """Put on everything that is launched."""


class PlanBlock(msgspec.Struct, frozen=True, kw_only=True):
    """What only `holdfast plan` asks for: how much work there is, and what is known about the market and the loop."""

    work: str | int | float | dict[str, str | int | float] | None = None
    """Uninterrupted, on all machines together; or so much for each accelerator: `{A100:8: 48h, H100:8: 22h}`."""
    step_time: Seconds | None = None
    changeover: Seconds | None = None
    """From the order of a machine until it works again: launch, set-up, restore."""
    notice: Seconds | None = None
    mean_life: Seconds | None = None
    mean_outage: Seconds | None = None
    tasks: bool = False
    """The machines work on tasks that do not wait for each other: a sweep, preprocessing."""
    task_time: Seconds | None = None
    serving: bool = False
    engineering_hours: float | None = None
    hourly_rate: Dollars | None = None

    def __post_init__(self) -> None:
        _checked(lambda: self.work_s)

    @property
    def work_s(self) -> dict[str | None, float]:
        """By accelerator; None for any."""
        if isinstance(self.work, dict):
            return {str(_accelerator(name)): parse_duration_s(said) for name, said in self.work.items()}
        return {} if self.work is None else {None: parse_duration_s(self.work)}


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Sections that the file leaves out are empty."""

    name: str | None = None
    workdir: str | None = None
    num_nodes: int = 1
    envs: dict[str, str | None] = {}
    secrets: dict[str, str | None] = {}
    file_mounts: dict[str, Any] = {}
    setup: str | None = None
    setup_cache: bool = False
    """What the set-up of one machine has made is put in place on the next ones, where it changes nothing but files of its own."""
    run: str | None = None
    resources: Resources = Resources()
    machine: MachineBlock = MachineBlock()
    spot_policy: Literal["spot", "on-demand", "auto"] = "auto"
    max_price: Dollars | None = None
    """Per hour, of one machine."""
    max_duration: Seconds | None = None
    idle_duration: Seconds | None = None
    budget: Dollars | None = None
    deadline: Deadline | None = None
    checkpoint: CheckpointBlock | Literal["none"] | None = None
    on_demand_floor: int | str | None = None
    opportunistic: bool = False
    """Spot only, and no deadline."""
    fallback_after: int | str | None = None
    """On-demand after so many failed tries, or so long: "3 tries or 10 min"."""
    start_window: str | None = None
    """UTC, "mon-fri 20:00-06:00": when it may start; `run_window`: when it may run."""
    run_window: str | None = None
    reserved: list[str] = []
    """Pools that are paid for already."""
    plan: PlanBlock = PlanBlock()

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes is 1 or more, not {self.num_nodes}")
        _checked(lambda: self.floor_nodes)

    @property
    def floor_nodes(self) -> int:
        """Machines that always run on demand."""
        return 0 if self.on_demand_floor is None else parse_floor(self.on_demand_floor, self.num_nodes)


def read_job(path: Path) -> JobFile:
    """Read a job file. UsageError names the file, the line and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the job file {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the job file {str(path)!r} is not UTF-8 text") from None
    return parse_job(text, str(path))


def parse_job(text: str, name: str = "job file") -> JobFile:
    """The job that the text describes; `name` is used in messages."""
    data, lines = read_yaml(text, name, words=("envs", "secrets"))
    for path, key, known in _unknown(data, JobFile, "$"):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        said = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        raise UsageError(f"{name}, line {_line(lines, f'{path}.{key}')}: unknown key {key!r}; {said}")
    try:
        return msgspec.convert(data, JobFile, dec_hook=_quantity)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `")
        path = path.removesuffix("`") or "$"
        shown = f"{path.removeprefix('$.')}: " if path not in ("", "$") else ""
        raise UsageError(f"{name}, line {_line(lines, path)}: {shown}{what}") from None


def _line(lines: Mapping[str, int], path: str) -> int:
    """Where this stands, or what holds it."""
    while path not in lines and path != "$":
        path = path[: max(path.rfind("."), path.rfind("["), 1)]
    return lines.get(path, 1)


def _unknown(data: object, kind: type[msgspec.Struct], path: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Path, key and the keys that are known there."""
    if not isinstance(data, dict):
        return
    known = kind.__struct_fields__
    hints = typing.get_type_hints(kind)
    for key, value in data.items():
        if key not in known:
            yield path, str(key), known
            continue
        for inner in _structs(hints[key]):
            for place, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
                yield from _unknown(each, inner, f"{path}.{key}" + ("" if place is None else f"[{place}]"))


def _structs(hint: object) -> Iterator[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for inner in typing.get_args(hint):
        yield from _structs(inner)
