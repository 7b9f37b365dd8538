"""What adapters of frameworks share: is this a version that they were made for, built as expected, and what will a stream cost."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

from holdfast.core.errors import HoldfastWarning, UsageError

__all__ = ["check_range", "lack_of", "warn_of_rereading"]


def check_range(adapter: str, package: str, version: str, *, major: int, oldest_minor: int, project: str = "") -> None:
    """Raises UsageError for a version that `adapter` was not made for. `project`: the package's name for pip, where it differs."""
    found_major, minor = (int(part) for part in version.split(".")[:2])
    if found_major != major or minor < oldest_minor:
        wanted = f"{project or package}>={major}.{oldest_minor},<{major + 1}"
        raise UsageError(
            f"{adapter} is made for {package} {major}.{oldest_minor} or newer, and older than {major + 1}; this is {version}. "
            f"Install one of these (pip install '{wanted}'), or a newer holdfast"
        )


def lack_of(owner: object, path: str, name: str, expected: Sequence[str]) -> str | None:
    """What this method of the framework lacks of what is used of it; None: nothing. `path`: where the owner is, as the user would
    write it; empty for what the sentence is about."""
    method = getattr(owner, name, None)
    if not callable(method):
        return f"{path or 'it'} has no {name}()"
    present = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in present.values()):
        return None
    lost = [parameter for parameter in expected if parameter not in present]
    return f"{f'{path}.' if path else ''}{name}() does not take {', '.join(lost)}" if lost else None


def warn_of_rereading(why: str) -> None:
    """At the start: what a resume of a stream without a usable state costs."""
    warnings.warn(
        f"{why}: a resume reads and drops all batches of the epoch that were used, which may take long, and is exact only if the "
        "stream gives the same samples again. A map-style dataset is resumed without reading",
        HoldfastWarning,
        stacklevel=3,
    )
