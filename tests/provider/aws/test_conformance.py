"""The suite for all clouds, on AwsInstances, against moto behind a front that keeps tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from ec2_front import LOST, Front

from holdfast.core.launches import Allowed, Pool
from holdfast.provider.aws import AwsInstances
from holdfast.provider.base import Instances, MachineSpec
from holdfast.testing.instances import InstancesConformance

POOL = Pool("aws", "us-east-1", "us-east-1a", "c5.large", "spot")


class TestAws(InstancesConformance):
    spec = MachineSpec(disk_gib=20)

    @pytest.fixture
    def cloud(self, front: Front, connect: Callable[[], AwsInstances]) -> AwsInstances:
        self.front, self.connect = front, connect
        return connect()

    def allowed(self, cloud: Instances) -> tuple[Allowed, ...]:
        return (Allowed(pool=POOL, ceiling_microusd_h=60_000, on_demand_microusd_h=85_000),)

    def another_client(self, cloud: Instances) -> Instances:
        return self.connect()

    def losing_answers(self, cloud: Instances) -> AbstractContextManager[object]:
        @contextmanager
        def losing() -> Iterator[None]:
            """The list is blind too: else the machine is found in it at once, and nothing is unknown."""
            self.front.plan = lambda call, repeat: LOST if call.action == "CreateFleet" else None
            self.front.blind = {"DescribeInstances"}
            yield
            self.front.plan = lambda call, repeat: None
            self.front.blind = set()

        return losing()

    def pass_time(self, cloud: Instances, seconds: float) -> None:
        """moto's lists are never old."""
