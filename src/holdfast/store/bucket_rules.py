"""What a bucket's own rules say about the objects of a run, asked of each cloud in its own way.

An answer to a request for an object tells most of it, whatever the credentials are: the version it was given, how it was
deleted, when it will expire. Only Google Cloud Storage, and the number of days in Azure, need a look at the bucket or account.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import obstore

from holdfast.core.clock import Clock
from holdfast.store.azure_key import signed_headers
from holdfast.store.redaction import redact
from holdfast.store.remote import ObjectStore

__all__ = ["bucket_rules"]

_ANSWER_S = 5.0
_MOST_ANSWER_BYTES = 2**20
_SIGNED_FOR_S = 60
_GOOGLE_API = "https://storage.googleapis.com"
_GOOGLE_TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
_AZURE_SOFT_DELETE = re.compile(
    r"<DeleteRetentionPolicy>(?:(?!</DeleteRetentionPolicy>).)*<Enabled>true</Enabled>"
    r"(?:(?!</DeleteRetentionPolicy>).)*<Days>(\d+)</Days>",
    re.DOTALL,
)
_S3_EXPIRY = re.compile(r'expiry-date="([^"]+)"(?:, rule-id="([^"]*)")?')
_OF_OLD_VERSIONS = frozenset({"daysSinceNoncurrentTime", "noncurrentTimeBefore", "numNewerVersions"})


def bucket_rules(store: ObjectStore, key: str, clock: Clock) -> Iterator[str]:
    """One sentence for each rule that keeps what is deleted, or deletes what is kept. Writes `key`, and may leave it behind.

    Raises whatever goes wrong; sentences that were found before stay true.
    """
    return _ASK[store.url.split("://", 1)[0]](store, key, clock)


def _amazon(store: ObjectStore, key: str, clock: Clock) -> Iterator[str]:
    if _version(store, key) not in (None, "null"):
        yield (
            "the bucket keeps old versions, so checkpoints that are deleted stay there and are billed until a lifecycle "
            "rule expires noncurrent versions; add such a rule, or turn versioning off for this bucket"
        )
    headers = _signed(store, "GET", key)
    expiry = _S3_EXPIRY.search(headers.get("x-amz-expiration", ""))
    if expiry:
        rule = redact(expiry.group(2) or "")
        yield _deletes_ours(f"the lifecycle rule {rule!r}", f"the first on {redact(expiry.group(1))}")
    until = headers.get("x-amz-object-lock-retain-until-date")
    if until:
        yield _kept_by_rule(f"object lock keeps what is written now until {redact(until)}")


def _azure(store: ObjectStore, key: str, clock: Clock) -> Iterator[str]:
    if _version(store, key) is not None:
        yield (
            "the storage account keeps old versions, so checkpoints that are deleted stay there and are billed until a "
            "lifecycle rule removes previous versions; add such a rule, or turn versioning off"
        )
    days = _azure_soft_delete_days(store, key, clock)
    deleted = _signed(store, "DELETE", key)
    if days or deleted.get("x-ms-delete-type-permanent") == "false":
        yield _soft_delete(f"{days} days" if days else "as many days as the storage account says")


def _google(store: ObjectStore, key: str, clock: Clock) -> Iterator[str]:
    bucket, _, prefix = store.url.removeprefix("gs://").partition("/")
    endpoint, headers = _google_access(store.client().config)
    wanted = "softDeletePolicy,versioning,retentionPolicy,lifecycle"
    answer = _ask("GET", f"{endpoint}/storage/v1/b/{quote(bucket, safe='')}?fields={wanted}", headers)
    about: dict[str, Any] = json.loads(answer[1])
    kept_s = int(about.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
    if kept_s:
        yield _soft_delete(f"{kept_s / 86400:g} days")
    if about.get("versioning", {}).get("enabled"):
        yield (
            "the bucket keeps old versions, so checkpoints that are deleted stay there and are billed until a lifecycle "
            "rule removes noncurrent versions; add such a rule, or turn object versioning off"
        )
    locked_s = int(about.get("retentionPolicy", {}).get("retentionPeriod", 0))
    if locked_s:
        yield _kept_by_rule(f"the bucket's retention policy keeps every object for {locked_s / 86400:g} days")
    for rule in about.get("lifecycle", {}).get("rule", ()):
        when = rule.get("condition", {})
        prefixes = when.get("matchesPrefix") or [""]
        of_live = when.get("isLive") is not False and not _OF_OLD_VERSIONS & when.keys()
        of_run = any(named.startswith(prefix) or prefix.startswith(named) for named in prefixes)
        if rule.get("action", {}).get("type") == "Delete" and of_live and of_run:
            yield _deletes_ours("a lifecycle rule", f"under the condition {redact(json.dumps(when))}")
            return


_ASK = {"s3": _amazon, "az": _azure, "gs": _google}


def _soft_delete(how_long: str) -> str:
    return (
        f"deleted objects are kept (soft delete) and billed for {how_long}; for checkpoints that are replaced every few "
        "minutes this can cost many times the run's own storage. Turn soft delete off for this bucket, or use another"
    )


def _kept_by_rule(what: str) -> str:
    return f"{what}: older checkpoints cannot be removed before, and are billed until then"


def _deletes_ours(what: str, when: str) -> str:
    return (
        f"{what} of the bucket deletes this run's objects, {when}: checkpoints that are still needed would be lost. "
        "Exclude this prefix from the rule"
    )


def _version(store: ObjectStore, key: str) -> str | None:
    """The version that a new object is given: None where the bucket has never kept versions."""
    return obstore.put(store.client(), key, b"holdfast", use_multipart=False)["version"]


def _signed(store: ObjectStore, method: Any, key: str) -> Mapping[str, str]:
    """The headers of the answer to a signed request for one object; none where signing or the request fails."""
    try:
        return _ask(method, obstore.sign(store.client(), method, key, timedelta(seconds=_SIGNED_FOR_S)), {})[0]
    except Exception:  # Some credentials cannot sign, some servers refuse signed URLs: then less is known.
        return {}


def _azure_soft_delete_days(store: ObjectStore, key: str, clock: Clock) -> int:
    """Known where the account's key is; 0 where it is not, or soft delete is off."""
    settings: Mapping[str, Any] = store.client().config
    account = settings.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    secret = settings.get("account_key") or os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    if not account or not secret:
        return 0
    # The client knows where the account is; its signed URL of an object is the account's, the container, and the key.
    signed = obstore.sign(store.client(), "GET", key, timedelta(seconds=_SIGNED_FOR_S)).split("?", 1)[0]
    base = signed.removesuffix(f"/{store.url.removeprefix('az://')}/{key}")
    url = f"{base}/?restype=service&comp=properties"
    try:
        headers = signed_headers(account, secret, "GET", url, unix_s=clock.unix_s())
        enabled = _AZURE_SOFT_DELETE.search(_ask("GET", url, headers)[1].decode(errors="replace"))
    except OSError:
        return 0
    return int(enabled.group(1)) if enabled else 0


