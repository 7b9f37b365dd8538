"""Google Cloud Storage's XML API, which the client speaks, translated into the JSON API, which the emulator understands.

The emulator's own handling of the client's requests is not usable: an unsigned `PUT /bucket/object` gets 400 "invalid
uploadType" (it takes such a PUT only with a signature in the query, and then ignores the condition), an upload with
`uploadType=media` ignores `ifGenerationMatch`, `DELETE /bucket/object` is not routed, and its XML lists know no pages. Only a
multipart upload enforces the condition, so that is what every PUT becomes; lists are cut into pages of `_PAGE_ENTRIES`.

What passes here is proved about the client and this project: the requests' form, the condition `x-goog-if-generation-match: 0`
(enforced by the emulator, atomically), ranges, pages, and how answers are understood. What is *not*: authentication, that the
real service words its answers as this file does (they follow its documentation), its limit of about one write a second to
one name, throttling, and its consistency. Anything that this file does not know is answered 501, so that a new kind of request
cannot pass unseen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

from holdfast.testing.loopback import Answer, Request, forward, listening, reply

__all__ = ["gcs_front"]

_PAGE_ENTRIES = 300
_BOUNDARY = "holdfast-part-boundary-5f0c8d1e"
_XML = ("Content-Type", "application/xml; charset=UTF-8")


@contextmanager
def gcs_front(behind: str) -> Iterator[str]:
    """The endpoint of a front for the emulator at `behind`."""

    def handle(request: Request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        reply(request, _answer(behind, request, body))

    with listening(handle) as endpoint:
        yield endpoint


def _answer(behind: str, request: Request, body: bytes) -> Answer:
    parts = urlsplit(request.path)
    if parts.path.startswith("/storage/v1/"):  # The JSON API itself.
        return forward(behind, request.command, request.path, request.headers.items(), body)
    bucket, _, key = unquote(parts.path.removeprefix("/")).partition("/")
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    match request.command:
        case "PUT" if key and not query:
            return _put(behind, bucket, key, request.headers.get("x-goog-if-generation-match"), body)
        case "GET" | "HEAD" if key and not query:
            return _get(behind, bucket, key, request)
        case "GET" if not key and query.get("list-type") == "2":
            return _list(behind, bucket, query)
        case "DELETE" if key and not query:
            return _delete(behind, bucket, key)
    return _error(501, "NotImplemented")


def _put(behind: str, bucket: str, key: str, generation: str | None, body: bytes) -> Answer:
    query = {"uploadType": "multipart"} | ({} if generation is None else {"ifGenerationMatch": generation})
    metadata = json.dumps({"name": key, "contentType": "application/octet-stream"}).encode()
    mark = f"--{_BOUNDARY}".encode()
    parts = (
        mark + b"\r\nContent-Type: application/json\r\n\r\n" + metadata,
        mark + b"\r\nContent-Type: application/octet-stream\r\n\r\n" + body,
        mark + b"--\r\n",
    )
    said = forward(
        behind,
        "POST",
        f"/upload/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode(query)}",
        [("Content-Type", f"multipart/related; boundary={_BOUNDARY}")],
        b"\r\n".join(parts),
    )
    if said.status != 200:
        return _error_of(said)
    made = json.loads(said.body)
    return Answer(200, (("ETag", f'"{made["etag"]}"'), ("x-goog-generation", made["generation"])))


def _get(behind: str, bucket: str, key: str, request: Request) -> Answer:
    wanted = [("Range", request.headers["Range"])] if "Range" in request.headers else []
    answer = forward(behind, request.command, f"/{quote(bucket, safe='')}/{quote(key)}", wanted)
    return answer if answer.status in (200, 206) else _error_of(answer)


def _list(behind: str, bucket: str, query: dict[str, str]) -> Answer:
    asked = {"maxResults": str(_PAGE_ENTRIES), "prefix": query.get("prefix", "")}
    if "continuation-token" in query:
        asked["pageToken"] = query["continuation-token"]
    said = forward(behind, "GET", f"/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode(asked)}", [])
    if said.status != 200:
        return _error_of(said)
    page = json.loads(said.body)
    token = page.get("nextPageToken", "")
    more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    document = (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://doc.s3.amazonaws.com/2006-03-01">'
        f"<Name>{escape(bucket)}</Name><Prefix>{escape(asked['prefix'])}</Prefix>"
        f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>{more}"
        f"{''.join(map(_listed, page.get('items', ())))}</ListBucketResult>"
    )
    return Answer(200, (_XML,), document.encode())


def _listed(item: dict[str, Any]) -> str:
    return (
        f"<Contents><Key>{escape(item['name'])}</Key><Generation>{item['generation']}</Generation>"
        f"<LastModified>{item['updated']}</LastModified><ETag>{escape(item['etag'])}</ETag><Size>{item['size']}</Size></Contents>"
    )


def _delete(behind: str, bucket: str, key: str) -> Answer:
    answer = forward(behind, "DELETE", f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}", [])
    return Answer(204) if answer.status in (200, 204) else _error_of(answer)


def _error_of(answer: Answer) -> Answer:
    codes = {404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange"}
    return _error(answer.status, codes.get(answer.status, "InternalError"))


def _error(status: int, code: str) -> Answer:
    return Answer(status, (_XML,), f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())
