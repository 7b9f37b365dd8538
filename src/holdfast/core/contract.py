"""What trainer, agent and controller know of each other: environment variables, exit codes and one shared page of progress.

They never import each other. The progress page is a small file that the trainer maps into memory: a store of eight bytes per step
costs nothing, and what was written survives the death of the writer, so that the agent can say how much work was lost.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

__all__ = [
    "CONTROL_SOCKET",
    "ENV_AGENTS",
    "ENV_ATTEMPT",
    "ENV_CONTROL",
    "ENV_FRESH",
    "ENV_MACHINE",
    "ENV_MACHINE_STARTED",
    "ENV_MARKET",
    "ENV_NOTICE",
    "ENV_PREVIOUS_STEP",
    "ENV_PRICE",
    "ENV_PRICE_ON_DEMAND",
    "ENV_RUN",
    "ENV_STAGED",
    "EXIT_DONE",
    "EXIT_FENCED",
    "EXIT_INFRASTRUCTURE",
    "EXIT_INTERRUPTED",
    "EXIT_LIMIT",
    "EXIT_NO_PROGRESS",
    "EXIT_PREEMPTED",
    "EXIT_USAGE",
    "MOST_WORD_BYTES",
    "NOTIFY_SOCKET",
    "KeptWord",
    "NoticeWord",
    "Phase",
    "Progress",
    "ProgressPage",
    "ReadyWord",
    "SlotsWord",
    "Word",
    "control_address",
    "decode_words",
    "encode_word",
]

ENV_RUN = "HOLDFAST_RUN"
"""URL of the run, set by the launcher or agent; used where the script names none."""
ENV_ATTEMPT = "HOLDFAST_ATTEMPT"
"""How often the agent has started the command so far, counted from 1. For people; identity is the token in the head."""
ENV_CONTROL = "HOLDFAST_CONTROL"
"""A folder on the machine that agent and trainer share; holds the progress page."""
ENV_AGENTS = "HOLDFAST_AGENTS"
"""The folder in which agents register and `holdfast notify` looks for them, instead of the usual one; closed to all other users."""
ENV_FRESH = "HOLDFAST_FRESH"
"""`1` until an attempt has claimed the run, never after: begin a new generation instead of resuming."""

ENV_PREVIOUS_STEP = "HOLDFAST_PREVIOUS_STEP"
"""Set by the agent once an attempt has claimed the run: the last step that the newest such attempt is known to have completed
(-1 if none), read from its progress page after it ended. So a start with this variable is never fresh."""

ENV_STAGED = "HOLDFAST_STAGED"
"""A folder on this machine's disk with copies of the run's objects, under their names, which a standby has fetched ahead. What
is read there is verified; what is missing or altered comes from the run's URL."""

ENV_PRICE = "HOLDFAST_PRICE_PER_HOUR"
"""What this machine costs, in dollars per hour, where the launcher knows it."""
ENV_PRICE_ON_DEMAND = "HOLDFAST_ON_DEMAND_PRICE_PER_HOUR"
"""What the same machine would cost on demand, in dollars per hour; what is saved is measured against it."""
ENV_MACHINE = "HOLDFAST_MACHINE"
"""The provider's name of this machine, where the launcher knows it."""
ENV_MACHINE_STARTED = "HOLDFAST_MACHINE_STARTED"
"""Since when this machine is billed, in seconds since 1970-01-01 UTC, where the launcher knows it."""
ENV_MARKET = "HOLDFAST_MARKET"
"""`spot`, `on-demand` or `reserved`, where the launcher knows it."""

EXIT_DONE = 0
EXIT_USAGE = 2
"""A wrong argument, or a run that is not what the caller thinks: starting it again would fail again."""
EXIT_INFRASTRUCTURE = 69
"""EX_UNAVAILABLE: the machine cannot do the work (no GPU, a lost GPU); it says nothing about the command. Start it elsewhere."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: capacity was taken away, the state is saved, start me again. Not 137 or 143, which are ambiguous."""
EXIT_FENCED = 76
"""EX_PROTOCOL: another attempt owns the run; do not start me again."""
EXIT_NO_PROGRESS = 77
"""Two attempts in a row reached no new checkpoint; a person must look."""
EXIT_LIMIT = 78
"""The time or the money that the machine was given is used up; start again only with a new limit."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells report it."""


CONTROL_SOCKET = "control.sock"
"""In the control folder: agent and trainer send each other words, one JSON object a line."""
NOTIFY_SOCKET = "notify.sock"
"""In the control folder: here the agent takes a notice from `holdfast notify`, and says what has become of it."""
ENV_NOTICE = "HOLDFAST_NOTICE"
"""Where notices are listened for when nobody says otherwise: `auto`, `none`, or names as `holdfast notices` knows them."""


MOST_WORD_BYTES = 1 << 20
"""What has grown longer than this without an end is no word; it is forgotten."""
_MOST_ADDRESS_BYTES = 100


def control_address(folder: Path, descriptor: int, name: str = CONTROL_SOCKET) -> str:
    """Where a socket in the control folder is bound and found. A socket's address is short, a folder's name need not be: then the
    way leads over `descriptor`, the folder opened by this process."""
    path = os.fspath(folder / name)
    return path if len(os.fsencode(path)) <= _MOST_ADDRESS_BYTES else f"/proc/self/fd/{descriptor}/{name}"


