"""The suite for every provider, against the stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from gcp_parts import allowed, client, compute
from gcp_stand_in import GcpStandIn

from holdfast.core.launches import Allowed
from holdfast.provider.base import Instances
from holdfast.provider.gcp import GcpInstances
from holdfast.testing.instances import InstancesConformance


class TestGcp(InstancesConformance):
    unknown_machine_id = "1234567890123456789"

    @pytest.fixture
    def stand_in(self) -> Iterator[GcpStandIn]:
        with compute() as cloud:
            cloud.list_delay_s = 20.0
            yield cloud

    @pytest.fixture
    def cloud(self, stand_in: GcpStandIn) -> Iterator[GcpInstances]:
        self._stand_in, self._others = stand_in, list[GcpInstances]()
        with client(stand_in) as cloud:
            yield cloud
        for other in self._others:
            other.close()

    def allowed(self, cloud: Instances) -> tuple[Allowed, ...]:
        return (allowed(),)

    def another_client(self, cloud: Instances) -> Instances:
        self._others.append(client(self._stand_in))
        return self._others[-1]

    @contextmanager
    def losing_answers(self, cloud: Instances) -> Iterator[None]:
        # The HTTP library tries once more where a connection breaks before an answer.
        self._stand_in.play("instances.insert", "lost", times=2)
        yield

    def until(self, cloud: Instances, found: Callable[[], bool], what: str) -> None:
        """On the stand-in's clock."""
        for _ in range(20):
            if found():
                return
            self.pass_time(cloud, 5.0)
        pytest.fail(what)
