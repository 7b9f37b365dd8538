"""Whatever happens to the bytes of a run: restore gives a state that was committed, or an error of ours, never another value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaved import RUN_ID, SCALE, make_state, same_state
from parts import begin, garbage, restore, resume

from holdfast.checkpoint.format import (
    CHUNK_BYTES,
    OBJECT_BYTES,
    ArrayEntry,
    Chunk,
    Head,
    ObjectRef,
    Part,
    PinnedBy,
    Root,
    RunRecord,
    decode_part,
    encode_part,
)
from holdfast.checkpoint.heads import read_truth
from holdfast.core.errors import FormatError, HoldfastError, IntegrityError, RestoreError, UsageError
from holdfast.core.ids import seeded_tokens
from holdfast.core.sealed import FORMAT_VERSION, seal, unseal
from holdfast.store.memory import MemoryStore

_SAVES = 3


def _small_run() -> MemoryStore:
    store = MemoryStore()
    attempt = begin(store, tokens=seeded_tokens(1))
    for number in range(_SAVES):
        attempt.save(make_state("A", number), number)
    attempt.saver.close(60)
    return store


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    return dict(_small_run()._contents.objects)


def _holding(objects: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    store._contents.objects.update(objects)
    return store


def _is_committed_or_refused(objects: dict[str, bytes]) -> str:
    try:
        found = restore(_holding(objects))
    except HoldfastError as error:
        return type(error).__name__
    assert found is not None, "a run that has checkpoints was taken for an empty one"
    number = next((n for n in range(_SAVES) if same_state(found, make_state("A", n))), None)
    assert number is not None, "restore gave a state that never was"
    return f"state {number}"


def _damages(whole: dict[str, bytes]) -> Iterator[dict[str, bytes | None]]:
    """Every way to spoil one object, as the objects that change; None is deleted."""
    for key, body in whole.items():
        yield {key: None}
        yield {key: b""}
        yield {key: body + b"\n"}
        for length in range(0, len(body), 1 if SCALE > 1 else 7):
            yield {key: body[:length]}
        for place in range(0, len(body), 1 if SCALE > 1 else 2):
            spoilt = bytearray(body)
            spoilt[place] ^= 1 << (place % 8)
            yield {key: bytes(spoilt)}
        for other, others_body in whole.items():
            if other != key:
                yield {key: others_body}
                yield {key: others_body, other: body}


def test_every_damage_to_one_object(whole: dict[str, bytes]) -> None:
    assert _is_committed_or_refused(whole) == f"state {_SAVES - 1}"
    outcomes = set()
    for damage in _damages(whole):
        objects = {key: damage.get(key, body) for key, body in whole.items()}
        outcomes.add(_is_committed_or_refused({key: body for key, body in objects.items() if body is not None}))
    assert outcomes >= {f"state {_SAVES - 1}", f"state {_SAVES - 2}"}
    assert outcomes <= {f"state {_SAVES - 1}", f"state {_SAVES - 2}", "RestoreError"}


def test_training_goes_on_over_a_spoilt_object(whole: dict[str, bytes]) -> None:
    """A checkpoint that does not verify is passed over loudly. It neither stops later saves nor comes back by deduplication."""
    fell_back = 0
    for key, body in whole.items():
        for damaged in (None, body[:-1], bytes([body[0] ^ 1]) + body[1:]):
            objects = {**whole, key: damaged}
            store = _holding({name: content for name, content in objects.items() if content is not None})
            attempt = begin(store)
            try:
                assert resume(attempt) is not None
            except RestoreError:
                # All retained checkpoints share this object; nothing is trained on from nothing.
                assert key.startswith("data/")
                attempt.saver.close(60)
                continue
            fell_back += len(attempt.fallbacks)
            for number in range(3, 6):
                attempt.save(make_state("B", number), number)
                assert same_state(restore(store), make_state("B", number))
            attempt.saver.close(60)
            last = begin(store)
            resume(last)
            last.save(make_state("Z", 1), 9)
            last.saver.close(60)
            assert garbage(store) == set()
    assert fell_back > 5


# Records


@settings(max_examples=200 * SCALE)
@given(st.binary(max_size=200), st.sampled_from([Head, Root, RunRecord, PinnedBy]))
def test_sealed_nonsense_is_refused(body: bytes, kind: Any) -> None:
    class Raw(msgspec.Struct):
        body: msgspec.Raw

    for data in (body, seal(Raw(msgspec.Raw(b'{"format":1,"x":2}')))):
        with pytest.raises(IntegrityError):
            unseal(data, kind, what="it")


def test_a_record_that_could_not_be_read_back_is_not_written() -> None:
    root = Root(format=1, run_id="", name="", world_size=1, parts=[], objects=[], homes=[], metadata={"x": object()})
    with pytest.raises(UsageError, match="Root record cannot be written"):
        seal(root)
    with pytest.raises(UsageError, match="too large"):
        seal(msgspec.structs.replace(root, metadata={"x": "y" * (65 << 20)}))


# Parts

_HASH = b"\7" * 32


def _entry(**changes: Any) -> ArrayEntry:
    entry = ArrayEntry("a", "u8", (8,), (8,), (0,), "numpy", [Chunk(0, 0, 8, _HASH)])
    return msgspec.structs.replace(entry, **changes)


def _part(objects: list[ObjectRef] | None = None, arrays: list[ArrayEntry] | None = None) -> Part:
    return Part(FORMAT_VERSION, 0, [], objects or [ObjectRef(0, "data/1/x", 8)], arrays or [_entry()], b"{}")


def test_a_part_comes_back() -> None:
    assert decode_part(encode_part(_part()), what="it") == _part()


@pytest.mark.parametrize(
    "part",
    [
        *(
            _part(objects=[ObjectRef(0, key, 8)])
            for key in ("../x", "data/../x", "/etc/passwd", "data//x", "data/.x", "heads/1", "data", "data/x\0", "", "data/a b")
        ),
        _part(objects=[ObjectRef(1, "data/1/x", 8)]),
        _part(objects=[ObjectRef(-1, "data/1/x", 8)]),
        _part(objects=[ObjectRef(0, "data/1/x", -8)]),
        _part(objects=[ObjectRef(0, "data/1/x", 7)]),
        _part(objects=[ObjectRef(0, "data/1/x", OBJECT_BYTES + 1)]),
        _part(arrays=[_entry(), _entry()]),
        _part(arrays=[_entry(dtype="object")]),
        _part(arrays=[_entry(shape=(9,), global_shape=(9,))]),
        _part(arrays=[_entry(shape=(-8,), global_shape=(8,))]),
        _part(arrays=[_entry(shape=(-2, -4), global_shape=(8, 8), offsets=(0, 0))]),
        _part(arrays=[_entry(shape=(8, 1))]),
        _part(arrays=[_entry(offsets=(1,))]),
        _part(arrays=[_entry(offsets=(-1,))]),
        _part(arrays=[_entry(shape=(1 << 50,), global_shape=(1 << 50,))]),
        _part(arrays=[_entry(shape=(0, 1 << 62), global_shape=(0, 1 << 62), offsets=(0, 0), chunks=[])]),
        _part(arrays=[_entry(shape=(1 << 32, 1 << 32, 0), global_shape=(1 << 32, 1 << 32, 0), offsets=(0, 0, 0), chunks=[])]),
        _part(arrays=[_entry(shape=(1,) * 65, global_shape=(1,) * 65, offsets=(0,) * 65)]),
        _part(arrays=[_entry(chunks=[])]),
        _part(arrays=[_entry(chunks=[Chunk(1, 0, 8, _HASH)])]),
        _part(arrays=[_entry(chunks=[Chunk(-1, 0, 8, _HASH)])]),
        _part(arrays=[_entry(chunks=[Chunk(0, -1, 8, _HASH)])]),
        _part(arrays=[_entry(chunks=[Chunk(0, 1, 8, _HASH)])]),
        _part(arrays=[_entry(chunks=[Chunk(0, 0, 16, _HASH), Chunk(0, 0, -8, b"")])]),
        _part(arrays=[_entry(chunks=[Chunk(0, 0, 0, b""), Chunk(0, 0, 8, _HASH)])]),
        _part(arrays=[_entry(chunks=[Chunk(0, 0, 8, b"")])]),
        _part(arrays=[_entry(chunks=[Chunk(0, 0, 8, _HASH * 2)])]),
        _part(
            objects=[ObjectRef(0, "data/1/x", OBJECT_BYTES)],
            arrays=[
                _entry(
                    shape=(CHUNK_BYTES + 1,),
                    global_shape=(CHUNK_BYTES + 1,),
                    chunks=[Chunk(0, 0, CHUNK_BYTES + 1, _HASH * 17)],
                )
            ],
        ),
        msgspec.structs.replace(_part(), version=2),
    ],
)  # fmt: skip
def test_a_hostile_part_is_refused(part: Part) -> None:
    with pytest.raises(FormatError):
        decode_part(encode_part(part), what="it")


@settings(max_examples=300 * SCALE)
@given(st.data())
def test_any_bytes_for_a_part(data: st.DataObject) -> None:
    body = bytearray(encode_part(_part()))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        decode_part(bytes(body), what="it")
    except FormatError:
        pass


# A folder whose hashes are all right, made by somebody with bad intentions


def _forged(change: Callable[[Head], Head]) -> MemoryStore:
    store = _small_run()
    head = read_truth(store, RUN_ID).head
    assert head is not None
    forged = msgspec.structs.replace(change(head), number=head.number + 1)
    store.put(f"heads/{forged.number:08d}.json", seal(forged))
    return store


def _with_name(head: Head, name: str) -> Head:
    refs = [msgspec.structs.replace(ref, name=name) for ref in head.checkpoints]
    return msgspec.structs.replace(head, checkpoints=refs)


@pytest.mark.parametrize(
    "name", ["../..", "checkpoints/00000001-1-../x", "heads", "", "checkpoints/00000002-1-ABC", "a\0b"]
)
def test_a_head_with_a_path_for_a_name(name: str) -> None:
    with pytest.raises(HoldfastError, match="none of the"):
        restore(_forged(lambda head: _with_name(head, name)))


def test_a_size_that_the_index_does_not_have() -> None:
    def grow(head: Head) -> Head:
        refs = [msgspec.structs.replace(ref, total_bytes=1 << 50) for ref in head.checkpoints]
        return msgspec.structs.replace(head, checkpoints=refs)

    with pytest.raises(HoldfastError, match="do not have the"):
        restore(_forged(grow))


def test_a_head_that_condemns_what_is_no_data_does_not_get_it_deleted() -> None:
    store = _forged(lambda head: msgspec.structs.replace(head, condemned=["run.json", "heads/00000001.json"]))
    store.put("run.json", b"{}")
    attempt = begin(store)
    resume(attempt)
    attempt.save({"x": np.zeros(3)}, 1)
    attempt.saver.close(60)
    assert {"run.json", "heads/00000001.json"} <= set(store._contents.objects)
