"""What ranks say to each other: MessagePack, each word with its kind. Rank 0 coordinates, the others are members."""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.checkpoint.phases import Begin, Cannot, Done, Ready
from holdfast.core.contract import NoticeWord

__all__ = [
    "Act", "Answer", "Ask", "Hello", "Promise", "Say", "Told", "Wish", "Withdrawn", "Word", "decode_notice",
    "decode_word", "encode_notice", "encode_word",
]  # fmt: skip


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Member to coordinator, first of all. The secret came through the process group's store: who has it belongs to the job."""

    rank: int
    secret: str


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Coordinator to all: how far is your loop? It must not go far before you hear what is decided."""

    question: int


class Promise(msgspec.Struct, frozen=True, tag="promise"):
    """Member to coordinator: this step is complete, and boundary `step + 1` is not passed before the answer."""

    question: int
    step: int


class Act(msgspec.Struct, frozen=True, tag="act"):
    """Coordinator to all: do this at the boundary of `step`. `way`: what a rank that leaves makes durable."""

    question: int
    step: int
    kind: Literal["save", "leave"]
    reason: str
    code: int = 0
    way: str = ""


class Withdrawn(msgspec.Struct, frozen=True, tag="withdrawn"):
    """Coordinator to all: nothing comes of this question."""

    question: int


class Wish(msgspec.Struct, frozen=True, tag="wish"):
    """Member to coordinator: somebody asked this rank to save, or told it to leave."""

    kind: Literal["save", "leave"]
    reason: str
    code: int = 0


class Told(msgspec.Struct, frozen=True, tag="told"):
    """Either way: a notice that one rank has heard concerns all. `notice` is an encoded NoticeWord."""

    notice: bytes


class Say(msgspec.Struct, frozen=True, tag="say"):
    """Member to coordinator: this rank's contribution to the exchange called `name`."""

    name: str
    payload: bytes


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Coordinator to all: what the exchange came to, or why it failed."""

    name: str
    payload: bytes
    error: str = ""


Word = Hello | Ask | Promise | Act | Withdrawn | Wish | Told | Say | Answer | Begin | Ready | Cannot | Done
_DECODER: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def encode_word(word: Word) -> bytes:
    return msgspec.msgpack.encode(word)


def decode_word(data: bytes) -> Word:
    """Raises msgspec.MsgspecError for what is no word."""
    return _DECODER.decode(data)


def encode_notice(word: NoticeWord) -> bytes:
    """A notice inside of `Told`."""
    return msgspec.msgpack.encode(word)


def decode_notice(data: bytes) -> NoticeWord:
    return msgspec.msgpack.decode(data, type=NoticeWord)
