"""What the machines of a run have to do: one sealed record, written once by the controller before the first launch.

    job file → controller → control/job, and the archive code/<digest>.tar beside it
    machine → control/job → set-up, working folder, command

It names secrets and never holds one: `file:/path` on the machine, or a name in the provider's secret store, which the machine's own
role may read. Texts are the user's shell; what else stands here comes from a store that others may write to, and is checked.
"""

from __future__ import annotations

import re

import msgspec

from holdfast.core.mounts import Mount, check_apart

__all__ = [
    "JOB_KEY",
    "MOST_ARCHIVE_BYTES",
    "SECRET_STORES",
    "GitCode",
    "JobRecord",
    "PackedCode",
    "archive_key",
]

JOB_KEY = "control/job"
MOST_ARCHIVE_BYTES = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GIT_URL = re.compile(
    r"(?:https://|ssh://(?:[A-Za-z0-9._-]+@)?|file:///)[^\s@?#]+|[A-Za-z0-9._-]+@[A-Za-z0-9.-]+:[^\s@?#]+"
)
SECRET_STORES: dict[str, re.Pattern[str]] = {
    "file": re.compile(r"/[^\0\n]+"),
    "aws-secret": re.compile(r"[A-Za-z0-9/_+=.@:-]{1,2048}"),
    "aws-parameter": re.compile(r"[A-Za-z0-9/_.:-]{1,2048}"),
    "gcp-secret": re.compile(r"(?:projects/[a-z0-9-]+/secrets/)?[A-Za-z0-9_-]{1,255}(?:/versions/(?:\d+|latest))?"),
}
"""Where a secret can be, and how it is named there. No name begins with a dash: it becomes a program's argument."""


class PackedCode(msgspec.Struct, frozen=True, kw_only=True, tag="packed"):
    """The working folder as an uncompressed tar archive under the run's URL, named by the BLAKE3 of its bytes."""

    digest: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest) or not 0 <= self.size_bytes <= MOST_ARCHIVE_BYTES:
            raise ValueError(f"an archive is named by a BLAKE3 in hex and has at most {MOST_ARCHIVE_BYTES} bytes")

    @property
    def version(self) -> str:
        return f"blake3:{self.digest}"


class GitCode(msgspec.Struct, frozen=True, kw_only=True, tag="git"):
    """The working folder as one commit, by its whole hash."""

    url: str
    commit: str

    def __post_init__(self) -> None:
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(f"a commit is named by its whole hash, not {self.commit!r}")
        if not _GIT_URL.fullmatch(self.url):
            raise ValueError("a git URL is https://…, ssh://… or git@host:…, without a password in it")

    @property
    def version(self) -> str:
        return f"git:{self.commit}"


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One job, as every machine of the run does it. Times in seconds."""

    format: int
    nonce: str
    """The writer's own: it tells whether a put without a clear answer was applied."""
    name: str
    run: str
    """Shell text, run by `bash -e -o pipefail` in the working folder: `python train.py | tee log` fails when the training does."""
    setup: str = ""
    """Shell text, run once on each machine, in the working folder, before the first start."""
    setup_limit_s: int = 3600
    setup_cache: bool = False
    """Whether what it makes may be kept under the run's URL, and put in place on the next machines instead of running it."""
    envs: dict[str, str] = {}
    secrets: dict[str, str] = {}
    """By environment variable, where it is: `file:/run/secrets/token`, `aws-secret:NAME`, `aws-parameter:NAME`,
    `gcp-secret:NAME`."""
    code: PackedCode | GitCode | None = None
    """None: an empty working folder."""
    mounts: tuple[Mount, ...] = ()
    """Copied before the set-up."""
    uses_venv: bool = True
    """The environment in which the machine's holdfast is installed comes first on the PATH: `python` finds holdfast and what the
    set-up installs. It sees the image's own packages. False: the image's PATH as it is."""
    holdfast: str = ""
    """The version that the controller serves; recorded beside the one that runs."""
    home: str = ""
    """The fleet's, by its URL: word is left there when a machine has said something. Empty: nobody listens there."""
    grace_s: int = 30
    """From SIGTERM, or the order to stop, until what still runs is killed."""
    notice: str = "auto"
    """Where machines listen for word that they go; see `holdfast notices`."""
    keeps_output: bool = True
    max_errors: int = 3
    max_errors_total: int = 30
    max_infrastructure: int = 1
    """Failures of the machine in a row that are answered by a restart on it. Another machine is likely the better answer."""
    no_progress_limit: int = 2
    """Attempts in a row on one machine without a new checkpoint; 0: any number."""

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise ValueError("a job has something to run")
        for name in (*self.envs, *self.secrets):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"not a name of an environment variable: {name!r}")
        if any("\0" in text for text in (self.run, self.setup, *self.envs.values())):
            raise ValueError("shell texts and environment variables hold no zero bytes")
        both = sorted(set(self.envs) & set(self.secrets))
        if both:
            raise ValueError(f"both an environment variable and a secret: {', '.join(both)}")
        for name, reference in self.secrets.items():
            where, _, rest = reference.partition(":")
            known = SECRET_STORES.get(where)
            if known is None or rest.startswith("-") or not known.fullmatch(rest):
                stores = ", ".join(f"{each}:…" for each in SECRET_STORES)
                # The text itself is not shown: it may be the secret, written in the wrong place.
                raise ValueError(f"secret {name} is no reference; known forms: {stores}")
        check_apart(mount.target for mount in self.mounts)
        counts = (self.max_errors, self.max_errors_total, self.max_infrastructure, self.no_progress_limit)
        if min(*counts, self.grace_s) < 0 or self.setup_limit_s <= 0:
            raise ValueError("limits and times are zero or more, and the set-up's limit is above zero")


def archive_key(digest: str) -> str:
    return f"code/{digest}.tar"
