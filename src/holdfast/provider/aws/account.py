"""The AWS SDK, and the only place that touches it: clients, calls, and what an error says about whether a call was carried out.

    ask, ask_all     look, and what is harmless to repeat: the SDK tries again by itself
    once             makes something: sent at most once, with a token of ours wherever AWS takes one

boto3 is imported when the first client is made, so that `import holdfast` is quick and works without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from threading import Lock
from typing import Any

from holdfast.core.errors import ProviderError, UsageError

__all__ = ["THROTTLES", "Account", "Refused", "Unanswered"]

THROTTLES = frozenset(
    {
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_CONNECT_S, _READ_S = 10.0, 60.0
_BEFORE_SENDING = (
    "ConnectTimeoutError",
    "CredentialRetrievalError",
    "EndpointConnectionError",
    "NoCredentialsError",
    "NoRegionError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ProxyConnectionError",
    "SSOError",
    "TokenRetrievalError",
)


class Refused(ProviderError):
    """AWS has answered with an error."""

    def __init__(self, operation: str, region: str, code: str, said: str) -> None:
        super().__init__(f"AWS refuses {operation} in {region}: {code}: {said}")
        self.operation, self.code, self.said = operation, code, said


class Unanswered(ProviderError):
    """There is no answer that says what became of the call. `sent`: it may have been carried out."""

    def __init__(self, operation: str, region: str, said: str, *, sent: bool) -> None:
        super().__init__(f"no answer from AWS to {operation} in {region}: {said}")
        self.operation, self.sent = operation, sent


class Account:
    """One account: clients by service and region, made when they are needed. `answer_within_s`: what is sent once may take so long,
    then its outcome is unknown. Thread safety: any thread."""

    def __init__(
        self,
        *,
        session: Any = None,
        endpoint: str | None = None,
        answer_within_s: float = 120.0,
    ) -> None:
        self._session, self._endpoint, self._answer_within_s = session, endpoint, answer_within_s
        self._clients: dict[tuple[str, str, bool], Any] = {}
        self._lock = Lock()

    def close(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def ask(self, service: str, region: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """One call. Refused, Unanswered."""
        return self._call(self._client(service, region, once=False), region, operation, parameters, once=False)

    def ask_all(self, service: str, region: str, operation: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        """A list with as many pages as there are; `key` names the list in each of them."""
        client = self._client(service, region, once=False)
        pages = client.get_paginator(_method(client, operation)).paginate(**parameters)
        found: list[dict[str, Any]] = []
        try:
            for page in pages:
                found.extend(page.get(key) or ())
        except Exception as error:
            raise _translated(error, operation, region, once=False) from error
        return found

    def once(self, service: str, region: str, operation: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Send it, at most once. The SDK would invent a token where one is missing; then nothing is sent at all."""
        client = self._client(service, region, once=True)
        model = client.meta.service_model.operation_model(operation)
        missing = [member for member in model.idempotent_members if not parameters.get(member)]
        if missing:
            raise UsageError(f"{operation} needs {', '.join(missing)}: without it a repeated call would act twice")
        return self._call(client, region, operation, parameters, once=True)

    def _call(
        self, client: Any, region: str, operation: str, parameters: Mapping[str, Any], *, once: bool
    ) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(client, _method(client, operation))(**parameters)
        except Exception as error:
            raise _translated(error, operation, region, once=once) from error
        return answer

    def _client(self, service: str, region: str, *, once: bool) -> Any:
        with self._lock:
            client = self._clients.get((service, region, once))
            if client is None:
                if self._session is None:
                    self._session = _boto("boto3").session.Session()
                # How often to ask again is the user's own setting (AWS_MAX_ATTEMPTS), but for what is sent once.
                retries = {"retries": {"total_max_attempts": 1, "mode": "standard"}} if once else {}
                config = _boto("botocore.config").Config(
                    connect_timeout=_CONNECT_S, read_timeout=self._answer_within_s if once else _READ_S, **retries
                )
                client = self._session.client(service, region_name=region, endpoint_url=self._endpoint, config=config)
                self._clients[service, region, once] = client
            return client


def _boto(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"AWS needs boto3, which is not installed: pip install 'holdfast[aws]' ({error})") from error


def _method(client: Any, operation: str) -> str:
    methods: Mapping[str, str] = client.meta.method_to_api_mapping
    return next(method for method, name in methods.items() if name == operation)


def _translated(error: Exception, operation: str, region: str, *, once: bool) -> Exception:
    """One of our errors; an error that is not the SDK's stays what it is."""
    kinds = _boto("botocore.exceptions")
    if isinstance(error, kinds.ClientError):
        answer: Mapping[str, Any] = error.response  # type: ignore[attr-defined,unused-ignore]
        said = answer.get("Error", {})
        code, message = str(said.get("Code", "")), str(said.get("Message", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if once and status >= 500 and code not in THROTTLES:
            return Unanswered(operation, region, f"{status} {code}: {message}", sent=True)
        return Refused(operation, region, code, message)
    if isinstance(error, kinds.ParamValidationError):
        return UsageError(f"{operation} cannot be asked for like this: {error}")
    if isinstance(error, (kinds.BotoCoreError, kinds.HTTPClientError)):
        before = tuple(kind for name in _BEFORE_SENDING if isinstance(kind := getattr(kinds, name, None), type))
        return Unanswered(operation, region, str(error), sent=not isinstance(error, before))
    if type(error).__module__.startswith("botocore"):
        return Unanswered(operation, region, f"{type(error).__name__}: {error}", sent=True)
    return error
