"""The metadata endpoints of machines: one server for each, that knows its machine's name and answers as that cloud does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Literal

from holdfast.core.errors import UsageError
from holdfast.testing.cloud.life import Life
from holdfast.testing.loopback import Answer
from holdfast.testing.metadata.ask import Ask, Cloud
from holdfast.testing.metadata.server import CLOUDS, MetadataServer, metadata_server
from holdfast.testing.metadata.timeline import Step

__all__ = ["Endpoints", "variables"]


class _OfOneMachine:
    """A cloud's metadata about this machine and no example. See `Cloud`."""

    verbs: ClassVar[dict[str, str]]

    def __init__(self, cloud: Cloud, life: Life) -> None:
        self._cloud, self.name = cloud, cloud.name
        self.verbs = cloud.verbs  # type: ignore[misc]
        pool = life.pool
        self._values = {
            "instance-id": life.id,
            "instance-type": pool.instance_type,
            "instance-life-cycle": pool.market,
            "placement/availability-zone": pool.zone,
            "placement/region": pool.region,
            "instance/name": life.id,
            "instance/zone": f"projects/rehearsal/zones/{pool.zone}",
        }

    def environment(self, endpoint: str) -> dict[str, str]:
        return self._cloud.environment(endpoint)

    def apply(self, step: Step, at_unix_s: float) -> None:
        self._cloud.apply(step, at_unix_s)

    def answer(self, ask: Ask, now_unix_s: float, waited_s: float) -> Answer | None:
        answer = self._cloud.answer(ask, now_unix_s, waited_s)
        for name, value in self._values.items():
            if answer is not None and answer.status == 200 and ask.path.endswith(f"/{name}"):
                return replace(answer, body=value.encode())
        return answer


class Endpoints:
    """Implements `course.Notices`. Thread safety: none; the cloud calls under its lock."""

    def __init__(self, cloud: Literal["aws", "gcp", "azure"]) -> None:
        self._cloud = cloud
        self._open: dict[str, tuple[ExitStack, MetadataServer]] = {}

    def open(self, life: Life) -> int:
        """On the port that it had, if it had one: the machine knows no other."""
        stack = ExitStack()
        named = _OfOneMachine(CLOUDS[self._cloud](), life)
        try:
            server = stack.enter_context(metadata_server(named, address=("127.0.0.1", life.metadata_port)))
        except UsageError:
            # Somebody has taken the port while the cloud was away: the machine hears nothing more, as can happen anywhere.
            server = stack.enter_context(metadata_server(named))
        self._open[life.id] = (stack, server)
        return int(server.endpoint.rpartition(":")[2])

    def tell(self, id: str, what: Literal["preempt", "rebalance", "withdraw"], lead_s: float) -> None:
        """A machine that has no endpoint yet hears of it at its boot; what this cloud cannot say is not said."""
        if id in self._open:
            _, server = self._open[id]
            if what in server.cloud.verbs:
                server.do(what, lead=lead_s)

    def close(self, id: str) -> None:
        if id in self._open:
            stack, _ = self._open.pop(id)
            stack.close()

    def close_all(self) -> None:
        for id in list(self._open):
            self.close(id)


def variables(cloud: str, endpoint: str) -> dict[str, str]:
    """What makes programs of a machine find its endpoint."""
    return {**CLOUDS[cloud]().environment(endpoint), "HOLDFAST_NOTICE": cloud}
