"""A standby as a process, against an object store: what it has fetched ahead is what its command is restored from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from agents import GIVE_UP_S, eventually, read_until
from controlling import Controller, words_of
from real import Place, environment_of, machine
from test_ahead import needed, train

from holdfast.checkpoint import pack
from holdfast.core.launches import MachineWord, word_key
from holdfast.core.sealed import FORMAT_VERSION, seal
from holdfast.store.open import open_store
from holdfast.testing.servers import ObjectServer, ministack_server

GOING_ON = """
import os, sys, time
sys.path[:0] = {path!r}
import holdfast
from test_ahead import Weights, expected, same
from holdfast.core.contract import ENV_STAGED
weights = Weights()
with holdfast.Run(save_every="1 step", progress=False) as run:
    run.track(weights=weights)
    run.restore()
    print("restored", run.step, same(weights, expected(run.step)), os.path.isdir(os.environ[ENV_STAGED]), flush=True)
    for number in run.batches(range(1000)):
        weights.step(run.step)
        if run.step == 7:
            print("trained", flush=True)
            while True:
                time.sleep(1)
"""


class FarPlace(Place):
    """As `Place`, but the run lies in an object store."""

    def __init__(self, root: Path, server: ObjectServer) -> None:
        super().__init__(root)
        self.run = f"{server.make_bucket('runs')}/one"  # type: ignore[assignment]
        self.store = open_store(str(self.run), options=server.options)  # type: ignore[assignment]
        self.controller = Controller(self.store)


def test_a_standby_restores_what_it_has_fetched_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "OBJECT_BYTES", 100_000)
    with ministack_server() as server:
        place = FarPlace(tmp_path, server)
        train(place.store, 5)
        script = tmp_path / "script.py"
        here = Path(__file__).parent
        script.write_text(GOING_ON.format(path=[str(here), str(here.parent), str(here.parents[1] / "support")]))
        place.controller.job(run=f"exec {sys.executable} {script}", notice="none", grace_s=3)
        place.controller.intent(1, predecessor=7)
        place.controller.grant(1, 0, 3600)
        place.controller.answer(1)
        environment = environment_of(place, **server.environment)
        with machine(place, environment) as process:
            assert process.stderr is not None
            assert process.stdout is not None
            read_until(process.stderr.fileno(), b"restored ahead: step 5, ")
            assert {entry.key for entry in place.store.list("data/")} >= needed(place.store)
            # From here on only this machine's disk has them.
            for key in needed(place.store):
                place.store.delete(key)
            released = MachineWord(
                format=FORMAT_VERSION, launch=7, part=0, machine="old", kind="released", uptime_s=1, at_unix_s=0.0, exit_code=75
            )  # fmt: skip
            place.store.put(word_key(7, 0), seal(released))
            assert read_until(process.stdout.fileno(), b"\n") == b"restored 5 True True\n"
            assert read_until(process.stdout.fileno(), b"\n") == b"trained\n"
            eventually(lambda: not (place.folder / "staged").exists())
            process.kill()
            process.communicate(timeout=GIVE_UP_S)
        assert [word.kind for word in words_of(place.store, 1)] == ["ready", "claimed"]
