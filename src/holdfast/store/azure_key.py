"""Signs a request to Azure Blob Storage with the account's key, for the few questions that the client cannot ask.

The key never leaves this machine: what is sent is a signature of the request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from email.utils import formatdate
from urllib.parse import parse_qsl, urlsplit

from holdfast.core.errors import UsageError

__all__ = ["API_VERSION", "signed_headers"]

API_VERSION = "2021-12-02"

_UNSENT = ("", "")
"""Content-Encoding and Content-Language: covered by a signature, and not sent by these requests; …"""
_UNSENT_AFTER_LENGTH = ("",) * 8
"""… as are Content-MD5, Content-Type, Date, four conditions and Range."""


def signed_headers(
    account: str, key: str, method: str, url: str, *, unix_s: float, body_bytes: int = 0
) -> Mapping[str, str]:
    """The headers of a request with so many bytes of body. Raises UsageError when `key` is not base64."""
    ours = {"x-ms-date": formatdate(unix_s, usegmt=True), "x-ms-version": API_VERSION}
    parts = urlsplit(url)
    query = sorted((name.lower(), value) for name, value in parse_qsl(parts.query, keep_blank_values=True))
    lines = [
        method,
        *_UNSENT,
        str(body_bytes or ""),
        *_UNSENT_AFTER_LENGTH,
        *[f"{name}:{value}" for name, value in sorted(ours.items())],
        f"/{account}{parts.path}",
        *[f"{name}:{value}" for name, value in query],
    ]
    try:
        secret = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the account key of the Azure storage account is not base64") from None
    signature = base64.b64encode(hmac.digest(secret, "\n".join(lines).encode(), hashlib.sha256)).decode()
    return {**ours, "Authorization": f"SharedKey {account}:{signature}"}
