"""One request to a metadata server, with a limit on everything: time in total, size of the answer, kinds of failure.

Metadata servers stall, drip, answer with other people's HTML and vanish. Whatever happens, `ask` returns a `Reply` or raises
`Unheard`, after `timeout_s` at the latest. The transport is used directly: no proxies from the environment, no redirects, no
cookies, and no line in the user's log for each poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

__all__ = ["Fetch", "Reply", "Unheard"]

_MAX_BODY_BYTES = 256 * 1024
"""Azure lists the events of a whole scale set in one answer; everything else is a few hundred bytes."""
_SHOWN_CHARACTERS = 80


class Unheard(Exception):
    """The server gave no usable answer; the text says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    text: str

    def shown(self) -> str:
        """Status and the begin of the body on one line, for records."""
        body = " ".join(self.text[:_SHOWN_CHARACTERS].split())
        return f"status {self.status}, body {body!r}"


class Fetch:
    """Connections to one endpoint, kept between requests.

    Thread safety: for one event loop. Ownership: whoever made it closes it; it opens again when it is used after that.
    """

    def __init__(self, endpoint: str, *, timeout_s: float) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._transport: httpx.AsyncHTTPTransport | None = None

    async def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """Make the request. Raises Unheard when there is no whole answer within `timeout_s`."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(method, path, headers, params, body, limit_s)
        except Unheard:
            raise
        except TimeoutError:
            raise Unheard(f"no answer within {limit_s:g} s") from None
        except (
            Exception
        ) as error:  # Whatever a broken peer or endpoint provokes below is the same to us: nothing was heard.
            raise Unheard(f"{type(error).__name__}: {str(error)[:_SHOWN_CHARACTERS]}") from error

    async def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
        body: bytes | None,
        limit_s: float,
    ) -> Reply:
        import httpx

        if self._transport is None:
            self._transport = httpx.AsyncHTTPTransport(verify=self.endpoint.startswith("https:"), trust_env=False)
        request = httpx.Request(
            method,
            self.endpoint + path,
            headers={"Accept-Encoding": "identity", **headers},
            params=params,
            content=body,
            extensions={"timeout": httpx.Timeout(limit_s).as_dict()},
        )
        response = await self._transport.handle_async_request(request)
        try:
            received = bytearray()
            async for part in response.aiter_raw():
                received += part
                if len(received) > _MAX_BODY_BYTES:
                    raise Unheard(f"an answer of more than {_MAX_BODY_BYTES} bytes, which is no metadata")
            fields = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status_code, fields, received.decode("utf-8", "replace"))
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close the connections. Never raises."""
        transport, self._transport = self._transport, None
        if transport is not None:
            try:
                await transport.aclose()
            except Exception:  # A peer that breaks while we hang up changes nothing.
                return
