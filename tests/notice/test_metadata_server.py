"""The shipped server keeps the clouds' protocols, as plain requests and as AWS's own client see it."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hearing import VirtualClock

from holdfast.core.errors import UsageError
from holdfast.testing.metadata import Fault, MetadataServer, metadata_server, read_timeline
from holdfast.testing.metadata.azure import AzureCloud

TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"
FLAVOR = {"Metadata-Flavor": "Google"}


def ask(
    server: MetadataServer, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: bytes = b""
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(server.endpoint).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace"), dict(answer.getheaders())
    finally:
        connection.close()


def test_imds_wants_a_token_that_has_not_run_out() -> None:
    clock = VirtualClock(1)
    with metadata_server("aws", clock=clock) as server:
        assert ask(server, "/latest/meta-data/instance-id")[0] == 401
        assert ask(server, "/latest/api/token", method="PUT")[0] == 400
        assert [ask(server, "/latest/api/token", {TTL: ttl}, "PUT")[0] for ttl in ("0", "21601", "x", "60")] == [
            400, 400, 400, 200,
        ]  # fmt: skip
        assert ask(server, "/latest/api/token", {TTL: "60", "X-Forwarded-For": "1.2.3.4"}, "PUT")[0] == 403
        token = {TOKEN: ask(server, "/latest/api/token", {TTL: "60"}, "PUT")[1]}
        assert ask(server, "/latest/meta-data/instance-id", token)[1].startswith("i-")
        assert ask(server, "/latest/meta-data/spot/instance-action", token)[0] == 404
        server.do("preempt", lead="2 min")
        said = json.loads(ask(server, "/latest/meta-data/spot/instance-action", token)[1])
        assert said == {"action": "terminate", "time": "2027-01-15T08:02:00Z"}
        clock.sleep(61)
        assert ask(server, "/latest/meta-data/instance-id", token)[0] == 401


def test_awss_own_client_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    utils: Any = pytest.importorskip("botocore.utils")
    with metadata_server("aws") as server:
        fetcher = utils.IMDSFetcher(timeout=30, base_url=server.endpoint, num_attempts=1)
        token = fetcher._fetch_metadata_token()
        found = fetcher._get_request("latest/meta-data/placement/region", None, token=token)
        assert found.text == "us-east-1"


def test_google_wants_its_flavour_and_waits_for_a_change() -> None:
    clock = VirtualClock(1)
    key = "/computeMetadata/v1/instance/preempted"
    with metadata_server("gcp", clock=clock, timeline=[(100, "preempt")], wait_step_s=1.0) as server:
        assert ask(server, key)[0] == 403
        status, value, headers = ask(server, key, FLAVOR)
        assert (status, value, headers["Metadata-Flavor"]) == (200, "FALSE", "Google")
        wait = f"{key}?wait_for_change=true&last_etag={headers['ETag']}"
        began_s = clock.monotonic_s()
        assert ask(server, f"{wait}&timeout_sec=10", FLAVOR)[1] == "FALSE"
        assert clock.monotonic_s() - began_s == 10
        status, value, changed = ask(server, wait, FLAVOR)
        assert (value, clock.monotonic_s()) == ("TRUE", 100)
        assert changed["ETag"] != headers["ETag"]
        # Who has seen an older value is answered at once.
        assert ask(server, wait, FLAVOR)[1] == "TRUE"
        assert clock.monotonic_s() == 100
        assert ask(server, "/computeMetadata/v1/instance/shutdown-details/stop-state", FLAVOR)[0] == 404


def test_azure_wakes_slowly_lists_everybodys_events_and_starts_what_is_acknowledged() -> None:
    clock = VirtualClock(1)
    events = "/metadata/scheduledevents?api-version=2020-07-01"
    own = {"Metadata": "true"}
    with metadata_server(AzureCloud(first_call_s=100.0), clock=clock, wait_step_s=1.0) as server:
        assert [ask(server, events)[0], ask(server, "/metadata/scheduledevents", own)[0]] == [400, 400]
        assert json.loads(ask(server, events, own)[1]) == {"DocumentIncarnation": 1, "Events": []}
        assert clock.monotonic_s() == 100
        server.do("others", id="theirs")
        server.do("preempt", id="ours", lead=30)
        listed = json.loads(ask(server, events, own)[1])
        assert [(e["EventId"], e["Resources"], e["NotBefore"]) for e in listed["Events"]] == [
            ("theirs", ["trainer_1"], "Fri, 15 Jan 2027 08:02:10 GMT"),
            ("ours", ["trainer_0"], "Fri, 15 Jan 2027 08:02:10 GMT"),
        ]
        word = json.dumps({"StartRequests": [{"EventId": "ours"}]}).encode()
        assert ask(server, events, own, "POST", b"{}")[0] == 400
        assert ask(server, events, own, "POST", word)[0] == 200
        started = json.loads(ask(server, events, own)[1])["Events"][1]
        assert (started["EventStatus"], started["NotBefore"]) == ("Started", "")
        clock.sleep(6)
        later = json.loads(ask(server, events, own)[1])
        assert [e["EventId"] for e in later["Events"]] == ["theirs"]
        assert later["DocumentIncarnation"] > listed["DocumentIncarnation"]


def test_a_timeline_unfolds_at_its_own_times_however_late_somebody_asks(tmp_path: Path) -> None:
    written = tmp_path / "bad-day.json"
    written.write_text(
        '[{"at": "1 min", "do": "preempt", "lead": "2 min"}, {"at": "10 s", "do": "error", "for": "5 s"}]'
    )
    clock = VirtualClock(1)
    with metadata_server("aws", timeline=read_timeline(written), clock=clock, from_first_request=True) as server:
        clock.sleep(1000)
        token = {TOKEN: ask(server, "/latest/api/token", {TTL: "600"}, "PUT")[1]}
        clock.sleep(11)
        assert ask(server, "/latest/meta-data/spot/instance-action", token)[0] == 500
        clock.sleep(5)
        assert ask(server, "/latest/meta-data/spot/instance-action", token)[0] == 404
        clock.sleep(70)
        said = json.loads(ask(server, "/latest/meta-data/spot/instance-action", token)[1])
        assert said["time"] == "2027-01-15T08:19:40Z"
        assert server.happened == read_timeline(written)


@pytest.mark.parametrize(
    "entry",
    [{"at": 1, "do": "explode"}, {"at": 1}, {"do": "preempt", "when": 3}, (1,), "preempt", {"at": -1, "do": "preempt"}],
)
def test_a_wrong_timeline_is_refused(entry: Any) -> None:
    with pytest.raises(UsageError), metadata_server("aws", timeline=[entry]):
        raise AssertionError


def test_faults_are_real_ones() -> None:
    with metadata_server("gcp") as server:
        for fault, expected in ((Fault.ERROR, 500), (Fault.DENY, 401), (Fault.GARBAGE, 200)):
            server.misbehave(fault)
            assert ask(server, "/computeMetadata/v1/", FLAVOR)[0] == expected
        server.misbehave(Fault.RESET)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server, "/computeMetadata/v1/", FLAVOR)
        server.recover()
        assert ask(server, "/computeMetadata/v1/", FLAVOR)[1] == "instance/\nproject/\n"
