"""Google Cloud's metadata server, as a machine sees it: the flavour header, ETags, and requests that wait for a change."""

from __future__ import annotations

import hashlib
from typing import ClassVar

from holdfast.testing.loopback import Answer
from holdfast.testing.metadata.ask import Ask, text_answer
from holdfast.testing.metadata.timeline import Step

__all__ = ["GcpCloud"]

_ROOT = "/computeMetadata/v1/"
_FLAVOR = ("Metadata-Flavor", "Google")
_SERVER = ("Server", "Metadata Server for VM")
_PREEMPTED, _MAINTENANCE = "instance/preempted", "instance/maintenance-event"
_STOP = "instance/shutdown-details/stop-state"
_LONGEST_WAIT_S = 3600.0


class GcpCloud:
    """See `Cloud`."""

    name = "gcp"
    verbs: ClassVar[dict[str, str]] = {
        "preempt": "the instance is being preempted",
        "maintain": "the host is worked on, and the instance terminated",
        "migrate": "the host is worked on, and the instance moved",
        "stop": "a graceful shutdown has begun",
        "withdraw": "nothing of it is true any more",
    }

    def __init__(self) -> None:
        self._values: dict[str, str | None] = {
            "instance/id": "1234567890123456789",
            "instance/name": "trainer",
            "instance/zone": "projects/123456789012/zones/us-central1-a",
            "project/project-id": "rehearsal",
        }
        self._calm()

    def _calm(self) -> None:
        self._values |= {_PREEMPTED: "FALSE", _MAINTENANCE: "NONE", _STOP: None}

    def environment(self, endpoint: str) -> dict[str, str]:
        return {"GCE_METADATA_HOST": endpoint.removeprefix("http://")}

    def apply(self, step: Step, at_unix_s: float) -> None:
        match step.do:
            case "preempt":
                self._values[_PREEMPTED] = "TRUE"
            case "maintain":
                self._values[_MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
            case "migrate":
                self._values[_MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
            case "stop":
                self._values[_STOP] = "PENDING_STOP"
            case "withdraw":
                self._calm()

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer | None:
        if ask.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in ask.headers:
            return text_answer(403, "<!DOCTYPE html><title>Error 403 (Forbidden)!!1</title>", _SERVER, type="text/html")
        if ask.method != "GET":
            return text_answer(405, "", _FLAVOR, _SERVER)
        if ask.path.rstrip("/") == "":
            return text_answer(200, "computeMetadata/\n", _FLAVOR, _SERVER)
        if not ask.path.startswith(_ROOT):
            return text_answer(404, "<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>", _FLAVOR, _SERVER)
        path = ask.path.removeprefix(_ROOT)
        if path == "":
            return text_answer(200, "instance/\nproject/\n", _FLAVOR, _SERVER)
        value = self._values.get(path)
        if value is None:
            return text_answer(404, "<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>", _FLAVOR, _SERVER)
        etag = _etag(path, value)
        if ask.query.get("wait_for_change", "").lower() == "true" and not self._may_answer(ask, etag, waited_s):
            return None
        return text_answer(200, value, ("ETag", etag), _FLAVOR, _SERVER, type="application/text")

    def _may_answer(self, ask: Ask, etag: str, waited_s: float) -> bool:
        try:
            longest_s = float(ask.query.get("timeout_sec", _LONGEST_WAIT_S))
        except ValueError:
            longest_s = 0.0
        # Without an ETag the real server waits for the next change; clients of ours always send one.
        return ask.query.get("last_etag", etag) != etag or waited_s >= longest_s


def _etag(path: str, value: str) -> str:
    return hashlib.sha256(f"{path}={value}".encode()).hexdigest()[:16]