class NoticeWord(msgspec.Struct, tag="notice", frozen=True, kw_only=True):
    """Agent to trainer: what the machine has been told. The fields are those of `holdfast.notice.Notice`.

    `holdfast notify` to agent: the same, to be heard like any other notice. The agent sends it back when it has heard it, and one
    of the kind `withdrawn` when another `holdfast notify` has taken it back.
    """

    kind: str
    deadline_unix_s: float | None
    source: str
    id: str
    heard_unix_s: float
    assumed: bool = False
    evidence: dict[str, Any] = {}


class ReadyWord(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """Trainer to agent, and agent to `holdfast notify`: what could be made durable because of this notice is durable."""

    notice_id: str
    step: int | None = None
    """From the agent: the newest step that is durable."""


class KeptWord(msgspec.Struct, tag="kept", frozen=True, kw_only=True):
    """Agent to `holdfast notify`: the command has ended, and all that could be kept is kept; the machine may go."""

    step: int | None
    """The newest step that is durable; None: the command has reported none."""
    lost: list[str]
    """What could not be kept, for people."""


class SlotsWord(msgspec.Struct, tag="slots", frozen=True, kw_only=True):
    """Trainer to agent: the staging memory of this rank is made anew; one descriptor for each size comes along. What came before is
    void. Agent to trainer: the memory that a rank which is gone has left."""

    sizes_bytes: list[int]
    rank: int = 0


class InheritWord(msgspec.Struct, tag="inherit", frozen=True, kw_only=True):
    """Trainer to agent: hand over the memory of those that are gone."""


class InheritedWord(msgspec.Struct, tag="inherited", frozen=True, kw_only=True):
    """Agent to trainer: that was all."""


Word = NoticeWord | ReadyWord | SlotsWord | InheritWord | InheritedWord | KeptWord
_WORDS: msgspec.json.Decoder[Word] = msgspec.json.Decoder(Word)


def encode_word(word: Word) -> bytes:
    return msgspec.json.encode(word) + b"\n"


def decode_words(data: bytes) -> tuple[list[Word], bytes]:
    """The complete words in `data`, and the rest. A word that is not understood is left out: the other side may be newer."""
    *lines, rest = data.split(b"\n")
    words: list[Word] = []
    for line in lines:
        try:
            words.append(_WORDS.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return words, rest


class Phase(IntEnum):
    """What the trainer is doing, as the agent sees it."""

    STARTING = 0
    RESTORING = 1
    TRAINING = 2
    EVALUATING = 3
    LEAVING = 4
    FINISHED = 5


_LAYOUT = struct.Struct("<8sqqqqq")
_MAGIC = b"hfprog01"
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Progress:
    """One reading of the page. Steps are -1 where nothing is known yet; `attempt` is the number in the claimed head, 0 if none."""

    attempt: int
    step: int
    restored_step: int
    committed_step: int
    phase: Phase

    @property
    def kept_step(self) -> int:
        """The newest step that the next attempt can start from, as far as is known; 0: none."""
        return max(self.committed_step, self.restored_step, 0)

    @property
    def lost_steps(self) -> int:
        """Steps that would have to be computed again."""
        return max(0, self.step - self.kept_step)


class ProgressPage:
    """The trainer's side writes, the agent's side reads; the file outlives both.

    Thread safety: one writer thread per field group; eight-byte stores are not torn on the platforms that holdfast supports.
    """

    FILE_NAME = "progress"

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.FILE_NAME
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _PAGE_BYTES)
            self._memory = mmap.mmap(descriptor, _PAGE_BYTES)
        finally:
            os.close(descriptor)

    def reset(self) -> None:
        """Called by the agent before each start, so that a dead attempt's figures are not read as the new one's."""
        _LAYOUT.pack_into(self._memory, 0, _MAGIC, 0, -1, -1, -1, int(Phase.STARTING))

    def claimed(self, attempt: int) -> None:
        struct.pack_into("<q", self._memory, 8, attempt)

    def stepped(self, step: int) -> None:
        struct.pack_into("<q", self._memory, 16, step)

    def restored(self, step: int) -> None:
        struct.pack_into("<qq", self._memory, 16, step, step)

    def committed(self, step: int) -> None:
        struct.pack_into("<q", self._memory, 32, step)

    def entered(self, phase: Phase) -> None:
        struct.pack_into("<q", self._memory, 40, int(phase))

    def read(self) -> Progress | None:
        """The newest figures, or None while no trainer that knows holdfast has opened the page."""
        magic, attempt, step, restored, committed, phase = _LAYOUT.unpack_from(self._memory, 0)
        if magic != _MAGIC or attempt == 0:
            return None
        return Progress(attempt, step, restored, committed, Phase(phase))

    def phase(self) -> Phase | None:
        """What a trainer has entered, before its claim too; STARTING until one has entered anything, None for nonsense."""
        magic, *_, phase = _LAYOUT.unpack_from(self._memory, 0)
        try:
            return Phase(phase) if magic == _MAGIC else None
        except ValueError:
            return None

    def close(self) -> None:
        self._memory.close()
