"""Keeps credentials out of error texts: nothing that a cloud's client says reaches a message or a log without passing here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["redact", "secrets_among"]

_HIDDEN = "[hidden]"
_SHORTEST_SECRET = 4
_MOST_CHARACTERS = 600

_SECRET_NAME = re.compile(r"key|secret|token|sas|password|credential|signature", re.IGNORECASE)
_CLOUD_NAME = re.compile(r"(AWS|AZURE|GOOGLE|GCS|GCP)_", re.IGNORECASE)

_SHAPES = (
    # user:password@ in a URL.
    (re.compile(r"(?<=://)[^/@\s\"']+@"), f"{_HIDDEN}@"),
    # The query of a URL: signed requests carry their signature there.
    (re.compile(r"(?<=[\w/%.-])\?[\w.%~-]+(?:=[^\s\"'<>)]*)?"), f"?{_HIDDEN}"),
    # Elements of an error document that repeat parts of the signed request.
    (
        re.compile(
            r"<(AWSAccessKeyId|SignatureProvided|StringToSign\w*|CanonicalRequest\w*|AuthenticationErrorDetail)>"
            r".*?(?:</\1>|\Z)",
            re.DOTALL,
        ),
        rf"<\1>{_HIDDEN}</\1>",
    ),
    # Access key ids, and what follows a scheme of authorization.
    (re.compile(r"\b(?:AKIA|ASIA|AROA|GOOG)[0-9A-Z]{8,}\b"), _HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic|sharedkey)\s+[\w.~+/:=-]{8,}"), rf"\1 {_HIDDEN}"),
    (re.compile(r"\bya29\.[\w-]+|\beyJ[\w-]{8,}(?:\.[\w-]+)*"), _HIDDEN),
    (
        re.compile(r"(?i)\b((?:x-amz-)?(?:signature|security-token|credential)|sig|sas_?token)\s*[=:]\s*[^\s&,\"'<>]+"),
        rf"\1={_HIDDEN}",
    ),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` in one line, shortened, without the given secrets and without anything shaped like a credential."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"


def secrets_among(options: Mapping[str, str], environment: Mapping[str, str]) -> frozenset[str]:
    """The values that must never be shown: options and cloud variables whose names say that they are credentials."""
    named = [value for name, value in options.items() if _SECRET_NAME.search(name)]
    named += [value for name, value in environment.items() if _CLOUD_NAME.match(name) and _SECRET_NAME.search(name)]
    # A path to a file of credentials is no secret, and hiding it would make the message useless.
    return frozenset(value for value in named if len(value) >= _SHORTEST_SECRET and not value.startswith("/"))