def _google_access(settings: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
    """Where the JSON API is, and the headers that open it: the machine's own identity, unless a key file replaces it."""
    key = json.loads(settings.get("service_account_key") or os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY") or "{}")
    named = settings.get("base_url") or os.environ.get("GOOGLE_BASE_URL") or key.get("gcs_base_url") or _GOOGLE_API
    if key.get("disable_oauth"):
        return named, {}
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    said = _ask("GET", f"http://{host}{_GOOGLE_TOKEN_PATH}", {"Metadata-Flavor": "Google"}, through_proxy=False)
    return named, {"Authorization": f"Bearer {json.loads(said[1])['access_token']}"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An answer that leads elsewhere would take our authorization along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(
    method: str, url: str, headers: Mapping[str, str], *, through_proxy: bool = True
) -> tuple[Mapping[str, str], bytes]:
    """The answer's headers, by lower-case name, and body. Raises OSError for every status but success."""
    proxies: dict[str, str] | None = None if through_proxy else {}
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler(proxies))
    request = urllib.request.Request(url, method=method, headers=dict(headers))
    try:
        with opener.open(request, timeout=_ANSWER_S) as answer:
            named = {name.lower(): value for name, value in answer.headers.items()}
            return named, answer.read(_MOST_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"the server answered {error.code}") from None
