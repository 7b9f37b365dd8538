"""From what a user types as the run's URL to a store: `./runs/x`, `file:///…`, `s3://…`, `gs://…`, `az://…`, `memory://…`.

Credentials and endpoints come from `options` or from the environment variables that the clouds' own tools read, never from the
URL, which is logged, stored and compared. The cloud client is imported only when a cloud URL is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from holdfast.core.errors import UsageError
from holdfast.store.base import Store
from holdfast.store.local import LocalStore
from holdfast.store.memory import MemoryStore
from holdfast.store.redaction import redact, secrets_among

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

__all__ = ["normalise_url", "open_store"]

_SCHEMES = {
    "file": "file", "memory": "memory", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az",
}  # fmt: skip
_KNOWN = (
    "./folder, /folder, file:///folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, memory://name"
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(rf"({'|'.join(_SCHEMES)}):(?!//)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,221}")

_ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL", "GOOGLE_STORAGE_BASE_URL"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_ENDPOINT_OPTIONS = ("endpoint", "endpoint_url", "aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint", "base_url")

_RETRY_FOR_S = 150.0
"""No retry starts later than this after a call began; with the longest pause between two tries that is under three minutes."""
_MOST_RETRIES = 10


def open_store(url: str, *, options: Mapping[str, str] | None = None) -> Store:
    """The store at `url`. Nothing is read or written yet: a wrong bucket or credential shows at the first call.

    `options` are the cloud client's own settings (`endpoint`, `region`, `access_key_id`, `account_name`, …) and go before
    the environment. Raises UsageError for a URL or an option that makes no sense.
    """
    canonical = normalise_url(url)
    scheme, rest = canonical.split("://", 1)
    if scheme == "file":
        return LocalStore(Path(unquote(rest)))
    if scheme == "memory":
        return MemoryStore(rest)
    return _open_remote(canonical, scheme, rest, dict(options or {}))


def normalise_url(url: str) -> str:
    """The one spelling of a URL that identifies a run: absolute, without trailing slashes, and free of credentials."""
    matched = _URL.fullmatch(url)
    if matched is None:
        if not url or _ONE_SLASH.match(url):
            raise UsageError(f"not a run's URL: {redact(url)!r}; known forms: {_KNOWN}")
        return _file_url(url)
    scheme, rest = _SCHEMES.get(matched.group(1).lower()), matched.group(2)
    if scheme is None:
        raise UsageError(f"unknown kind of store {matched.group(1)!r}; known forms: {_KNOWN}")
    if scheme == "file":
        if rest.startswith("localhost/"):
            rest = rest.removeprefix("localhost")
        if not rest.startswith("/"):
            raise UsageError("a file URL has three slashes: file:///folder")
        return _file_url(unquote(rest))
    if "@" in rest or "?" in rest or "#" in rest:
        raise UsageError(
            f"a {scheme}:// URL holds a bucket and a prefix and nothing else; credentials and settings belong in the "
            "environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, …)"
        )
    parts = rest.rstrip("/").split("/")
    if not _NAME.fullmatch(parts[0]) or any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"not a bucket and a prefix: {redact(url)!r}; known forms: {_KNOWN}")
    return f"{scheme}://{'/'.join(parts)}"


def _file_url(path: str) -> str:
    if "\0" in path:
        raise UsageError("a path cannot hold a zero byte")
    return "file://" + quote(os.path.abspath(os.path.expanduser(path)).replace("//", "/"))


def _open_remote(url: str, scheme: str, rest: str, options: dict[str, str]) -> Store:
    from holdfast.store.remote import ObjectStore

    bucket, _, prefix = rest.partition("/")
    secrets = secrets_among(options, os.environ)
    endpoint = _endpoint(scheme, options)

    def connect(timeout_s: float) -> S3Store | GCSStore | AzureStore:
        return _client(scheme, bucket, prefix, options, endpoint, timeout_s)

    try:
        connect(30.0)
    except Exception as error:
        said = redact(str(error).split("\n\nDebug source", 1)[0], secrets)
        raise UsageError(f"{url} cannot be opened with these settings: {said}") from None
    return ObjectStore(url, connect, secrets=secrets)


def _client(
    scheme: str, bucket: str, prefix: str, options: Mapping[str, str], endpoint: str | None, timeout_s: float
) -> S3Store | GCSStore | AzureStore:
    from obstore.store import AzureStore, GCSStore, S3Store

    settings: dict[str, Any] = dict(options)
    if scheme == "s3" and endpoint and not any(name in settings for name in _ENDPOINT_OPTIONS):
        settings["endpoint"] = endpoint
    allow_http = (endpoint or "").startswith("http://")
    network: ClientConfig = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=10),
        "allow_http": allow_http,
    }
    retry: RetryConfig = {"max_retries": _MOST_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_FOR_S)}
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    made: S3Store | GCSStore | AzureStore = kind(
        bucket, prefix=prefix or None, config=settings, client_options=network, retry_config=retry
    )
    return made


def _endpoint(scheme: str, options: Mapping[str, str]) -> str | None:
    """Where the service is, if not at the cloud's own address. Plain http is allowed exactly where the user wrote it."""
    named = [options.get(name) for name in _ENDPOINT_OPTIONS]
    named += [os.environ.get(name) for name in _ENDPOINT_VARIABLES[scheme]]
    return next((value for value in named if value), None)
