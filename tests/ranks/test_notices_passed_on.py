"""What rank 0 passes on of the notices that ranks hear: each that matters, none twice, and what is withdrawn is withdrawn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.clock import SystemClock
from holdfast.core.contract import NoticeWord
from holdfast.train.ranks.together import Together
from holdfast.train.ranks.words import Told, Word, decode_notice, encode_notice

SAYINGS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("abcd"), st.sampled_from([None, "preemption", "rebalance"]), st.integers(0, 2)),
    max_size=30,
)  # fmt: skip


class Members:
    """What stands as the other ranks know it."""

    def __init__(self) -> None:
        self.standing: dict[str, tuple[str, int]] = {}
        self.words = 0

    def send(self, rank: int, word: Word) -> None:
        raise AssertionError("what all must know is told to all")

    def send_all(self, word: Word) -> None:
        assert isinstance(word, Told)
        self.words += 1
        notice = decode_notice(word.notice)
        if notice.kind == "withdrawn":
            del self.standing[notice.id]
        else:
            self.standing[notice.id] = (notice.kind, round(notice.deadline_unix_s or 0.0))

    def close(self) -> None: ...


@given(sayings=SAYINGS)
def test_the_others_know_what_stands(sayings: list[tuple[int, str, str | None, int]]) -> None:
    together, members = Together(0, 4, SystemClock(), commit_timeout_s=1.0), Members()
    together.connect(members, lambda notice: None)
    stands: dict[str, tuple[str, int]] = {}
    for rank, id, kind, deadline in sayings:
        word = NoticeWord(
            kind=kind or "withdrawn", deadline_unix_s=100.0 + deadline, source="test", id=id, heard_unix_s=0.0
        )
        if kind is None:
            stands.pop(id, None)
        else:
            stands[id] = (kind, 100 + deadline)
        before = members.words
        if rank == 0:
            together.tell(encode_notice(word))
        else:
            together.heard(rank, Told(encode_notice(word)))
        assert set(members.standing.values()) == set(stands.values())
        assert members.words - before <= 2
    # Each of a thousand ranks is told the same.
    before = members.words
    for rank in range(1, 4):
        word = NoticeWord(kind="stop", deadline_unix_s=7.0, source="test", id=f"of {rank}", heard_unix_s=0.0)
        together.heard(rank, Told(encode_notice(word)))
    assert members.words == before + 1
