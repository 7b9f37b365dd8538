"""A mirror without a thread: its passes over a real folder, with a clock that the test moves and a store that it chooses."""

from __future__ import annotations

import itertools
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.agent.mirror.claim import claim_mirror
from holdfast.agent.mirror.folder import Names
from holdfast.agent.mirror.opening import mend, open_folder
from holdfast.agent.mirror.passes import Passes, Suspects
from holdfast.checkpoint.near import NearFor
from holdfast.checkpoint.retain import Keep
from holdfast.core.events import CollectingSink
from holdfast.core.ids import TokenSource, random_token
from holdfast.store.base import Store

SETTLE_S = 2.0


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return 1.7e9 + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Machine:
    """One agent's mirror of `folder`; `restored` tells whether its start took the state from the store."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        *,
        include: tuple[str, ...] = (),
        fresh: bool = False,
        keep: int = 3,
        tokens: TokenSource = random_token,
        near: Sequence[NearFor] = (),
    ) -> None:
        self.folder, self.clock, self.sink, self.lines = folder, FakeClock(), CollectingSink(), list[str]()
        self.tokens = tokens
        self.reading = ThreadPoolExecutor(2)
        self.lineage = claim_mirror(store, fresh=fresh, clock=self.clock, tokens=tokens, warn=self.lines.append)
        self.passes = Passes(
            folder, Names(include), store, self.lineage, settle_s=SETTLE_S, keep=Keep(last=keep), open_home=lambda url: store,
            reading=self.reading, clock=self.clock, tokens=tokens, sink=self.sink, say=self.lines.append,
        )  # fmt: skip
        self.fell_back: list[str] = []
        self.restored = open_folder(
            self.passes, store, self.lineage.head, lambda url: store, fresh=fresh, reading=self.reading, tokens=tokens,
            say=self.lines.append, fell_back=lambda fallback: self.fell_back.append(fallback.reason), near=near,
        )  # fmt: skip

    def settle(self, write: Callable[[], object] = lambda: None) -> bool:
        """Write, and look often enough for it to have come to rest. Whether a state was committed."""
        write()
        committed = self.passes.look()
        self.clock.sleep(SETTLE_S)
        return self.passes.look() or committed

    def end(self, *, clean: bool) -> Suspects:
        """The command has ended."""
        suspects = self.passes.last(clean=clean)
        self.passes.commit_last()
        return suspects

    def mend(self, suspects: Suspects) -> None:
        mend(self.passes, suspects, reading=self.reading, tokens=self.tokens, say=self.lines.append)

    def sent_bytes(self) -> list[int]:
        return [event.fields["sent_bytes"] for event in self.sink.named("mirror.committed")]

    def close(self) -> None:
        self.passes.close()
        self.reading.shutdown()


_moments = itertools.count(time.time_ns(), 10**6)


def _stamp(path: Path) -> None:
    """Between two writes of a real script more time passes than a file system's clock needs to tick; here it is made to pass."""
    moment = next(_moments)
    os.utime(path, ns=(moment, moment))


def write(path: Path, data: bytes | bytearray) -> None:
    """In place, as `open(path, "wb")` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    _stamp(path)


def write_zip(path: Path, content: bytes) -> None:
    """A file of the kind that torch.save writes: its directory comes last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", content)
    _stamp(path)


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder but holdfast's own: bytes, link targets, modes and times."""
    found: dict[str, object] = {}
    for where, folders, files in os.walk(folder):
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(where, name)))):
            path = Path(where) / name
            if name.startswith(".holdfast"):
                continue
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[relative] = os.readlink(path)
            else:
                status = path.stat()
                found[relative] = (path.read_bytes(), status.st_mode & 0o777, status.st_mtime_ns)
    return found


Begin = Callable[..., Machine]


def wipe(folder: Path) -> None:
    """Another machine: neither the folder nor what lay beside it."""
    for left in folder.parent.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
