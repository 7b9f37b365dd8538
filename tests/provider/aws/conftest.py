"""moto's server and a front for all of these tests, as new for each, and clients that know nothing of each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from aws_parts import Mortal
from ec2_front import Front, ec2_front

from holdfast.provider.aws import AwsInstances
from holdfast.testing.servers import moto_server

PRICES = {
    "c5.large": "0.085",
    "m5.large": "0.096",
    "m6g.large": "0.077",
    "t3.micro": "0.0104",
    "gp3": "0.08",
    "address": "0.005",
}
DEEP_LEARNING = "/aws/service/deeplearning/ami/{}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
PLAIN = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-{}"

Connect = Callable[..., AwsInstances]


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with moto_server() as server:
        yield server.endpoint


@pytest.fixture(scope="session")
def standing(moto: str) -> Iterator[Front]:
    with ec2_front(moto) as front:
        yield front


@pytest.fixture
def front(standing: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"ACCESS_KEY_ID": "rehearsal", "SECRET_ACCESS_KEY": "rehearsal", "MAX_ATTEMPTS": "1"}
    for name, value in (settings | {"CONFIG_FILE": "/dev/null", "SHARED_CREDENTIALS_FILE": "/dev/null"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    standing.reset()
    standing.prices = dict(PRICES)
    standing.images = {DEEP_LEARNING.format(kind): PLAIN.format(kind) for kind in ("x86_64", "arm64")}
    return standing


@pytest.fixture(scope="session")
def lasting() -> Mortal:
    return Mortal()


@pytest.fixture
def mortal(lasting: Mortal) -> Mortal:
    lasting.die_at(-1)
    return lasting


@pytest.fixture
def connect(front: Front, mortal: Mortal) -> Iterator[Connect]:
    """New clients, which know nothing of each other."""
    with ExitStack() as closing:

        def connected(**options: Any) -> AwsInstances:
            usual: dict[str, Any] = {"regions": ["us-east-1"], "endpoint": front.endpoint, "session": mortal}
            return closing.enter_context(AwsInstances(**(usual | options)))

        yield connected
