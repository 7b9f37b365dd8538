"""Sealed records: small JSON documents that carry their own hash, so that a flipped byte is found before anything is believed.

    {"blake3":"<64 hex digits>","body":…}        the hash is over the exact bytes of the body

Every record under a run's URL is written like this: what the run is, its heads and roots, what is launched for it. They share one
format version. Every size is checked before it is used: a folder may be hostile.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from blake3 import blake3

from holdfast.core.errors import FormatError, IntegrityError, RunConflict, UsageError

__all__ = ["FORMAT_VERSION", "MAX_RECORD_BYTES", "digest", "seal", "unseal"]

FORMAT_VERSION = 1
MAX_RECORD_BYTES = 64 << 20
_SEAL_HEAD = b'{"blake3":"'
_SEAL_BODY = b'","body":'

Record = TypeVar("Record", bound=msgspec.Struct)


class _AnyRecord(msgspec.Struct, frozen=True):
    format: int


def digest(data: bytes | memoryview) -> str:
    """BLAKE3-256 as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def seal(record: msgspec.Struct) -> bytes:
    """A record as sealed JSON. Raises UsageError when it holds what JSON cannot, or is too large to be read back."""
    try:
        body = msgspec.json.encode(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a {type(record).__name__} record cannot be written: {error}") from error
    if len(body) > MAX_RECORD_BYTES - 256:
        raise UsageError(
            f"a {type(record).__name__} record of {len(body)} bytes is too large; make its metadata smaller"
        )
    return _SEAL_HEAD + digest(body).encode("ascii") + _SEAL_BODY + body + b"}\n"


def unseal(data: bytes, kind: type[Record], *, what: str) -> Record:
    """Check the seal and the format version, then decode. `what` names the object in messages.

    Raises IntegrityError when the hash does not match, FormatError when the content is not a `kind`, and RunConflict when a newer
    holdfast has written it: that is no damage, and nothing older may be taken for the truth instead.
    """
    start = len(_SEAL_HEAD)
    hexadecimal, separator = data[start : start + 64], data[start + 64 : start + 64 + len(_SEAL_BODY)]
    if data[:start] != _SEAL_HEAD or separator != _SEAL_BODY or data[-2:] != b"}\n":
        raise FormatError(f"{what}: not a holdfast record (torn, altered or something else)")
    body = data[start + 64 + len(_SEAL_BODY) : -2]
    if digest(body).encode("ascii") != hexadecimal:
        raise IntegrityError(f"{what}: the bytes do not match their hash; the object has been altered or torn")
    try:
        version = msgspec.json.decode(body, type=_AnyRecord).format
        if version > FORMAT_VERSION:
            raise RunConflict(
                f"{what}: written by a newer holdfast, in format {version}; this one reads format {FORMAT_VERSION}. Update holdfast"
            )
        record = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: not a valid record: {error}") from error
    if version != FORMAT_VERSION:
        raise FormatError(f"{what}: format {version} does not exist")
    return record
