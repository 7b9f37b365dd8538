"""`file_mounts` of a job file: what is copied to each machine, and what is refused, in words that say what to do instead.

{/data: s3://bucket/data, ~/config: ./config, cache: {source: gs://b/x, mode: COPY}}
URL → the machine copies it, with its own role        path here → packed once, by content, as the working folder is
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.core.bootstrap import LOCAL_KIND
from holdfast.core.errors import UsageError
from holdfast.core.job_record import archive_key
from holdfast.core.jobfile import JobFile
from holdfast.core.mounts import SOURCE_SCHEMES, Mount, check_apart, is_relative, read_target
from holdfast.core.sealed import digest
from holdfast.fleet.code import pack, pack_file
from holdfast.store.base import Store
from holdfast.store.open import normalise_url

__all__ = ["check_mounts", "mounts_of"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=/)")
_KEYS = ("source", "mode")
_BUCKETS_OWN = ("name", "store", "persistent", "config")
"""SkyPilot's, of buckets that it makes."""
_MOUNTED = ("mount", "mount_cached")


@dataclass(frozen=True, slots=True)
class _Asked:
    target: str
    source: str
    is_url: bool


def check_mounts(job: JobFile, provider: str) -> None:
    """UsageError for what will not be done; nothing is read or written."""
    list(_asked(job, provider))


def mounts_of(job: JobFile, provider: str, store: Store, base: Path) -> tuple[Mount, ...]:
    """What the machines are told. Files from here are packed into the store; paths are relative to `base`, the job file's folder.

    Raises UsageError for what will not be done, and for local files that are not there or too large.
    """
    return tuple(_mount(each, store, base) for each in list(_asked(job, provider)))


def _mount(asked: _Asked, store: Store, base: Path) -> Mount:
    if asked.is_url:
        return Mount(target=asked.target, url=asked.source)
    path = base / Path(asked.source).expanduser()
    what = f"file_mounts: {asked.source!r}"
    if path.is_dir():
        body = pack(path, what)
    elif path.is_file():
        body = pack_file(path, what)
    else:
        raise UsageError(f"{what} is neither a file nor a folder here, and no URL ({_urls()})")
    mount = Mount(target=asked.target, digest=digest(body), size_bytes=len(body), is_file=path.is_file())
    store.put_new(archive_key(mount.digest), body)
    return mount


def _asked(job: JobFile, provider: str) -> Iterator[_Asked]:
    found = [_one(target, said, job.envs, provider) for target, said in job.file_mounts.items()]
    try:
        check_apart(each.target for each in found)
    except ValueError as error:
        raise UsageError(f"file_mounts: {error}") from None
    return iter(found)


def _one(target: str, said: object, envs: Mapping[str, str | None], provider: str) -> _Asked:
    where = f"file_mounts, {target}"
    if isinstance(said, Mapping):
        said = _source(where, said)
    if not isinstance(said, str) or not said.strip():
        raise UsageError(f"{where}: it is a path, a URL, or {{source: …, mode: COPY}}, not {said!r}")
    try:
        place = read_target(_filled(target, envs, where))
    except ValueError as error:
        raise UsageError(f"file_mounts: {error}") from None
    if provider == LOCAL_KIND and not is_relative(place):
        raise UsageError(
            f"{where}: the machines of the rehearsal cloud are folders on this computer, and nothing is written outside of them: "
            f"use a relative target, like {place.rsplit('/', 1)[-1]}, which lies in the working folder on every cloud"
        )
    source = _filled(said, envs, where)
    scheme = _SCHEME.match(source)
    if scheme is None:
        return _Asked(place, source, is_url=False)
    if scheme[1].lower() not in SOURCE_SCHEMES:
        raise UsageError(f"{where}: files are copied from {_urls()}, not from {scheme[1]}:; fetch it in `setup:`")
    return _Asked(place, normalise_url(source), is_url=True)


def _source(where: str, said: Mapping[object, object]) -> object:
    for key in said:
        if key in _BUCKETS_OWN:
            raise UsageError(
                f"{where}: {key!r} is of a bucket that SkyPilot makes; holdfast makes none: name one that is there, as `source:`"
            )
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_KEYS)}"
            raise UsageError(f"{where}: unknown key {key!r}; {hint}")
    mode = said.get("mode")
    if mode is None or str(mode).lower() in _MOUNTED:
        which = "without `mode:`, SkyPilot mounts a bucket" if mode is None else f"`mode: {mode}` mounts a bucket"
        raise UsageError(
            f"{where}: {which}, and holdfast mounts none: a mounted bucket fails in the middle of a step when the network does. "
            "Say `mode: COPY` to have the files copied before the job starts; what the job writes goes to a URL by its program"
        )
    if str(mode).lower() != "copy":
        raise UsageError(f"{where}: there is no mode {mode!r}; there is COPY")
    return said.get("source")


def _filled(text: str, envs: Mapping[str, str | None], where: str) -> str:
    """`${NAME}` and `$NAME` stand for what `envs:` says, as with SkyPilot."""
    try:
        return string.Template(text).substitute({name: value for name, value in envs.items() if value is not None})
    except KeyError as error:
        raise UsageError(f"{where}: {error.args[0]} is not among `envs:`") from None
    except ValueError:
        raise UsageError(
            f"{where}: {text!r}: a dollar sign begins a name of `envs:`; write $$ for the sign itself"
        ) from None


def _urls() -> str:
    return "s3://, gs://, az://, file:///"
