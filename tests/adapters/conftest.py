"""A warmed process for each framework, that forks its victims, and what undisturbed ones come to. Lets these tests import what
stands beside them.

A module of tests says ZYGOTE, the script that forks its victims, and where it wants `references`: SETTINGS, by name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from adapter_grounds import References, ground_for
from forking import Zygote

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def zygote_of() -> Iterator[Callable[[str], Zygote]]:
    """By script; started when it is asked for, once."""
    with ExitStack() as stack:
        yield functools.cache(lambda script: stack.enter_context(Zygote(HERE / script)))


@pytest.fixture(scope="module")
def zygote(request: pytest.FixtureRequest, zygote_of: Callable[[str], Zygote]) -> Zygote:
    return zygote_of(request.module.ZYGOTE)


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> References:
    """At another pace of saving, since it must not matter."""
    folder, settings = tmp_path_factory.mktemp("references"), request.module.SETTINGS
    return References(lambda name: ground_for(zygote, folder / name, settings[name], save_every="epoch").finish())


@pytest.fixture
def same_settings() -> Iterator[None]:
    """Trainings in this process leave no switch behind that other tests would find."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
