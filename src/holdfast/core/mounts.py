"""What a job wants on its machines beside its working folder: files from a store, or files that were packed at the launch.

    `file_mounts` of the job file → Mount, in the job's record → the machine copies it before the set-up

A target is absolute, below the user's home (`~/…`), or relative to the working folder. Records come from a store that others may
write to, so a target is checked wherever a mount is read.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from itertools import pairwise

import msgspec

__all__ = ["SOURCE_SCHEMES", "Mount", "check_apart", "is_relative", "read_target"]

SOURCE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "file")
_URL = re.compile(rf"(?:{'|'.join(SOURCE_SCHEMES)})://[^\s\0]+(?: +[^\s\0]+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST = 4000


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One target and where its bytes are: at a URL, or in an archive beside the working folder's (`job_record.archive_key`)."""

    target: str
    """As `read_target` returns it."""
    url: str = ""
    """A folder or one object; the machine reads it with its own role."""
    digest: str = ""
    size_bytes: int = 0
    is_file: bool = False
    """The archive holds one file, and the target is that file."""

    def __post_init__(self) -> None:
        if self.target != read_target(self.target):
            raise ValueError(f"not a target as it is written into records: {self.target!r}")
        if bool(self.url) == bool(self.digest):
            raise ValueError(f"{self.target}: files come from a URL or from an archive, and from one of them")
        if self.url and not _URL.fullmatch(self.url):
            raise ValueError(f"{self.target}: not a URL that files are copied from: {self.url!r}")
        if self.digest and (not _DIGEST.fullmatch(self.digest) or self.size_bytes < 0):
            raise ValueError(f"{self.target}: an archive is named by a BLAKE3 in hex")

    @property
    def source(self) -> str:
        return self.url or f"blake3:{self.digest}"


def is_relative(target: str) -> bool:
    """To the working folder."""
    return not target.startswith(("/", "~"))


def read_target(text: str) -> str:
    """The one spelling of a target. ValueError for what names no place for files, or leads out of its beginning."""
    if not text or "\0" in text or "\n" in text or len(text) > _LONGEST:
        raise ValueError(f"not a place for files: {text[:80]!r}")
    if ".." in text.split("/"):
        raise ValueError(f"{text!r}: a target has no `..` in it")
    found = posixpath.normpath("/" + text.lstrip("/") if text.startswith("/") else text)
    if found.startswith("~") and not found.startswith("~/"):
        raise ValueError(
            f"{text!r}: files go to a place below a home, like ~/data, and not to a home itself or another user's"
        )
    if found in ("/", "."):
        raise ValueError(
            f"{text!r}: files go to a place of their own, like /data or data; the working folder is `workdir:`"
        )
    return found


def check_apart(targets: Iterable[str]) -> None:
    """ValueError where one lies in another: which of them is there first would decide what is in it."""
    seen = sorted(targets, key=lambda target: target.split("/"))
    for first, second in pairwise(seen):
        if second == first or second.startswith(f"{first}/"):
            raise ValueError(f"{second} is, or lies in, {first}: give each its own place")
