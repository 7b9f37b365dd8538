"""The rehearsal cloud does what every provider must; also when its lists are old and its clock runs fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rehearsal import POOLS, SPOT, Rehearsal

from holdfast.core.launches import Allowed, Pool
from holdfast.provider.base import Instances
from holdfast.provider.local import LocalCloud
from holdfast.testing.instances import InstancesConformance

SPOT_B = "local/here/b/small/spot"
_POOLS: list[dict[str, Any]] = [*POOLS, {"name": SPOT_B, "price": 0.4}]


class TestRehearsalCloud(InstancesConformance):
    config: dict[str, Any] = {"pools": _POOLS}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def rehearsal(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
        rehearsal = Rehearsal(tmp_path_factory.mktemp("conformance"), cls.config)
        yield rehearsal
        rehearsal.end()

    @pytest.fixture
    def cloud(self, rehearsal: Rehearsal) -> LocalCloud:
        return rehearsal.cloud

    def allowed(self, cloud: Instances) -> tuple[Allowed, ...]:
        pools = [SPOT, SPOT_B]
        return tuple(
            Allowed(pool=Pool.named(name), ceiling_microusd_h=900_000, on_demand_microusd_h=1_000_000) for name in pools
        )

    def another_client(self, cloud: Instances) -> Instances:
        assert isinstance(cloud, LocalCloud)
        return LocalCloud.open(Path(cloud.folder))

    def losing_answers(self, cloud: Instances) -> AbstractContextManager[object]:
        assert isinstance(cloud, LocalCloud)
        return _losing(cloud, {key: value for key, value in self.config.get("faults", {}).items() if key != "create"})


class TestSlowLists(TestRehearsalCloud):
    config = {  # noqa: RUF012
        "pools": _POOLS,
        "speed": 20,
        "enforces_lifetime": True,
        "faults": {"list_delay_s": 0.2},
        "network": "shared",
    }


@contextmanager
def _losing(cloud: LocalCloud, usual: dict[str, Any]) -> Iterator[None]:
    cloud.misbehave(**usual, create={"lost": 1.0})
    try:
        yield
    finally:
        cloud.misbehave(**usual)
