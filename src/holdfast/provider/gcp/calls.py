"""Calls of Google's APIs, through their own client library; the one module that imports it, and only when a call is made.

    call("compute", "instances.insert", project=…, body=…) ──→ JSON | Refused (an answer) | Unanswered (none: who knows) | NotSent

`google-api-python-client` sends JSON as it is given, has no retries of its own above the connection, invents no request ids,
and ships the published descriptions of all the APIs that are needed here. A connection that breaks before an answer comes is
tried once more by the HTTP library beneath, with the same bytes: with the same request id, therefore.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.core.errors import HoldfastError, ProviderError, UsageError
from holdfast.provider.gcp.answers import Refusal, refusal_of_body

__all__ = ["Calls", "NotSent", "Refused", "Unanswered", "provider_error"]

_VERSIONS = {"compute": "v1", "cloudbilling": "v1", "cloudresourcemanager": "v1", "storage": "v1", "iam": "v1"}
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_PARTIAL = ("UNREACHABLE", "PARTIAL_SUCCESS", "LIST_OVERHEAD_QUOTA_EXCEED")


class _Failed(HoldfastError):
    """Never leaves this package."""


class Refused(_Failed):
    """An answer, and it is no."""

    def __init__(self, what: str, refusal: Refusal) -> None:
        super().__init__(f"{what}: {refusal}")
        self.refusal = refusal


class Unanswered(_Failed):
    """It may have been sent, and may have been done."""


class NotSent(_Failed):
    """There are no credentials to send it with."""


class Calls:
    """Thread safety: every method. Connections are kept and shared; `close` ends them."""

    def __init__(
        self, *, credentials: Any = None, endpoints: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> None:
        """`credentials`: of google-auth; None: the application-default ones. `endpoints`: other addresses, by the API's name."""
        self._credentials, self._endpoints, self._timeout_s = credentials, dict(endpoints or {}), timeout_s
        self._project: str | None = None
        self._resources: dict[tuple[str, ...], Any] = {}
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def call(self, api: str, method: str, **parameters: Any) -> dict[str, Any]:
        """One request. `method` as in the API's description: `instances.insert`. Raises one of the three above."""
        return self._execute(f"{api}.{method}", self._request(api, method, parameters))

    def pages(self, api: str, method: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """All pages of a list. ProviderError for a list that says itself that it is not whole: what it leaves out may be there."""
        what, token = f"{api}.{method}", None
        while True:
            more: dict[str, Any] = {} if token is None else {"pageToken": token}
            page = self.call(api, method, **parameters, **more)
            _check_whole(what, page)
            yield page
            token = page.get("nextPageToken")
            if not token:
                return

    def project(self) -> str:
        """Of the credentials. UsageError when they name none."""
        self._authorise()
        if not self._project:
            raise UsageError("which project of GCP? Name it, or set GOOGLE_CLOUD_PROJECT")
        return self._project

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.http.close()

    def _request(self, api: str, method: str, parameters: dict[str, Any]) -> Any:
        *folders, verb = method.split(".")
        return getattr(self._resource((api, *folders)), verb)(**parameters)

    def _resource(self, path: tuple[str, ...]) -> Any:
        """`("compute", "instances")`. Kept: the library puts all methods of a resource together anew whenever it is asked for."""
        if path not in self._resources:
            found = self._service(path[0]) if len(path) == 1 else getattr(self._resource(path[:-1]), path[-1])()
            with self._lock:
                self._resources[path] = found
        return self._resources[path]

    def _service(self, api: str) -> Any:
        discovery, httplib2 = _import("googleapiclient.discovery"), _import("httplib2")
        options = {"api_endpoint": self._endpoints[api]} if api in self._endpoints else {}
        # The connection given here is never used: each call brings one of its own.
        return discovery.build(
            api, _VERSIONS[api], http=httplib2.Http(), cache_discovery=False, static_discovery=True,
            client_options=options,
        )  # fmt: skip

    def _execute(self, what: str, request: Any) -> dict[str, Any]:
        errors, auth = _import("googleapiclient.errors"), _import("google.auth.exceptions")
        connection = self._connection()
        try:
            answer = request.execute(http=connection, num_retries=0)
        except errors.HttpError as error:
            self._give_back(connection)
            status, retry_after = int(error.resp.status), error.resp.get("retry-after")
            raise Refused(what, refusal_of_body(status, error.content, retry_after)) from error
        except auth.GoogleAuthError as error:
            connection.http.close()
            raise NotSent(f"{what}: {error}") from error
        except (
            OSError,
            http.client.HTTPException,
            _import("httplib2").HttpLib2Error,
            ValueError,
            errors.Error,
        ) as error:
            connection.http.close()
            raise Unanswered(f"{what}: {type(error).__name__}: {error}") from error
        except BaseException:
            connection.http.close()
            raise
        self._give_back(connection)
        return dict(answer) if answer else {}

    def _connection(self) -> Any:
        self._authorise()
        with self._lock:
            if self._idle:
                return self._idle.pop()
        http = _import("httplib2").Http(timeout=self._timeout_s)
        return _import("google_auth_httplib2").AuthorizedHttp(self._credentials, http=http)

    def _give_back(self, connection: Any) -> None:
        with self._lock:
            self._idle.append(connection)

    def _authorise(self) -> None:
        with self._lock:
            if self._credentials is None:
                auth = _import("google.auth")
                try:
                    self._credentials, self._project = auth.default(scopes=[_SCOPE])
                except auth.exceptions.GoogleAuthError as error:
                    raise NotSent(f"there are no credentials for GCP: {error}") from error


def provider_error(what: str, error: _Failed) -> ProviderError:
    """For all but `create`."""
    return ProviderError(f"GCP: {what}: {error}")


def _check_whole(what: str, page: Mapping[str, Any]) -> None:
    scopes = page.get("items")
    warnings = (
        [page.get("warning"), *(each.get("warning") for each in scopes.values())] if isinstance(scopes, dict) else []
    )
    partial = [warning for warning in warnings if warning and warning.get("code") in _PARTIAL]
    if page.get("unreachables") or partial:
        said = ", ".join(page.get("unreachables") or [str(each.get("message", each["code"])) for each in partial])
        raise ProviderError(f"GCP: {what}: the list is not whole ({said}); what it leaves out may be there")


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError("machines of GCP need Google's client library: pip install 'holdfast[gcp]'") from error
