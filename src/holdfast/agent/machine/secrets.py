"""From the name of a secret to its value, which then stands in the command's environment and nowhere else.

    file:/run/secrets/token       a file on the machine, closed to everybody else
    aws-secret:… aws-parameter:… gcp-secret:…    asked for by the provider's own tool, with the machine's own role

Values are never put on a command line, into a file, a record, an event or a message.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Mapping

from holdfast.core.errors import HoldfastError, UsageError

__all__ = ["Hider", "hide", "patterns_of", "resolve"]

_MOST_BYTES = 64 << 10
_ASK_S = 60.0


def resolve(name: str, reference: str, environment: Mapping[str, str]) -> str:
    """UsageError for a file that is not there or open to others; HoldfastError where the provider does not give it away."""
    where, _, rest = reference.partition(":")
    value = _from_file(name, rest) if where == "file" else _ask(name, where, rest, environment)
    if "\0" in value or not value:
        raise UsageError(f"secret {name}: what {where} holds cannot be an environment variable")
    return value


def patterns_of(values: Mapping[str, str]) -> list[str]:
    """What must not be seen: the values and their longer lines, the longest first."""
    found = {
        each for value in values.values() for each in (value, *value.splitlines()) if each == value or len(each) >= 6
    }
    return sorted(found, key=lambda each: (-len(each), each))


def hide(text: str, values: Mapping[str, str]) -> str:
    """The text without the values, for what people are shown."""
    for each in patterns_of(values):
        text = text.replace(each, "***")
    return text


class Hider:
    """The same for output that comes in pieces, wherever it is cut. Thread safety: none."""

    def __init__(self, values: Mapping[str, str]) -> None:
        patterns = sorted((each.encode() for each in patterns_of(values)), key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, patterns))) if patterns else None
        self._held_back = len(patterns[0]) - 1 if patterns else 0
        self._waiting = b""

    def pass_on(self, data: bytes, *, is_last: bool = False) -> bytes:
        """What may be shown by now. The end waits for what may make a secret of it, until `is_last`."""
        data = self._waiting + data
        # Where fewer bytes follow than the longest pattern has, a longer one than the one that is found may still come.
        limit = len(data) if is_last else max(0, len(data) - self._held_back)
        shown, place = [], 0
        while self._pattern is not None and (found := self._pattern.search(data, place)) and found.start() < limit:
            shown += [data[place : found.start()], b"***"]
            place = found.end()
        end = max(place, limit)
        self._waiting = data[end:]
        return b"".join((*shown, data[place:end]))


def _from_file(name: str, path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"secret {name}: {path} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077 or about.st_uid not in (0, os.geteuid()):
            raise UsageError(
                f"secret {name}: {path} must be a plain file of this user's or root's, closed to all others: chmod 600"
            )
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UsageError(f"secret {name}: {path} has more than {_MOST_BYTES} bytes")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError(f"secret {name}: {path} is not UTF-8 text") from None


def _ask(name: str, where: str, rest: str, environment: Mapping[str, str]) -> str:
    command = _command(where, rest)
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, stdin=subprocess.DEVNULL, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        said = getattr(error, "strerror", None) or f"no answer within {_ASK_S:g} s"
        raise HoldfastError(f"secret {name}: {command[0]} cannot be asked: {said}") from None
    if done.returncode:
        # The error's text is the tool's; the value is on the other stream.
        raise HoldfastError(f"secret {name}: {' '.join(done.stderr.decode(errors='replace').split())[-300:]}")
    return done.stdout.decode(errors="replace").removesuffix("\n")


def _command(where: str, rest: str) -> list[str]:
    if where == "aws-secret":
        asked = ["secretsmanager", "get-secret-value", "--secret-id", rest, "--query", "SecretString"]
        return ["aws", *asked, "--output", "text"]
    if where == "aws-parameter":
        asked = ["ssm", "get-parameter", "--with-decryption", "--name", rest, "--query", "Parameter.Value"]
        return ["aws", *asked, "--output", "text"]
    found = re.fullmatch(r"(?:projects/([a-z0-9-]+)/secrets/)?([^/]+)(?:/versions/([^/]+))?", rest)
    if where != "gcp-secret" or found is None:
        raise UsageError(f"no such place for a secret: {where}")
    project = [] if found[1] is None else ["--project", found[1]]
    return ["gcloud", "secrets", "versions", "access", found[3] or "latest", "--secret", found[2], *project]
